"""github.py against GitHub's own API description: what it sends is what GitHub accepts, and it touches only its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from merge_adapter.errors import GitHubError, InputError
from merge_adapter.github import BODY_LIMIT, Check, Conclusion, GitHub, PermissionMissing, shortened
from merge_adapter.types import Operation

SHA = "6dcb09b5b57875f334f61aebed695e2e4193db5e"
MARKER = "<!-- merge-adapter: 0123456789abcdef -->"
CHECK = Check(
    "merge-adapter: acme/adapter", Conclusion.SUCCESS, "Equivalent", "A table", "https://example.org/run"
)


@pytest.fixture
def github(github_api: Any) -> GitHub:
    return GitHub("ghs_token", "octocat/adapters", api_url=github_api.url)


@pytest.fixture
def comment(github: GitHub) -> Callable[..., dict[str, Any]]:
    """A comment of the issue or pull request 7, in GitHub's own shape."""

    def make(number: int, login: str, body: str) -> dict[str, Any]:
        return {
            "id": number,
            "url": f"{github._client.requester.base_url}/repos/octocat/adapters/issues/comments/{number}",
            "html_url": f"https://github.com/octocat/adapters/pull/7#issuecomment-{number}",
            "body": body,
            "user": {"login": login, "id": 41898282, "type": "Bot"},
        }

    return make


def test_a_check_run_carries_verdict_and_summary(github: GitHub, github_api: Any) -> None:
    """The verdict stands beside the commit, with the run's page behind it."""
    assert github.check(SHA, CHECK).startswith("http")
    (sent,) = github_api.sent("POST", "/repos/octocat/adapters/check-runs")
    assert sent.body == {
        "name": "merge-adapter: acme/adapter",
        "head_sha": SHA,
        "details_url": "https://example.org/run",
        "status": "completed",
        "conclusion": "success",
        "output": {"title": "Equivalent", "summary": "A table"},
    }


@pytest.mark.parametrize(
    ("conclusion", "state"), [("success", "success"), ("neutral", "success"), ("failure", "failure")]
)
def test_a_status_says_the_same_to_tokens_that_may_not_make_checks(
    github: GitHub, github_api: Any, conclusion: str, state: str
) -> None:
    check = Check("merge-adapter: a", Conclusion(conclusion), "T" * 300, "", "https://example.org/run")
    github.status(SHA, check)
    (sent,) = github_api.sent("POST", f"/repos/octocat/adapters/statuses/{SHA}")
    assert sent.body["state"] == state
    assert sent.body["description"] == "T" * 140


def test_the_first_comment_is_made(github: GitHub, github_api: Any) -> None:
    """GitHub's example thread has comments of others only, so a new one is written."""
    posted = github.comment(7, MARKER, f"{MARKER}\nhello")
    assert posted.operation is Operation.CREATED
    (sent,) = github_api.sent("POST", "/repos/octocat/adapters/issues/1347/comments") or github_api.sent(
        "POST", r"/repos/[\w.-]+/[\w.-]+/issues/\d+/comments"
    )
    assert sent.body == {"body": f"{MARKER}\nhello"}


def test_the_next_comment_rewrites_our_own(
    github: GitHub, github_api: Any, comment: Callable[..., dict[str, Any]]
) -> None:
    """Of several comments with the marker only the one that this account wrote is edited."""
    thread = [
        comment(1, "mallory", f"{MARKER}\nthis is mine now"),
        comment(2, "other[bot]", "no marker"),
        comment(3, "github-actions[bot]", f"{MARKER}\nold"),
    ]
    github_api.answer("GET", r".*/issues/\d+/comments", 200, thread)
    posted = github.comment(7, MARKER, f"{MARKER}\nnew")
    assert posted.operation is Operation.UPDATED
    (sent,) = github_api.sent("PATCH", ".*")
    assert sent.path.endswith("/issues/comments/3")
    assert sent.body == {"body": f"{MARKER}\nnew"}
    assert not github_api.sent("POST", ".*/comments")


