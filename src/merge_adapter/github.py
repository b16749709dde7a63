"""The only module that talks to GitHub, through PyGithub.

Every call that needs a permission the token lacks raises `PermissionMissing`, which names that permission;
everything else that goes wrong raises GitHubError. Comments, issues and release notes carry a hidden marker and
are only ever edited where this token's own account wrote them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from functools import cached_property
from itertools import islice, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_adapter import __version__
from merge_adapter.errors import GitHubError, InputError, MergeAdapterError
from merge_adapter.types import Operation

if TYPE_CHECKING:
    from github.File import File
    from github.GitRelease import GitRelease
    from github.Issue import Issue

API_URL = "https://api.github.com"
WORKFLOW_USER = "github-actions[bot]"
"""Who writes with the token of a workflow run."""
BODY_LIMIT = 65_000
"""Characters of a comment, an issue or a check run's summary; GitHub refuses more than 65,536."""
_TITLE_LIMIT = 140
"""Characters of a commit status's description, which is also a readable length for a title."""
_LOOK_BACK = 300
"""Open issues and comments looked through for the marker, newest issues first."""
_COMPARED_FILES = 300
_PULL_REQUEST_FILES = 3000
"""Changed files that GitHub lists of two commits, of a pull request; it does not say that there are more."""
_TIMEOUT = 30
"""Seconds without an answer."""


class PermissionMissing(GitHubError):
    """The token may not do `doing`. `permission` is what a workflow's `permissions:` must grant."""

    def __init__(self, doing: str, permission: str) -> None:
        super().__init__(
            f"the GitHub token may not {doing}",
            hint=f"Grant it in the workflow, `permissions: {{{permission}}}`, or leave it: "
            "the job's summary says the same.",
        )
        self.doing = doing
        self.permission = permission


class Conclusion(StrEnum):
    """How a check ended, in the words of the checks API."""

    SUCCESS = "success"
    FAILURE = "failure"
    NEUTRAL = "neutral"


@dataclass(frozen=True)
class Check:
    """A verdict to show beside a commit."""

    name: str
    conclusion: Conclusion
    title: str
    """One line; the part of it that fits a commit status is shown there."""
    summary: str
    """Markdown, at most BODY_LIMIT characters."""
    details_url: str
    """Where the whole story is: the workflow run."""


@dataclass(frozen=True)
class Posted:
    """Something written to GitHub."""

    url: str
    operation: Operation


@dataclass(frozen=True)
class WorkflowRun:
    """One run of a workflow."""

    id: int
    title: str
    """What `run-name` made of its event."""
    url: str
    conclusion: str | None
    """`success`, `failure`, `cancelled`, …; None until it ended."""


