"""Adapters of the workspace, by its own git: which changed, and whether their files are really there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from merge_adapter.action.candidates import Candidate, folders_read
from merge_adapter.action.changes import adapter_folders, changed_adapters, resolve_pointers, took_all_away
from merge_adapter.action.events import Changed
from merge_adapter.action.inputs import Inputs
from merge_adapter.errors import InputError, PolicyError
from merge_adapter.github import GitHub

NOTHING_SET = Inputs()
POINTER = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\n"
    "size 12345\n"
)


def adapter(folder: Path, base: str = "acme/base") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(
        f'{{"peft_type": "LORA", "base_model_name_or_path": "{base}"}}'
    )
    (folder / "adapter_model.safetensors").write_bytes(b"\0" * 2000)


@pytest.fixture
def history(workspace: Path, git: Callable[..., str]) -> list[str]:
    """Three commits: two adapters and a README; adapter `one` trained anew; only words changed."""
    adapter(workspace / "adapters/one")
    adapter(workspace / "adapters/two")
    shas = []
    for change in ("first", "weights", "words"):
        if change == "weights":
            (workspace / "adapters/one/adapter_model.safetensors").write_bytes(b"\1" * 2000)
        elif change == "words":
            (workspace / "README.md").write_text("hello")
            (workspace / "adapters/two/README.md").write_text("hello")
        git("add", "--all")
        git("commit", "--quiet", "--allow-empty", "-m", change)
        shas.append(git("rev-parse", "HEAD"))
    return shas


def changed(workspace: Path, what: Changed, github: GitHub | None = None) -> list[str]:
    found = changed_adapters(workspace, adapter_folders(workspace), what, github=github)
    return [str(folder) for folder in found]


def test_adapters_are_found_below_a_folder(workspace: Path) -> None:
    """Hidden folders and links are not entered."""
    adapter(workspace / "adapters/one")
    adapter(workspace / "adapters/two/checkpoint-10")
    adapter(workspace / ".cache/three")
    (workspace / "adapters/loop").symlink_to(workspace / "adapters")
    assert adapter_folders(workspace) == (
        PurePosixPath("adapters/one"),
        PurePosixPath("adapters/two/checkpoint-10"),
    )
    assert adapter_folders(workspace, "adapters/one") == (PurePosixPath("adapters/one"),)
    assert adapter_folders(workspace, "elsewhere") == ()
    with pytest.raises(PolicyError, match="outside the workspace"):
        adapter_folders(workspace, "../..")


def test_only_the_adapter_that_changed_is_found(workspace: Path, history: list[str]) -> None:
    first, weights, words = history
    assert changed(workspace, Changed(first, weights)) == ["adapters/one"]
    assert changed(workspace, Changed(weights, words)) == [], "words change nothing about a merge"
    assert changed(workspace, Changed(first, words)) == ["adapters/one"]


def test_a_pull_request_is_compared_with_where_it_began(
    workspace: Path, history: list[str], git: Callable[..., str]
) -> None:
    """What happened on main since then is not the pull request's."""
    first, _, words = history
    git("checkout", "--quiet", "-b", "patch", first)
    (workspace / "adapters/two/adapter_model.safetensors").write_bytes(b"\2" * 2000)
    git("commit", "--quiet", "--all", "-m", "patch")
    head = git("rev-parse", "HEAD")
    assert changed(workspace, Changed(words, head, pull_request=7)) == ["adapters/two"]


def test_a_new_branch_is_compared_with_the_default_branch(
    workspace: Path, history: list[str], git: Callable[..., str]
) -> None:
    first, weights, _ = history
    git("update-ref", "refs/remotes/origin/main", first)
    assert changed(workspace, Changed(None, weights, trunk="main")) == ["adapters/one"]


def test_a_new_branch_that_adds_nothing_changes_nothing(
    workspace: Path, history: list[str], git: Callable[..., str]
) -> None:
    git("update-ref", "refs/remotes/origin/main", history[2])
    assert changed(workspace, Changed(None, history[2], trunk="main")) == []
    assert changed(workspace, Changed(None, history[1], trunk="main")) == []


def test_without_anything_to_compare_with_every_adapter_counts(workspace: Path, history: list[str]) -> None:
    """A tag, and the first push of the default branch."""
    assert changed(workspace, Changed(None, history[2])) == ["adapters/one", "adapters/two"]


def test_a_deleted_adapter_is_not_merged(
    workspace: Path, history: list[str], git: Callable[..., str]
) -> None:
    git("rm", "--quiet", "-r", "adapters/one")
    git("commit", "--quiet", "-m", "gone")
    assert changed(workspace, Changed(history[0], git("rev-parse", "HEAD"))) == []