def test_a_comment_that_says_it_already_is_left_alone(
    github: GitHub, github_api: Any, comment: Callable[..., dict[str, Any]]
) -> None:
    github_api.answer(
        "GET", r".*/issues/\d+/comments", 200, [comment(3, "github-actions[bot]", f"{MARKER}\nsame")]
    )
    assert github.comment(7, MARKER, f"{MARKER}\nsame").operation is Operation.UNCHANGED
    assert not github_api.sent("PATCH", ".*")


def test_an_app_is_known_by_its_own_name(
    github: GitHub, github_api: Any, comment: Callable[..., dict[str, Any]]
) -> None:
    """With an app's token a comment of github-actions is somebody else's."""
    github_api.answer("POST", ".*/graphql", 200, {"data": {"viewer": {"login": "acme-merge[bot]"}}})
    github_api.answer(
        "GET", r".*/issues/\d+/comments", 200, [comment(3, "github-actions[bot]", f"{MARKER}\nold")]
    )
    assert github.login == "acme-merge[bot]"
    assert github.comment(7, MARKER, f"{MARKER}\nnew").operation is Operation.CREATED


def test_an_issue_is_opened_once_and_closed_when_it_is_over(
    github: GitHub, github_api: Any, comment: Callable[..., dict[str, Any]]
) -> None:
    assert (
        github.open_issue(MARKER, "acme/adapter could not be merged", f"{MARKER}\nwhy").operation
        is Operation.CREATED
    )
    (made,) = github_api.sent("POST", "/repos/octocat/adapters/issues")
    assert made.body["title"] == "acme/adapter could not be merged"

    ours = comment(9, "github-actions[bot]", f"{MARKER}\nwhy") | {
        "number": 9,
        "url": f"{github_api.url}/repos/octocat/adapters/issues/9",
    }
    theirs = {**ours, "number": 10, "user": {"login": "mallory", "id": 1, "type": "User"}}
    github_api.answer("GET", "/repos/octocat/adapters/issues", 200, [theirs, ours])
    github_api.answer("PATCH", "/repos/octocat/adapters/issues/9", 200, ours)
    github = GitHub("ghs_token", "octocat/adapters", api_url=github_api.url)
    assert github.open_issue(MARKER, "t", f"{MARKER}\nwhy").operation is Operation.UNCHANGED
    assert github.open_issue(MARKER, "t", f"{MARKER}\nnow this").operation is Operation.UPDATED
    assert github.close_issue(MARKER, "It works again.") is not None
    closing = github_api.sent("PATCH", "/repos/octocat/adapters/issues/9")[-1]
    assert closing.body == {"state": "closed", "state_reason": "completed"}
    assert not github_api.sent("PATCH", "/repos/octocat/adapters/issues/10")
    assert github.close_issue(MARKER, "It works again.") is None, "it is closed already"
    assert len(github_api.sent("GET", "/repos/octocat/adapters/issues")) == 2, "listed once by each client"


def test_a_release_gets_files_and_keeps_its_own_notes(
    github: GitHub, github_api: Any, tmp_path: Path
) -> None:
    """What people wrote in the notes stays; our part is replaced, not repeated."""
    report = tmp_path / "merge_report.json"
    report.write_text("{}")
    assert github.attach(1, report, name="adapter-merge_report.json")
    (uploaded,) = github_api.sent("POST", r"/repos/[\w.-]+/[\w.-]+/releases/\d+/assets")
    assert uploaded.body in (b"{}", {})

    release = {
        "id": 1,
        "url": f"{github_api.url}/repos/octocat/adapters/releases/1",
        "html_url": "https://github.com/octocat/adapters/releases/v1",
        "name": "v1",
        "tag_name": "v1",
        "draft": False,
        "prerelease": True,
        "body": "Handwritten.\n\n<!-- start -->\nold\n<!-- end -->\n\nMore by hand.",
    }
    github_api.answer("GET", r"/repos/octocat/adapters/releases/1", 200, release)
    github.release_notes(1, "<!-- start -->", "<!-- end -->", "new")
    (edited,) = github_api.sent("PATCH", "/repos/octocat/adapters/releases/1")
    assert edited.body["body"] == "Handwritten.\n\n<!-- start -->\nnew\n<!-- end -->\n\nMore by hand."
    assert edited.body["prerelease"] is True


