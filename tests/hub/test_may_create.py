"""Who may not publish is told before anything is merged."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from localhub.process import LocalHub
from merge_adapter.errors import HubError
from merge_adapter.hub import Hub


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Hub with an owner, her organisation, a stranger, and somebody whose token may only read."""
    tokens = {"ada": "hf_ada", "stranger": "hf_stranger", "reader": "hf_reader:read"}
    with LocalHub(tmp_path_factory.mktemp("rights"), tokens, {"demo": ["ada"]}) as hub:
        yield hub.url


@pytest.mark.parametrize("repo_id", ["ada/new", "Ada/new", "demo/new"])
def test_an_owner_and_a_member_may(url: str, repo_id: str) -> None:
    Hub(endpoint=url, token="hf_ada").check_may_create(repo_id)


@pytest.mark.parametrize(
    ("token", "words"),
    [
        ("hf_stranger", "stranger is neither ada nor a member of it"),
        ("hf_reader", "the token of reader may only read"),
        ("hf_unknown", "create the repository ada/new"),
    ],
)
def test_others_are_told_what_they_lack(url: str, token: str, words: str) -> None:
    with pytest.raises(HubError, match=words) as caught:
        Hub(endpoint=url, token=token).check_may_create("ada/new")
    assert caught.value.hint
    assert token not in str(caught.value) + caught.value.hint
