"""Discussions and pull requests in all their states."""

from __future__ import annotations

import pytest
from huggingface_hub import CommitOperationAdd
from huggingface_hub.community import (
    DiscussionComment,
    DiscussionCommit,
    DiscussionStatusChange,
    DiscussionTitleChange,
)
from huggingface_hub.errors import HfHubHTTPError


def _propose(api, repo, path="x.txt", content=b"x", **more):
    return api.create_commit(
        repo, [CommitOperationAdd(path, content)], commit_message=f"Add {path}", create_pr=True, **more
    )


def test_pull_request_from_a_commit(alice, bob, repo):
    """Open at once, by anybody who can read; main is as it was until the merge, which squashes."""
    pr = _propose(bob, repo, commit_description="Because.")
    assert pr.pr_num == 1
    assert pr.pr_revision == "refs/pr/1"
    bob.create_commit(
        repo,
        [CommitOperationAdd("y.txt", b"y")],
        commit_message="More",
        revision="refs/pr/1",
        parent_commit=pr.oid,
    )
    details = alice.get_discussion_details(repo, 1)
    assert (details.status, details.author, details.title) == ("open", "bob", "Add x.txt")
    assert details.target_branch == "refs/heads/main"
    assert details.conflicting_files == []
    assert "+x" in details.diff
    assert [type(event) for event in details.events] == [
        DiscussionComment,
        DiscussionCommit,
        DiscussionCommit,
    ]
    assert details.events[0].content == "Because."
    assert alice.list_repo_files(repo) == [".gitattributes"]
    assert alice.file_exists(repo, "y.txt", revision="refs/pr/1")
    assert [ref.ref for ref in alice.list_repo_refs(repo, include_pull_requests=True).pull_requests] == [
        "refs/pr/1"
    ]
    alice.merge_pull_request(repo, 1, comment="Thanks")
    merged = alice.get_discussion_details(repo, 1)
    assert merged.status == "merged"
    assert merged.merge_commit_oid == alice.model_info(repo).sha
    assert "+y" in merged.diff
    assert alice.list_repo_commits(repo)[0].title == "Add x.txt (#1)"
    assert set(alice.list_repo_files(repo)) == {".gitattributes", "x.txt", "y.txt"}


def test_draft_becomes_ready_and_can_be_closed(alice, bob, repo):
    """draft -> open -> closed -> open; a draft is not merged."""
    draft = bob.create_pull_request(repo, "Merged weights", description="d")
    assert (draft.status, draft.is_pull_request, draft.git_reference) == ("draft", True, "refs/pr/1")
    assert alice.model_info(repo, revision="refs/pr/1").sha == alice.model_info(repo).sha
    bob.create_commit(repo, [CommitOperationAdd("w", b"1")], commit_message="w", revision="refs/pr/1")
    with pytest.raises(HfHubHTTPError, match="draft cannot be merged"):
        alice.merge_pull_request(repo, 1)
    ready = bob.change_discussion_status(repo, 1, "open", comment="ready")
    assert isinstance(ready, DiscussionStatusChange)
    assert ready.new_status == "open"
    alice.change_discussion_status(repo, 1, "closed")
    with pytest.raises(HfHubHTTPError, match="is closed"):
        bob.create_commit(repo, [CommitOperationAdd("w", b"2")], commit_message="w", revision="refs/pr/1")
    bob.change_discussion_status(repo, 1, "open")
    alice.merge_pull_request(repo, 1)
    with pytest.raises(HfHubHTTPError, match="already been merged"):
        alice.change_discussion_status(repo, 1, "open")


def test_parent_commit_with_create_pr_is_a_start_and_no_lock(alice, repo):
    """The pull request begins there, however far main has gone."""
    old = alice.model_info(repo).sha
    alice.upload_file(path_or_fileobj=b"1", path_in_repo="newer", repo_id=repo)
    pr = _propose(alice, repo, parent_commit=old)
    assert [commit.commit_id for commit in alice.list_repo_commits(repo, revision=pr.pr_revision)] == [
        pr.oid,
        old,
    ]


def test_conflicts_are_listed_and_stop_the_merge(alice, repo):
    """Both changed one file."""
    alice.upload_file(path_or_fileobj=b"base\n", path_in_repo="f", repo_id=repo)
    _propose(alice, repo, "f", b"theirs\n")
    alice.upload_file(path_or_fileobj=b"ours\n", path_in_repo="f", repo_id=repo)
    assert alice.get_discussion_details(repo, 1).conflicting_files == ["f"]
    with pytest.raises(HfHubHTTPError, match="Conflicting files: f"):
        alice.merge_pull_request(repo, 1)


