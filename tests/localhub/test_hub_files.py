"""Commits, history, refs and downloads."""

from __future__ import annotations

import hashlib
import os
import subprocess

import httpx2
import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    HfHubHTTPError,
    RevisionNotFoundError,
)


def _add(path, content):
    return CommitOperationAdd(path, content)


def _post_commit(hub, repo, lines, token="hf_alice"):
    import json

    body = "".join(json.dumps(line) + "\n" for line in lines)
    url = f"{hub.url}/api/models/{repo}/commit/main"
    return httpx2.post(url, content=body, headers={"Authorization": f"Bearer {token}"})


def test_all_operations_in_one_commit(alice, repo):
    """Add, delete a file, delete a folder, copy: one commit, and the tree says so."""
    alice.create_commit(
        repo,
        [_add("a.txt", b"a"), _add("dir/b.txt", b"b"), _add("dir/c.txt", b"c"), _add("keep/d.txt", b"d")],
        commit_message="first",
        commit_description="with a body",
    )
    done = alice.create_commit(
        repo,
        [
            CommitOperationDelete("a.txt"),
            CommitOperationDelete("dir/"),
            CommitOperationCopy("keep/d.txt", "copy/d.txt"),
            _add("e.txt", b"e"),
        ],
        commit_message="second",
    )
    assert sorted(alice.list_repo_files(repo)) == [".gitattributes", "copy/d.txt", "e.txt", "keep/d.txt"]
    history = alice.list_repo_commits(repo)
    assert [commit.title for commit in history] == ["second", "first", "initial commit"]
    assert history[0].commit_id == done.oid
    assert history[1].message == "with a body"
    assert history[0].authors == ["alice"]


def test_replacing_a_folder_by_a_file_and_back(alice, repo):
    """Git allows it, so does the Hub."""
    alice.create_commit(repo, [_add("x/y", b"1")], commit_message="folder")
    alice.create_commit(repo, [CommitOperationDelete("x/"), _add("x", b"2")], commit_message="file")
    assert alice.list_repo_files(repo) == [".gitattributes", "x"]


def test_deleting_what_is_not_there(alice, repo):
    """The message is the one the client looks for."""
    with pytest.raises(EntryNotFoundError, match="A file with this name doesn't exist"):
        alice.delete_file("missing.txt", repo)


def test_parent_commit_is_a_lock(alice, repo):
    """Two writers with the same parent: one of them has to look again."""
    head = alice.model_info(repo).sha
    alice.create_commit(repo, [_add("a", b"1")], commit_message="one", parent_commit=head)
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as caught:
        alice.create_commit(repo, [_add("b", b"2")], commit_message="two", parent_commit=head)
    assert caught.value.response.status_code == 412


def test_commit_that_changes_nothing(hub, alice, repo):
    """Neither through the client, which leaves unchanged files out, nor when they are sent all the same."""
    first = alice.create_commit(repo, [_add("a", b"1")], commit_message="one")
    again = alice.create_commit(repo, [_add("a", b"1")], commit_message="two")
    assert again.oid == first.oid
    lines = [
        {"key": "header", "value": {"summary": "three"}},
        {"key": "file", "value": {"path": "a", "content": "1"}},
    ]
    assert _post_commit(hub, repo, lines).json()["commitOid"] == first.oid
    assert len(alice.list_repo_commits(repo)) == 2


@pytest.mark.parametrize("path", ["../evil", "/etc/x", "a/../../b", ".git/config", "a//b", "a\\b", "a/./b"])
def test_paths_that_could_leave_the_repository(hub, repo, path):
    """Refused before anything is written."""
    lines = [
        {"key": "header", "value": {"summary": "s"}},
        {"key": "file", "value": {"path": path, "content": "x"}},
    ]
    answer = _post_commit(hub, repo, lines)
    assert answer.status_code == 400
    assert "Invalid path" in answer.json()["error"]


@pytest.mark.parametrize(
    "line", ['{"key": "header"}', "not json", '{"key": "odd", "value": {"path": "a"}}', "[]"]
)
def test_malformed_commits(hub, repo, line):
    """A clear 400, never a crash."""
    answer = httpx2.post(
        f"{hub.url}/api/models/{repo}/commit/main", content=line, headers={"Authorization": "Bearer hf_alice"}
    )
    assert answer.status_code == 400
    assert "line 1" in answer.json()["error"]


