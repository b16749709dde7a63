"""The outcome on GitHub: check or status, comment, release, issue; each where the token may, none of them vital.

What a permission is missing for is said once, in the job's summary, which shows the same. A merge never fails
because GitHub could not be told.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TypeVar

from merge_adapter.action import summary
from merge_adapter.action.candidates import Candidate
from merge_adapter.action.events import Trigger
from merge_adapter.action.markdown import code
from merge_adapter.action.results import Failed, Finished, Result, worst
from merge_adapter.action.runner import Runner
from merge_adapter.errors import GitHubError
from merge_adapter.github import BODY_LIMIT, Check, Conclusion, GitHub, PermissionMissing, shortened
from merge_adapter.types import Verdict

T = TypeVar("T")

_UNFIT = re.compile(r"[^A-Za-z0-9._/@-]+")
_NOTES_END = "<!-- /merge-adapter -->"


class _Telling:
    """Calls that may fail without harm, and what is to be said about those that did."""

    def __init__(self, masked: Callable[[str], str]) -> None:
        self.masked = masked
        self.notes: list[str] = []

    def attempt(self, call: Callable[[], T], *, instead: Callable[[], object] | None = None) -> T | None:
        """The result of `call`; None where GitHub would not, after trying `instead` when a permission is missing."""
        try:
            return call()
        except PermissionMissing as error:
            if instead is not None:
                self.attempt(instead)
            else:
                self._note(f"{error.message}. {error.hint}")
        except GitHubError as error:
            self._note(f"{error.message}. {error.hint}")
        return None

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


def give_feedback(
    results: Sequence[Result],
    *,
    trigger: Trigger,
    runner: Runner,
    github: GitHub | None,
    masked: Callable[[str], str],
) -> tuple[str, ...]:
    """Tell GitHub, as far as the event has a place for it and the token may. Returns what is left to say.

    `masked` cuts secrets out of a text.
    """
    if github is None:
        return ()
    telling = _Telling(masked)
    if trigger.sha is not None:
        for result in results:
            _check(telling, github, trigger.sha, result, runner)
    if trigger.pull_request is not None:
        number, body = trigger.pull_request, masked(_comment(results, runner))
        marker = _marker(runner, results)
        telling.attempt(lambda: github.comment(number, marker, f"{marker}\n{body}"))
    if trigger.release is not None:
        _release(telling, github, trigger.release, results, runner)
    if trigger.scheduled:
        for result in results:
            _issue(telling, github, result, runner)
    return tuple(telling.notes)


def _check(telling: _Telling, github: GitHub, sha: str, result: Result, runner: Runner) -> None:
    """A check run, or, since only apps and workflows may make those, a commit status."""
    check = Check(
        name=f"merge-adapter: {_plain(result.candidate)}",
        conclusion=Conclusion.FAILURE if result.exit_code else _good(result),
        title=telling.masked(summary.title(result)),
        summary=telling.masked(_fitting(summary.section(result), runner)),
        details_url=runner.run_url,
    )
    telling.attempt(lambda: github.check(sha, check), instead=lambda: github.status(sha, check))


def _good(result: Result) -> Conclusion:
    passed = isinstance(result, Finished) and result.verdict is Verdict.PASS
    return Conclusion.SUCCESS if passed else Conclusion.NEUTRAL


def _comment(results: Sequence[Result], runner: Runner) -> str:
    parts = [summary.overview(results)] if len(results) > 1 else []
    parts += [summary.section(result) for result in results]
    parts.append(f"<sub>From [this run]({runner.run_url}); rewritten by the next.</sub>")
    return _fitting("\n\n".join(parts), runner)


def _release(
    telling: _Telling, github: GitHub, release: int, results: Sequence[Result], runner: Runner
) -> None:
    for result in results:
        for file in result.files if isinstance(result, Finished) else ():
            telling.attempt(partial(_attach, github, release, result, runner, Path(file)))
    start = f"<!-- merge-adapter: {_identity(runner)} -->"
    text = telling.masked("\n\n".join(("## Merged models", summary.overview(results))))
    telling.attempt(
        lambda: github.release_notes(
            release, start, _NOTES_END, _fitting(text, runner, limit=BODY_LIMIT // 2)
        )
    )


def _attach(github: GitHub, release: int, result: Result, runner: Runner, file: Path) -> str:
    name = "model-card.md" if file.name == "README.md" else file.name
    return github.attach(release, runner.workspace / file, name=f"{result.candidate.slug}-{name}")


def _issue(telling: _Telling, github: GitHub, result: Result, runner: Runner) -> None:
    """An open issue for as long as the scheduled merge of one adapter fails."""
    marker = f"<!-- merge-adapter schedule: {_hash(_stable(result.candidate))} -->"
    name = _plain(result.candidate)
    if not result.exit_code:
        farewell = f"The merge of {code(result.candidate.label)} works again: {runner.run_url}"
        telling.attempt(lambda: github.close_issue(marker, farewell))
        return
    what = (
        "could not be merged"
        if isinstance(result, Failed)
        else f"was merged with the verdict {worst([result])}"
    )
    body = f"{marker}\nThe scheduled run {runner.run_url} found:\n\n{telling.masked(summary.section(result))}"
    telling.attempt(lambda: github.open_issue(marker, f"{name} {what}", _fitting(body, runner)))


def _fitting(text: str, runner: Runner, *, limit: int = BODY_LIMIT) -> str:
    return shortened(text, limit, rest=f"… the rest is in the summary of [this run]({runner.run_url}).")


def _marker(runner: Runner, results: Sequence[Result]) -> str:
    """What the next run of the same job knows its comment by.

    Jobs of a matrix that name different adapters write a comment each; a job that finds them in the commit keeps
    one, whatever it finds.
    """
    named = [result.candidate.reference for result in results if result.candidate.named]
    return f"<!-- merge-adapter: {_identity(runner, *named)} -->"


def _identity(runner: Runner, *more: str) -> str:
    return _hash("\0".join((runner.workflow, runner.job, *more)))


def _hash(text: str) -> str:
    return sha256(text.encode(errors="replace")).hexdigest()[:16]


def _stable(candidate: Candidate) -> str:
    """The adapter, whichever commit of it."""
    repository = candidate.reference.partition("@")[0]
    return f"{repository}/{candidate.subfolder}" if candidate.subfolder else repository


def _plain(candidate: Candidate) -> str:
    """The adapter's name for titles, which GitHub shows as plain text but searches for mentions."""
    return _UNFIT.sub("-", candidate.label)[:100].replace("@", " at ")