def test_empty_pull_request_commit_opens_none(hub, alice, repo):
    """A commit that changes nothing leaves no pull request behind."""
    import json

    import httpx2

    attributes = alice.hf_hub_download(repo, ".gitattributes")
    with open(attributes) as file:
        operation = {"key": "file", "value": {"path": ".gitattributes", "content": file.read()}}
    lines = [{"key": "header", "value": {"summary": "same"}}, operation]
    answer = httpx2.post(
        f"{hub.url}/api/models/{repo}/commit/main?create_pr=1",
        content="\n".join(map(json.dumps, lines)),
        headers={"Authorization": "Bearer hf_alice"},
    )
    assert answer.json()["pullRequestUrl"] is None
    assert list(alice.get_repo_discussions(repo)) == []


def test_filters_and_pages(alice, bob, repo):
    """By author, type and status; more than one page."""
    for number in range(52):
        bob.create_discussion(repo, f"Question {number}")
    alice.create_pull_request(repo, "Draft")
    _propose(bob, repo)
    alice.change_discussion_status(repo, 1, "closed")

    def nums(**filters):
        return [one.num for one in alice.get_repo_discussions(repo, **filters)]

    assert len(nums()) == 54
    assert nums(discussion_type="pull_request") == [54, 53]
    assert nums(discussion_type="pull_request", author="bob") == [54]
    assert nums(discussion_status="closed") == [1]
    assert len(nums(discussion_status="open")) == 53
    assert nums(author="alice") == [53]


def test_comments(alice, bob, repo):
    """Said, edited by their author only, hidden for good."""
    bob.create_discussion(repo, "Hello", description="First")
    said = alice.comment_discussion(repo, 1, "@bot merge")
    with pytest.raises(HfHubHTTPError, match="only the author"):
        bob.edit_discussion_comment(repo, 1, said.id, "no")
    edited = alice.edit_discussion_comment(repo, 1, said.id, "@bot verify")
    assert (edited.content, edited.edited, edited.number_of_edits) == ("@bot verify", True, 1)
    assert edited.edit_history[0]["raw"] == "@bot merge"
    assert edited.last_edited_by == "alice"
    with pytest.warns(UserWarning, match="irreversible"):
        hidden = alice.hide_discussion_comment(repo, 1, said.id)
    assert hidden.hidden
    events = alice.get_discussion_details(repo, 1).events
    assert "verify" not in events[1].content
    assert "&lt;" in alice.comment_discussion(repo, 1, "<script>").rendered


def test_title(alice, bob, repo, api):
    """Changed by author or writer; the event tells both titles."""
    bob.create_discussion(repo, "Old")
    event = alice.rename_discussion(repo, 1, "New")
    assert isinstance(event, DiscussionTitleChange)
    assert (event.old_title, event.new_title) == ("Old", "New")
    assert alice.get_discussion_details(repo, 1).title == "New"
    with pytest.raises(HfHubHTTPError, match="cannot take part"):
        api("hf_carol").comment_discussion(repo, 1, "reading token")


def test_who_may_change_a_pull_request(alice, bob, repo):
    """Strangers may propose, and neither push to others' proposals nor merge their own."""
    _propose(alice, repo)
    with pytest.raises(HfHubHTTPError, match="403"):
        bob.upload_file(path_or_fileobj=b"1", path_in_repo="z", repo_id=repo, revision="refs/pr/1")
    with pytest.raises(HfHubHTTPError, match="403"):
        bob.change_discussion_status(repo, 1, "closed")
    _propose(bob, repo, "other")
    with pytest.raises(HfHubHTTPError, match="403"):
        bob.merge_pull_request(repo, 2)


def test_discussions_disabled(hub, alice, bob, repo):
    """No discussions and no pull requests, commits of writers as ever."""
    import httpx2

    url = f"{hub.url}/api/models/{repo}/settings"
    httpx2.put(url, json={"discussionsDisabled": True}, headers={"Authorization": "Bearer hf_alice"})
    for refused in (lambda: bob.create_discussion(repo, "x"), lambda: _propose(alice, repo)):
        with pytest.raises(HfHubHTTPError, match="Discussions are disabled"):
            refused()
    alice.upload_file(path_or_fileobj=b"1", path_in_repo="z", repo_id=repo)


def test_upload_folder_with_create_pr(alice, bob, repo, tmp_path):
    """What the client does by itself: a draft, commits to its ref."""
    (tmp_path / "m.safetensors").write_bytes(b"\x01" * 9000)
    (tmp_path / "config.json").write_text("{}")
    done = bob.upload_folder(repo_id=repo, folder_path=tmp_path, create_pr=True, commit_message="Folder")
    details = alice.get_discussion_details(repo, done.pr_num)
    assert details.is_pull_request
    assert set(alice.list_repo_files(repo, revision=f"refs/pr/{details.num}")) > {
        "m.safetensors",
        "config.json",
    }