def test_a_hash_alone_gives_nobody_a_file(hub, alice, repo, client):
    """Committing a pointer to content that was uploaded to another repository is refused."""
    alice.create_repo("alice/secret-holder", private=True)
    content = b"\x00secret" * 1000
    alice.create_commit("alice/secret-holder", [_add("s.bin", content)], commit_message="s")
    digest = hashlib.sha256(content).hexdigest()
    large = {"path": "s.bin", "algo": "sha256", "oid": digest, "size": len(content)}
    lines = [{"key": "header", "value": {"summary": "steal"}}, {"key": "lfsFile", "value": large}]
    answer = _post_commit(hub, repo, lines)
    assert answer.status_code == 400
    assert "does not exist" in answer.json()["error"]


def test_revisions_by_every_name(alice, repo):
    """Branch, tag, sha, short sha, full ref, HEAD; and what does not exist."""
    sha = alice.create_commit(repo, [_add("a", b"1")], commit_message="one").oid
    alice.create_branch(repo, branch="feature/x", revision=sha)
    alice.create_tag(repo, tag="v1.0", tag_message="release", revision=sha)
    alice.create_tag(repo, tag="light")
    for name in ("main", "feature/x", "v1.0", "light", sha, sha[:9], "refs/heads/main", "HEAD"):
        assert alice.model_info(repo, revision=name).sha == sha
    with pytest.raises(RevisionNotFoundError):
        alice.model_info(repo, revision="nope")
    refs = alice.list_repo_refs(repo)
    assert {ref.name for ref in refs.branches} == {"main", "feature/x"}
    assert {ref.name: ref.target_commit for ref in refs.tags} == {"v1.0": sha, "light": sha}
    alice.delete_tag(repo, tag="v1.0")
    alice.delete_branch(repo, branch="feature/x")
    with pytest.raises(HfHubHTTPError, match="409"):
        alice.create_branch(repo, branch="main")
    alice.create_branch(repo, branch="main", exist_ok=True)
    with pytest.raises(HfHubHTTPError):
        alice.delete_branch(repo, branch="main")
    assert [ref.name for ref in alice.list_repo_refs(repo).tags] == ["light"]


def test_branches_have_their_own_history(alice, repo):
    """A commit to a branch leaves main alone."""
    alice.create_branch(repo, branch="dev")
    alice.upload_file(path_or_fileobj=b"1", path_in_repo="only-dev", repo_id=repo, revision="dev")
    assert alice.file_exists(repo, "only-dev", revision="dev")
    assert not alice.file_exists(repo, "only-dev")


def test_tree_pages_and_expands(alice, repo):
    """More entries than fit on a page; with the commit that changed each."""
    files = [_add(f"many/{number:04}.txt", b"x") for number in range(1100)]
    alice.create_commit(repo, files, commit_message="many")
    alice.create_commit(repo, [_add("many/0007.txt", b"y")], commit_message="seven")
    assert len(list(alice.list_repo_tree(repo, recursive=True))) == 1102
    assert [entry.path for entry in alice.list_repo_tree(repo)] == [".gitattributes", "many"]
    expanded = {
        info.path: info.last_commit.title
        for info in alice.get_paths_info(repo, ["many/0007.txt", "many/0008.txt", "no"], expand=True)
    }
    assert expanded == {"many/0007.txt": "seven", "many/0008.txt": "many"}
    with pytest.raises(EntryNotFoundError):
        list(alice.list_repo_tree(repo, "no-such-folder"))


def test_ranges(hub, alice, repo):
    """Small files from git and large ones from the store, from any place to any other."""
    large = bytes(range(256)) * 1000
    alice.create_commit(repo, [_add("small.txt", b"0123456789"), _add("big.bin", large)], commit_message="c")
    for path, content in (("small.txt", b"0123456789"), ("big.bin", large)):
        url = f"{hub.url}/{repo}/resolve/main/{path}"
        for header, expected in (
            ("bytes=2-4", content[2:5]),
            ("bytes=5-", content[5:]),
            ("bytes=-3", content[-3:]),
            (f"bytes=3-{len(content) * 2}", content[3:]),
        ):
            answer = httpx2.get(url, headers={"Range": header}, follow_redirects=True)
            assert answer.status_code == 206
            assert answer.content == expected
            assert answer.headers["content-range"].endswith(f"/{len(content)}")
        outside = httpx2.get(url, headers={"Range": f"bytes={len(content)}-"}, follow_redirects=True)
        assert outside.status_code == 416


def test_downloads_are_safe_to_open_in_a_browser(hub, alice, repo):
    """No HTML of a repository runs under the Hub's origin."""
    alice.create_commit(repo, [_add("x.html", b"<script>1</script>")], commit_message="c")
    answer = httpx2.get(f"{hub.url}/{repo}/resolve/main/x.html")
    assert answer.headers["content-type"] == "application/octet-stream"
    assert "sandbox" in answer.headers["content-security-policy"]