def test_that_the_last_adapter_was_removed_is_no_error(
    workspace: Path, history: list[str], git: Callable[..., str]
) -> None:
    """A path that never held one still is: nothing would ever be merged, and nobody told."""
    git("rm", "--quiet", "-r", "adapters")
    git("commit", "--quiet", "-m", "gone")
    what = Changed(history[2], git("rev-parse", "HEAD"))
    assert took_all_away(workspace, "adapters", what, None)
    assert took_all_away(workspace, "./adapters/one/", what, None)
    assert took_all_away(workspace, ".", what, None)
    assert not took_all_away(workspace, "adaptors", what, None)
    assert not took_all_away(workspace, "adapters", Changed(None, what.head), None), "a new tag"
    shutil.rmtree(workspace / ".git")
    assert not took_all_away(workspace, "adapters", what, None), "never checked out"


def test_an_adapter_at_the_root_changes_with_its_own_files(workspace: Path, git: Callable[..., str]) -> None:
    adapter(workspace)
    git("add", "--all")
    git("commit", "--quiet", "-m", "one")
    first = git("rev-parse", "HEAD")
    (workspace / "train").mkdir()
    (workspace / "train/run.py").write_text("pass")
    git("add", "--all")
    git("commit", "--quiet", "-m", "two")
    second = git("rev-parse", "HEAD")
    assert changed(workspace, Changed(first, second)) == []
    (workspace / "adapter_config.json").write_text("{}")
    git("commit", "--quiet", "--all", "-m", "three")
    assert changed(workspace, Changed(second, git("rev-parse", "HEAD"))) == ["."]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can hand a folder to another user")
def test_a_workspace_of_another_user_is_read(workspace: Path, history: list[str]) -> None:
    """The runner's user owns it, the container's root reads it; git refuses that unless told."""
    for path in (workspace, *workspace.rglob("*")):
        os.chown(path, 1001, 1001, follow_symlinks=False)
    assert changed(workspace, Changed(history[0], history[1])) == ["adapters/one"]


def test_a_shallow_checkout_asks_github(
    workspace: Path, history: list[str], git: Callable[..., str], github_api: Any, tmp_path: Path
) -> None:
    """Without a token it says how to get the history instead."""
    shallow = tmp_path / "shallow"
    git("clone", "--quiet", "--depth=1", workspace.as_uri(), str(shallow))
    with pytest.raises(InputError, match="does not have the commit") as caught:
        changed(shallow, Changed(history[1], history[2]))
    assert "fetch-depth: 0" in caught.value.hint

    comparison = {
        "url": f"{github_api.url}/x", "files": [{"filename": "adapters/one/adapter_config.json", "status": "modified"}]
    }  # fmt: skip
    github_api.answer("GET", "/repos/octocat/adapters/compare/.*", 200, comparison)
    github = GitHub("ghs_token", "octocat/adapters", api_url=github_api.url)
    assert changed(shallow, Changed(history[1], history[2]), github) == ["adapters/one"]
    files = [{"filename": "adapters/two/adapter_model.safetensors", "status": "modified"}]
    github_api.answer("GET", "/repos/.*/pulls/7/files", 200, files)
    missing = "1" * 40
    assert changed(shallow, Changed(missing, missing, pull_request=7), github) == ["adapters/two"]


def test_a_list_of_changes_that_github_cut_short_is_not_trusted(
    workspace: Path, history: list[str], git: Callable[..., str], github_api: Any, tmp_path: Path
) -> None:
    """An adapter beyond the end of the list would be left out without a word."""
    shallow = tmp_path / "shallow"
    git("clone", "--quiet", "--depth=1", workspace.as_uri(), str(shallow))
    files = [{"filename": f"docs/{number}", "status": "modified"} for number in range(300)]
    github_api.answer(
        "GET", "/repos/octocat/adapters/compare/.*", 200, {"url": f"{github_api.url}/x", "files": files}
    )
    github = GitHub("ghs_token", "octocat/adapters", api_url=github_api.url)
    with pytest.raises(InputError, match="GitHub lists 300 changed files and no more") as caught:
        changed(shallow, Changed(history[1], history[2]), github)
    assert "fetch-depth: 0" in caught.value.hint