def test_changed_files_come_from_commits_and_from_pull_requests(github: GitHub, github_api: Any) -> None:
    assert github.changed_between("main", SHA) == ("file1.txt",)
    assert github.changed_in_pull_request(7) == ("file1.txt",)


def test_a_renamed_file_changed_in_both_places(github: GitHub, github_api: Any) -> None:
    """An adapter that a file was taken away from is another one, too."""
    files = [{"filename": "new/a.json", "previous_filename": "old/a.json", "status": "renamed"}]
    github_api.answer("GET", r"/repos/.*/pulls/7/files", 200, files)
    assert github.changed_in_pull_request(7) == ("new/a.json", "old/a.json")


def test_a_dispatch_starts_the_workflow(github: GitHub, github_api: Any) -> None:
    github_api.answer("POST", "/repos/octocat/adapters/dispatches", 204)
    github.dispatch("merge-adapter", {"adapter": "acme/adapter", "revision": SHA})
    (sent,) = github_api.sent("POST", "/repos/octocat/adapters/dispatches")
    assert sent.body == {
        "event_type": "merge-adapter",
        "client_payload": {"adapter": "acme/adapter", "revision": SHA},
    }
    with pytest.raises(InputError, match="at most 10 keys"):
        github.dispatch("merge-adapter", dict.fromkeys("abcdefghijk", 1))


def test_the_run_of_a_dispatch_can_be_followed_and_stopped(github: GitHub, github_api: Any) -> None:
    """What the bot does after a dispatch: find the run by its name, look at it, cancel it."""
    (run,) = github.dispatched_runs("2020-01-22T00:00:00Z")
    assert github.dispatched_runs("2026-11-23T00:00:00Z") == ()
    assert run.title
    assert github.workflow_run(run.id).id == run.id
    github.cancel_run(run.id)
    assert github_api.sent("POST", r".*/actions/runs/\d+/cancel")


@pytest.mark.parametrize("status", [403, 404])
def test_a_missing_permission_is_named(github: GitHub, github_api: Any, status: int) -> None:
    """GitHub answers 403 to a token without the permission, 404 where it would not even show the repository."""
    github_api.answer("POST", ".*/check-runs", status, {"message": "Resource not accessible by integration"})
    with pytest.raises(PermissionMissing) as caught:
        github.check(SHA, CHECK)
    assert caught.value.permission == "checks: write"
    assert "permissions: {checks: write}" in caught.value.hint


def test_other_refusals_carry_what_github_said(github: GitHub, github_api: Any) -> None:
    github_api.answer("POST", ".*/check-runs", 422, {"message": "No commit found for SHA"})
    with pytest.raises(GitHubError, match="422 No commit found for SHA") as caught:
        github.check(SHA, CHECK)
    assert not isinstance(caught.value, PermissionMissing)
    assert "ghs_token" not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (200, b"<html>Sign in</html>", "is not what its API describes"),
        (200, [1], "is not what its API describes"),
        (404, b"<html>Not here</html>", "may not comment"),
        (422, b"<html>Not this</html>", "refused to comment on the pull request: 422$"),
    ],
)
def test_an_answer_that_is_not_githubs_is_an_error_of_ours(
    github: GitHub, github_api: Any, status: int, body: Any, said: str
) -> None:
    """A proxy's page in place of JSON: GitHub cannot be told, and the merge stands all the same."""
    github_api.answer("GET", r".*/issues/7/comments", status, body)
    with pytest.raises(GitHubError, match=said):
        github.comment(7, MARKER, "x")


def test_the_token_is_not_in_what_is_shown(github: GitHub) -> None:
    assert "ghs_token" not in repr(github)


def test_github_out_of_reach_is_an_error_of_ours() -> None:
    github = GitHub("ghs_token", "octocat/adapters", api_url="http://127.0.0.1:1")
    with pytest.raises(GitHubError, match="could not be reached"):
        github.status(SHA, CHECK)


def test_long_texts_are_cut_at_a_paragraph() -> None:
    text = "\n\n".join(["x" * 1000] * 100)
    cut = shortened(text, rest="… the rest is elsewhere.")
    assert len(cut) <= BODY_LIMIT
    assert cut.endswith("x\n\n… the rest is elsewhere.")
    assert shortened("short", rest="…") == "short"
