"""Repositories of the Hub as the stages see them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from merge_adapter.errors import HubError, NotFoundError, PolicyError
from merge_adapter.hub import Hub

LARGE = os.urandom(300_000)


@pytest.fixture
def repo_id(world) -> str:
    name = world.name("ann")
    world.repository(
        name,
        {
            "config.json": b'{"a": 1}',
            "model.safetensors": LARGE,
            "sub/config.json": b"sub",
            "README.md": b"---\nlicense: mit\ntags: [x]\n---\n",
        },
    )
    return name


def test_a_repository_is_pinned_to_its_commit(world, repo_id: str) -> None:
    """A later push is not seen by a repository that was opened before."""
    opened = world.hub().open(repo_id)
    sha = world.repository(repo_id, {"config.json": b"new"})
    assert opened.read("config.json") == b'{"a": 1}'
    assert opened.origin.revision != sha
    assert world.hub().open(repo_id).origin.revision == sha
    assert world.hub().open(repo_id, revision=opened.origin.revision).read("config.json") == b'{"a": 1}'


def test_files_are_listed_with_their_sizes(world, repo_id: str) -> None:
    """Large files by their own size, not the pointer's."""
    files = world.hub().open(repo_id).files
    assert files["model.safetensors"] == len(LARGE)
    assert files["config.json"] == 8


@pytest.mark.parametrize(
    ("offset", "length"), [(0, None), (0, 8), (8, 1000), (299_990, 100), (300_000, 5), (0, 0)]
)
def test_any_range_of_a_large_file_can_be_read(world, repo_id: str, offset: int, length: int | None) -> None:
    """Reads clip at the end of the file, as those of a local file do."""
    end = None if length is None else offset + length
    opened = world.hub().open(repo_id)
    assert opened.read("model.safetensors", offset=offset, length=length) == LARGE[offset:end]


def test_reading_a_range_downloads_nothing_else(world, repo_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Headers of large shards are read by planning alone; the cache stays empty."""
    opened = world.hub().open(repo_id)
    fetched: list[int] = []
    original = type(opened)._fetch_into
    monkeypatch.setattr(
        type(opened),
        "_fetch_into",
        lambda self, received, *rest: (original(self, received, *rest), fetched.append(len(received)))[0],
    )
    opened.read("model.safetensors", offset=10, length=20)
    assert fetched == [20]


def test_downloads_use_the_cache_of_the_client(world, repo_id: str) -> None:
    """`local` and `folder` give the same snapshot, and later reads come from it."""
    opened = world.hub().open(repo_id)
    path = opened.local("model.safetensors")
    assert path.read_bytes() == LARGE
    folder = opened.folder(["config.json", "sub/config.json"])
    assert folder == path.parent
    assert (folder / "sub" / "config.json").read_bytes() == b"sub"
    assert opened.read("model.safetensors", offset=5, length=5) == LARGE[5:10]


def test_a_subfolder_is_a_repository_of_its_own(world, repo_id: str) -> None:
    """Its paths are relative to it, and nothing above it is seen."""
    opened = world.hub().open(repo_id, subfolder="sub")
    assert dict(opened.files) == {"config.json": 3}
    assert opened.read("config.json") == b"sub"
    assert opened.folder(["config.json"]).name == "sub"
    with pytest.raises(NotFoundError):
        opened.read("../config.json")


def test_card_and_openness_come_with_it(world, repo_id: str) -> None:
    """What policy decides on."""
    opened = world.hub().open(repo_id)
    assert opened.card["license"] == "mit"
    assert opened.private is False
    assert opened.gated is None
    assert "x" in opened.tags


@pytest.mark.parametrize(("user", "said"), [("bot", "the token that was passed"), (None, "no token")])
def test_a_missing_or_private_repository_is_told_with_the_token_that_was_used(
    world, user: str | None, said: str
) -> None:
    """The Hub does not tell the two apart, so the message names both, and the identity."""
    private = world.name("ann")
    world.repository(private, {"a": b"x"}, private=True)
    for repo_id in (private, world.name("ann", "missing")):
        with pytest.raises(NotFoundError, match="may not see it") as caught:
            world.hub(user).open(repo_id)
        assert repo_id in caught.value.message
        assert said in caught.value.message
        assert caught.value.__cause__ is not None


def test_a_missing_revision_or_file_is_named(world, repo_id: str) -> None:
    """Exit 2, with where to look."""
    with pytest.raises(NotFoundError, match="no revision 'v9'"):
        world.hub().open(repo_id, revision="v9")
    with pytest.raises(NotFoundError, match="no file 'nothing'") as caught:
        world.hub().open(repo_id).read("nothing")
    assert "/tree/" in caught.value.hint


def test_a_gate_without_access_is_policy_and_says_where_to_ask(world, repo_id: str) -> None:
    """Exit 6; the page of the gate is in the hint."""
    world.api("ann").update_repo_settings(repo_id, gated="manual")
    opened = world.hub("eve").open(repo_id)
    assert opened.gated == "manual"
    for read in (lambda: opened.read("config.json"), lambda: opened.local("config.json")):
        with pytest.raises(PolicyError, match="gated") as caught:
            read()
        assert f"{world.url}/{repo_id}" in caught.value.hint


def test_a_token_that_nobody_has_is_an_error_of_its_own(world, repo_id: str) -> None:
    """Not "repository missing": the fix is another one."""
    with pytest.raises(HubError, match="does not accept") as caught:
        Hub(world.url, "hf_unknown" + "y" * 20).open(repo_id)
    assert "settings/tokens" in caught.value.hint


def test_an_unreachable_hub_is_told_with_its_address() -> None:
    """Nothing listens there."""
    from merge_adapter.hub.session import Patience

    with pytest.raises(HubError, match=r"127\.0\.0\.1:1 ") as caught:
        Hub("http://127.0.0.1:1", patience=Patience(attempts=1)).open("a/b")
    assert "HF_ENDPOINT" in caught.value.hint


def test_nothing_is_left_in_the_working_directory(world, repo_id: str, tmp_path: Path, monkeypatch) -> None:
    """Reads and downloads write to the cache only."""
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    opened = world.hub().open(repo_id)
    opened.read("config.json")
    opened.local("config.json")
    assert list(empty.iterdir()) == []