class GitHub:
    """One repository on GitHub, seen with one token."""

    def __init__(self, token: str, repository: str, *, api_url: str = API_URL) -> None:
        from github import Auth, Github
        from github.GithubRetry import GithubRetry
        from urllib3.util import Retry

        self.repository = repository
        self._client = Github(
            auth=Auth.Token(token),
            base_url=api_url,
            timeout=_TIMEOUT,
            user_agent=f"merge-adapter/{__version__}",
            # A POST whose answer was lost may have been carried out: repeating it could comment twice.
            retry=GithubRetry(
                total=2,
                backoff_factor=1,
                max_rate_limit_wait=60,
                allowed_methods=Retry.DEFAULT_ALLOWED_METHODS,
            ),
            seconds_between_writes=None,
            lazy=True,
        )
        self._repo = self._client.get_repo(repository)

    def __repr__(self) -> str:
        return f"GitHub({self.repository!r})"  # never the token

    @cached_property
    def login(self) -> str:
        """The account this token writes as, as the REST API spells it."""
        try:
            # `GET /user` is closed to the token of a workflow run and to apps; this is open to all of them.
            with _calling("ask whose token this is", "metadata: read"):
                _, answer = self._client.requester.graphql_query("query { viewer { login } }", {})
                return str(answer["data"]["viewer"]["login"])
        except (GitHubError, KeyError, TypeError):
            return WORKFLOW_USER

    def check(self, sha: str, check: Check) -> str:
        """Show `check` on the commit as a check run. Returns its URL."""
        with _calling("create a check run", "checks: write"):
            run = self._repo.create_check_run(
                check.name,
                sha,
                details_url=check.details_url,
                status="completed",
                conclusion=check.conclusion.value,
                output={"title": check.title[:_TITLE_LIMIT], "summary": check.summary},
            )
            return str(run.html_url)

    def status(self, sha: str, check: Check) -> str:
        """Show `check` on the commit as a commit status, which any token with write access can set."""
        state = "failure" if check.conclusion is Conclusion.FAILURE else "success"
        with _calling("set a commit status", "statuses: write"):
            status = self._repo.get_commit(sha).create_status(
                state=state,
                target_url=check.details_url,
                description=check.title[:_TITLE_LIMIT],
                context=check.name,
            )
            return str(status.url)

    def comment(self, number: int, marker: str, body: str) -> Posted:
        """Write `body` to issue or pull request `number`: into our own comment that carries `marker`, or a new one."""
        with _calling("comment on the pull request", "pull-requests: write"):
            issue = self._repo.get_issue(number)
            for comment in islice(issue.get_comments(), _LOOK_BACK):
                if _owned(comment, marker, self.login):
                    if comment.body == body:
                        return Posted(comment.html_url, Operation.UNCHANGED)
                    comment.edit(body)
                    return Posted(comment.html_url, Operation.UPDATED)
            return Posted(issue.create_comment(body).html_url, Operation.CREATED)

    def open_issue(self, marker: str, title: str, body: str) -> Posted:
        """An open issue that says `body`: our own that carries `marker`, brought up to date, or a new one."""
        with _calling("open an issue", "issues: write"):
            issue = self._find_issue(marker)
            if issue is None:
                created = self._repo.create_issue(title=title, body=body)
                self._own_issues.append(created)
                return Posted(created.html_url, Operation.CREATED)
            if issue.body == body:
                return Posted(issue.html_url, Operation.UNCHANGED)
            issue.edit(body=body)
            return Posted(issue.html_url, Operation.UPDATED)

    def close_issue(self, marker: str, farewell: str) -> str | None:
        """Close our own open issue that carries `marker` with a comment. Returns its URL, None when there is none."""
        with _calling("close the issue", "issues: write"):
            issue = self._find_issue(marker)
            if issue is None:
                return None
            issue.create_comment(farewell)
            issue.edit(state="closed", state_reason="completed")
            self._own_issues.remove(issue)
            return str(issue.html_url)

    def attach(self, release_id: int, path: Path, *, name: str) -> str:
        """Attach a file to a release under `name`, in place of one of that name. Returns its download URL."""
        with _calling("attach files to the release", "contents: write"):
            release = self._release(release_id)
            for asset in release.get_assets():
                if asset.name == name:
                    asset.delete_asset()
            uploaded = release.upload_asset(str(path), name=name, content_type="application/octet-stream")
            return str(uploaded.browser_download_url)

    def release_notes(self, release_id: int, start: str, end: str, text: str) -> str:
        """Put `text` between the markers `start` and `end` of a release's notes, at the end where they are missing.

        The rest of the notes stays as it is. Returns the release's URL.
        """
        with _calling("edit the release", "contents: write"):
            release = self._release(release_id)
            notes = release.body or ""
            before, found, rest = notes.partition(start)
            after = rest.partition(end)[2] if found else ""
            updated = f"{before.rstrip()}\n\n{start}\n{text}\n{end}{after}"
            release.update_release(
                name=release.name or release.tag_name,
                message=updated.strip(),
                draft=release.draft,
                prerelease=release.prerelease,
            )
            return str(release.html_url)

    def changed_between(self, base: str, head: str) -> tuple[str, ...]:
        """Paths of the files that `head` changes since it left `base`. GitHubError where GitHub does not list all."""
        with _calling("compare commits", "contents: read"):
            return _paths(self._repo.compare(base, head).files, most=_COMPARED_FILES)

    def changed_in_pull_request(self, number: int) -> tuple[str, ...]:
        """Paths of the files that a pull request changes. GitHubError where GitHub does not list all."""
        with _calling("list the files of the pull request", "pull-requests: read"):
            return _paths(self._repo.get_pull(number).get_files(), most=_PULL_REQUEST_FILES)

    def dispatch(self, event_type: str, payload: dict[str, Any]) -> None:
        """Start the repository's workflows that listen to `repository_dispatch` with this type.

        `payload` has at most 10 keys at its top and 64 KiB in all. GitHub does not say which run it starts.
        """
        if len(payload) > 10:
            raise InputError(f"a repository_dispatch carries at most 10 keys, got {len(payload)}")
        with _calling("start a workflow", "contents: write"):
            self._repo.create_repository_dispatch(event_type, payload)

    def dispatched_runs(self, since: str) -> tuple[WorkflowRun, ...]:
        """Runs that a `repository_dispatch` started since a moment, in ISO 8601, the newest first."""
        with _calling("list workflow runs", "actions: read"):
            runs = self._repo.get_workflow_runs(event="repository_dispatch")
            begin = datetime.fromisoformat(since)
            recent = takewhile(lambda run: run.created_at >= begin, islice(runs, _LOOK_BACK))
            return tuple(_workflow_run(run) for run in recent)

    def workflow_run(self, run_id: int) -> WorkflowRun:
        """One run as it stands."""
        with _calling("look at a workflow run", "actions: read"):
            return _workflow_run(self._repo.get_workflow_run(run_id))

    def artifact(self, run_id: int, name: str, *, limit: int) -> bytes | None:
        """The newest artifact of that name which a run kept, as the zip archive that GitHub makes of it.

        None when there is none or it expired. Raises GitHubError when it has more than `limit` bytes.
        """
        with _calling("read the artifacts of a workflow run", "actions: read"):
            listed = islice(self._repo.get_workflow_run(run_id).get_artifacts(), _LOOK_BACK)
            found = [one for one in listed if one.name == name and not one.expired]
            if not found:
                return None
            newest = max(found, key=lambda one: one.id)
            # The client follows redirects to GitHub's own hosts only, and artifacts are stored elsewhere. The address
            # is signed: the token stays here.
            headers, _ = self._client.requester.requestJsonAndCheck("GET", newest.archive_download_url)
            return _download(str(headers.get("location", "")), name, limit)

    def cancel_run(self, run_id: int) -> None:
        """Stop a run; nothing when it has ended."""
        with _calling("cancel a workflow run", "actions: write"):
            self._repo.get_workflow_run(run_id).cancel()

    def _release(self, release_id: int) -> GitRelease:
        return self._repo.get_release(release_id)

    def _find_issue(self, marker: str) -> Issue | None:
        return next((issue for issue in self._own_issues if marker in (issue.body or "")), None)

    @cached_property
    def _own_issues(self) -> list[Issue]:
        """Open issues that this account wrote; listed once, for a schedule asks for each of many adapters."""
        newest_first = self._repo.get_issues(state="open", sort="created", direction="desc")
        return [
            issue
            for issue in islice(newest_first, _LOOK_BACK)
            if issue.pull_request is None and issue.user is not None and issue.user.login == self.login
        ]