def test_missing_entry_names_the_commit(hub, alice, repo, tmp_path):
    """The client keeps, per commit, that a file is missing."""
    with pytest.raises(EntryNotFoundError):
        alice.hf_hub_download(repo, "no.txt", cache_dir=tmp_path)
    answer = httpx2.head(f"{hub.url}/{repo}/resolve/main/no.txt")
    assert answer.headers["x-error-code"] == "EntryNotFound"
    assert answer.headers["x-repo-commit"] == alice.model_info(repo).sha


def test_checksums_match_a_local_folder(alice, repo, tmp_path):
    """What verify_repo_checksums compares: git ids of small files, SHA-256 of large ones."""
    (tmp_path / "a.txt").write_bytes(b"text")
    (tmp_path / "b.safetensors").write_bytes(b"\x01\x02" * 5000)
    alice.upload_folder(repo_id=repo, folder_path=tmp_path)
    result = alice.verify_repo_checksums(repo, local_dir=tmp_path)
    assert result.checked_count == 2
    assert result.mismatches == []
    (tmp_path / "b.safetensors").write_bytes(b"\x01\x03" * 5000)
    assert [one["path"] for one in alice.verify_repo_checksums(repo, local_dir=tmp_path).mismatches] == [
        "b.safetensors"
    ]


def test_git_clones_the_repository(hub, alice, repo, tmp_path):
    """By its files, with history, branches, tags and refs of pull requests; pointers in place of large files."""
    alice.create_commit(repo, [_add("a.txt", b"a"), _add("b.bin", b"\x00" * 3000)], commit_message="one")
    alice.create_tag(repo, tag="v1")
    pr = alice.create_commit(repo, [_add("c.txt", b"c")], commit_message="proposed", create_pr=True)
    bare = hub.data / "repos" / "models" / f"{repo}.git"
    # Without the git-lfs that a machine may have set up: it would look for the content behind the pointers.
    alone = {"PATH": os.environ["PATH"], "GIT_CONFIG_NOSYSTEM": "1", "GIT_CONFIG_GLOBAL": os.devnull}
    subprocess.run(
        ["git", "clone", "-q", bare, tmp_path / "clone"], check=True, capture_output=True, env=alone
    )

    def git(*arguments):
        done = subprocess.run(
            ["git", "-C", tmp_path / "clone", *arguments],
            check=True,
            capture_output=True,
            text=True,
            env=alone,
        )
        return done.stdout.strip()

    assert git("log", "--format=%s") == "one\ninitial commit"
    assert git("tag") == "v1"
    assert (tmp_path / "clone" / "b.bin").read_text().startswith("version https://git-lfs")
    git("fetch", "-q", "origin", "refs/pr/1")
    assert git("rev-parse", "FETCH_HEAD") == pr.oid
    assert git("fsck", "--no-dangling") == ""


def test_super_squash(alice, repo):
    """One commit with the same files."""
    alice.create_commit(repo, [_add("a", b"1")], commit_message="one")
    alice.super_squash_history(repo)
    assert len(alice.list_repo_commits(repo)) == 1
    assert alice.file_exists(repo, "a")


def test_binary_content_in_a_text_name_goes_to_large_storage(alice, repo):
    """As on the Hub, git only ever holds text."""
    alice.create_commit(repo, [_add("odd.txt", b"\x00\x01\x02" * 100)], commit_message="c")
    assert alice.get_paths_info(repo, "odd.txt")[0].lfs is not None


def test_unknown_operation_of_an_unknown_repository(bob, repo):
    """Writing without rights is refused with the way out."""
    with pytest.raises(HfHubHTTPError, match="create_pr"):
        bob.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id=repo)


def test_upload_is_refused_when_the_size_is_wrong(hub, alice, repo):
    """A commit must name the size the store has."""
    content = b"\x00" * 4000
    alice.preupload_lfs_files(repo, [CommitOperationAdd("x.bin", content)])
    large = {"path": "x.bin", "oid": hashlib.sha256(content).hexdigest(), "size": 1}
    lines = [{"key": "header", "value": {"summary": "s"}}, {"key": "lfsFile", "value": large}]
    assert "4000 bytes in the store" in _post_commit(hub, repo, lines).json()["error"]
    with pytest.raises(BadRequestError):
        alice.create_commit(repo, [CommitOperationAdd("y", b"1")], commit_message=" ")