def test_a_pointer_in_place_of_weights_is_refused(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where git-lfs cannot help, the message says what the checkout needs."""
    adapter(workspace / "one")
    (workspace / "one/adapter_model.safetensors").write_text(POINTER)
    monkeypatch.setenv("PATH", str(workspace))
    with pytest.raises(
        InputError, match=r"one/adapter_model.safetensors is a Git LFS pointer.*not installed"
    ) as caught:
        resolve_pointers(workspace, PurePosixPath("one"))
    assert "lfs: true" in caught.value.hint


def test_git_lfs_fetches_what_a_pointer_stands_for(
    workspace: Path, git: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`git lfs pull` is asked for this adapter's files alone, and never sees a token."""
    adapter(workspace / "one")
    weights = workspace / "one/adapter_model.safetensors"
    weights.write_text(POINTER)
    programs = tmp_path / "bin"
    programs.mkdir()
    program = programs / "git-lfs"
    program.write_text(
        '#!/bin/sh\nenv > "$0.env"; echo "$@" > "$0.args"\n'
        'if [ "$1" = pull ]; then head -c 4000 /dev/zero > one/adapter_model.safetensors; fi\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("INPUT_HF-TOKEN", "hf_secret")
    resolve_pointers(workspace, PurePosixPath("one"))
    assert weights.stat().st_size == 4000
    assert (programs / "git-lfs.args").read_text().split() == ["pull", "--include", "one/*", "--exclude"]
    assert "hf_secret" not in (programs / "git-lfs.env").read_text()


@pytest.mark.skipif(shutil.which("git-lfs") is None, reason="git-lfs is not installed")
@pytest.mark.parametrize("name", ["one", "r=16,alpha=[32]", "{a,b} \\c", "-f ü"])
def test_the_real_git_lfs_fetches_from_its_store(
    workspace: Path, git: Callable[..., str], tmp_path: Path, name: str
) -> None:
    """Whatever the folder is called, and what lies deeper in it as well."""
    origin = tmp_path / "origin.git"
    git("init", "--quiet", "--bare", str(origin))
    git("lfs", "install", "--local")
    git("lfs", "track", "*.safetensors")
    adapter(workspace / name)
    adapter(workspace / name / "2_Dense")
    git("add", "--all")
    git("commit", "--quiet", "-m", "one")
    git("remote", "add", "origin", str(origin))
    git("push", "--quiet", "origin", "main")
    files = [workspace / name / inner / "adapter_model.safetensors" for inner in (".", "2_Dense")]
    for weights in files:
        weights.write_text(git("show", f"HEAD:{weights.relative_to(workspace)}") + "\n")
        assert weights.read_text().startswith("version https://git-lfs")
    resolve_pointers(workspace, PurePosixPath(name))
    assert [weights.read_bytes() for weights in files] == [b"\0" * 2000] * 2


def test_a_link_out_of_the_repository_is_refused(workspace: Path, tmp_path: Path) -> None:
    """Files beside an adapter are published; a link may not add one of the machine's to them."""
    adapter(workspace / "one")
    secret = tmp_path / "secret"
    secret.write_text("x")
    (workspace / "one/tokenizer.json").symlink_to(secret)
    with pytest.raises(PolicyError, match="leads out of the repository"):
        resolve_pointers(workspace, PurePosixPath("one"))


def test_a_base_outside_of_the_repository_is_refused(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A commit does not decide which folders of the machine are read; the workflow's author may."""
    monkeypatch.chdir(workspace)
    outside = tmp_path / "base"
    outside.mkdir()
    (workspace / "base").mkdir()
    (workspace / "out").symlink_to(outside)
    adapter(workspace / "two", base="acme/base")
    ways = (
        (Candidate("./one", PurePosixPath("one")), Inputs()),
        (Candidate(".", PurePosixPath()), Inputs(subfolder="one")),
        (Candidate("./two", PurePosixPath("two")), Inputs(combine_with=("one",))),
        (Candidate("./two", PurePosixPath("two")), Inputs(combine_with=(".:one",))),
    )
    for named in (str(outside), "../../base", "out", "~root"):
        adapter(workspace / "one", base=named)
        for one, inputs in ways:
            with pytest.raises(PolicyError) as caught:
                folders_read(one, inputs, workspace)
            assert "base-model" in caught.value.hint
            folders_read(one, replace(inputs, base_model=str(outside)), workspace)
    shutil.rmtree(workspace / "two")
    with pytest.raises(PolicyError):
        folders_read(Candidate(".", PurePosixPath()), Inputs(), workspace)


def test_everything_that_a_merge_reads_in_the_workspace_is_known(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that pointers are fetched and links refused there, wherever adapters and base are named."""
    monkeypatch.chdir(workspace)
    for name in ("base", "other"):
        (workspace / name).mkdir()
    adapter(workspace / "adapters/one", base="base")
    adapter(workspace / "adapters/two", base="acme/on-the-hub")
    adapter(tmp_path / "elsewhere", base="base")

    def read(reference: str, inputs: Inputs = NOTHING_SET, **candidate: Any) -> list[str]:
        return [str(path) for path in folders_read(Candidate(reference, **candidate), inputs, workspace)]

    assert read("./adapters/one") == ["adapters/one", "base"]
    assert read("./adapters/two") == ["adapters/two"]
    assert read("./adapters", Inputs(subfolder="two")) == ["adapters/two"]
    assert read("./adapters/two", Inputs(combine_with=("adapters:one", "acme/three"))) == [
        "adapters/two", "adapters/one", "base"
    ]  # fmt: skip
    assert read("./adapters/one", Inputs(base_model="other")) == ["adapters/one", "other"]
    assert read("acme/lora", Inputs(base_model="other"), hub_only=True) == ["other"]
    assert read("base", hub_only=True) == [], "an id of the Hub, whatever lies here"
    assert read(str(tmp_path / "elsewhere")) == [], "the workflow's author named it"
    assert read("./adapters/one", Inputs(base_model="x" * 5000)) == ["adapters/one"]