def _paths(files: Iterable[File], *, most: int) -> tuple[str, ...]:
    """Each file's path, and the one it had before where it was renamed."""
    listed = list(files)
    if len(listed) >= most:
        raise GitHubError(f"GitHub lists {most} changed files and no more, and there may be more")
    return tuple(
        path for file in listed for path in (file.filename, file.previous_filename) if isinstance(path, str)
    )


def _download(url: str, name: str, limit: int) -> bytes:
    """What lies at an address that GitHub signed."""
    import requests

    with requests.get(url, timeout=_TIMEOUT, stream=True) as answer:
        answer.raise_for_status()
        content = bytearray()
        for chunk in answer.iter_content(1 << 16):
            content += chunk
            if len(content) > limit:
                raise GitHubError(
                    f"the artifact {name} has more than {limit:,} bytes",
                    hint="Keep only the outputs and reports of merge-adapter in it; see docs/examples/dispatch.yml.",
                )
    return bytes(content)


def _workflow_run(run: Any) -> WorkflowRun:
    ended = run.status == "completed"
    return WorkflowRun(
        int(run.id), str(run.display_title), str(run.html_url), run.conclusion if ended else None
    )


def shortened(text: str, limit: int = BODY_LIMIT, *, rest: str) -> str:
    """`text` cut at a paragraph so that with `rest`, which says where the remainder is, it fits `limit` characters."""
    if len(text) <= limit:
        return text
    room = limit - len(rest) - 2
    cut = text.rfind("\n\n", 0, room)
    return f"{text[: cut if cut > 0 else room].rstrip()}\n\n{rest}"


def _owned(written: Any, marker: str, login: str) -> bool:
    """Whether our own account wrote it, marker included: anyone can paste a marker into a comment."""
    return marker in (written.body or "") and written.user is not None and written.user.login == login


@contextmanager
def _calling(doing: str, permission: str) -> Iterator[None]:
    """Around each use of the client. GitHub answers 404 as well as 403 where a permission is missing."""
    import requests
    from github import GithubException

    try:
        yield
    except GithubException as error:
        if error.status in (403, 404) and "rate limit" not in _said(error).lower():
            raise PermissionMissing(doing, permission) from error
        if error.status == 401:
            raise GitHubError(
                f"GitHub does not accept the token to {doing}: {_said(error)}",
                hint="It is not one of GitHub's, or has expired or been revoked: give a new one.",
            ) from error
        raise GitHubError(
            f"GitHub refused to {doing}: {error.status} {_said(error)}".rstrip(),
            hint="Run the job again; if GitHub says so again, the message tells which request it does not accept.",
        ) from error
    except requests.RequestException as error:
        raise GitHubError(
            f"GitHub could not be reached to {doing}: {type(error).__name__}",
            hint="Run the job again when it is back.",
        ) from error
    except MergeAdapterError:
        raise
    except (
        Exception
    ) as error:  # the client takes answers apart unlooked at: a proxy's page ends as a TypeError
        raise GitHubError(
            f"GitHub's answer to the request to {doing} is not what its API describes: {type(error).__name__}",
            hint="Run the job again; if it says so again, is GITHUB_API_URL the address of GitHub's API?",
        ) from error


def _said(error: Any) -> str:
    """GitHub's own message, without the request that PyGithub appends to it."""
    data = error.data
    message = data.get("message") if isinstance(data, dict) else data
    details = data.get("errors") if isinstance(data, dict) else None
    return str(message or "") + (f" ({details})"[:300] if details else "")
