"""Jobs on GitHub Actions: a `repository_dispatch` to a repository whose workflow runs the action.

GitHub does not say which run a dispatch started, so the workflow tells: its `run-name` carries the job's id from
`client_payload.job`. How it ended is read from the artifact that the workflow uploads, verdict, error and report;
without one, what a successful run published is looked for on the Hub.
"""

from __future__ import annotations

import re
import time
from dataclasses import replace
from typing import Any

from merge_adapter.bot.jobs import Job, JobKind, JobState, Outcome
from merge_adapter.bot.runners import artifact
from merge_adapter.bot.runners.base import Interrupted, Watch, keep_report, merge_options, outcome_of
from merge_adapter.bot.settings import BotSettings
from merge_adapter.bot.sources import settings_of, source_of
from merge_adapter.errors import ExitCode, GitHubError, InputError
from merge_adapter.github import GitHub, PermissionMissing, WorkflowRun
from merge_adapter.hub import Hub
from merge_adapter.publish import PublishSettings, find_published, prepare, repinned
from merge_adapter.report.document import publication_entry
from merge_adapter.resolve import resolve

_APPEAR_SECONDS = 180.0
"""How long a run may take to appear after its dispatch."""
_CLOCK_SKEW = 3600.0
"""Seconds by which this machine's clock and GitHub's may differ. A run that is not found is started twice."""


class GitHubRunner:
    """Dispatches to `github_repository` and waits for the run."""

    def __init__(self, settings: BotSettings) -> None:
        missing = [name for name in ("github_repository", "github_token") if not getattr(settings, name)]
        if missing:
            raise InputError(
                f"the runner github needs the settings {' and '.join(missing)}",
                hint="Name a repository whose workflow uses the action on repository_dispatch; see docs/bot.md.",
            )
        self._settings = settings
        self._github = GitHub(settings.github_token, settings.github_repository, api_url=settings.github_api)

    def run(self, job: Job, token: str, watch: Watch, *, slot: int) -> Outcome | Interrupted:  # noqa: ARG002
        """See `Runner`. The workflow has its own token for the Hub; jobs of logged-in users are refused."""
        if job.request.token is not None:
            raise InputError(
                "a user's own merge cannot run on GitHub Actions: their token must not leave the bot",
                hint="Use the runner local or hf-jobs for the page, or push the adapter and let the webhook work.",
            )
        if job.request.kind is JobKind.VERIFY:
            raise InputError("the runner github merges only", hint="Run merge-adapter verify yourself.")
        try:
            return self._run(job, token, watch)
        except PermissionMissing as error:  # its own hint speaks to workflows
            repository = self._settings.github_repository
            raise GitHubError(
                f"the setting github_token may not {error.doing} in {repository}, or there is none",
                hint=f"Give it the permission `{error.permission}` for {repository}: see docs/bot.md.",
            ) from error

    def _run(self, job: Job, token: str, watch: Watch) -> Outcome | Interrupted:
        found = self._started(job, watch)
        if isinstance(found, Interrupted):
            return found
        watch.runs_at(str(found.id))
        watch.line(f"runs at {found.url}")
        watch.line('{"stage": "GitHub Actions", "done": 0, "total": null, "unit": ""}')
        while found.conclusion is None:
            if watch.stop.wait(self._settings.poll_seconds):
                if watch.cancelled.is_set():
                    self._github.cancel_run(found.id)
                return Interrupted()
            found = self._github.workflow_run(found.id)
        return self._outcome(job, found, token, watch)

    def _started(self, job: Job, watch: Watch) -> WorkflowRun | Interrupted:
        """The run of this job: one that an earlier attempt started, or a new one."""
        if job.remote is not None:
            return self._github.workflow_run(int(job.remote))
        mark = f"{job.id}.{job.round}"
        since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime((job.started or job.created) - _CLOCK_SKEW))
        run = self._find(mark, since)
        if run is None:
            self._github.dispatch(self._settings.github_event, self._payload(job, mark))
            watch.line(f"dispatched to {self._settings.github_repository}")
        deadline = time.monotonic() + _APPEAR_SECONDS
        while run is None:
            if watch.stop.wait(self._settings.poll_seconds):
                return Interrupted()
            if time.monotonic() > deadline:
                raise GitHubError(
                    f"no workflow run of {self._settings.github_repository} took up job {mark}",
                    hint="Its workflow needs: on: repository_dispatch, and run-name with client_payload.job.",
                )
            run = self._find(mark, since)
        return run

    def _find(self, mark: str, since: str) -> WorkflowRun | None:
        named = re.compile(rf"(?<![\w.]){re.escape(mark)}(?![\w.])")  # round 1 is not round 10
        return next((run for run in self._github.dispatched_runs(since) if named.search(run.title)), None)

    def _payload(self, job: Job, mark: str) -> dict[str, Any]:
        request, options = job.request, job.request.options
        chosen: dict[str, Any] = {
            **{name.removeprefix("--"): value for name, value in merge_options(options).items()},
            "target-repo": options.target_repo,
            "license": options.license,
            "private": options.private,
            "combine-with": "\n".join(options.adapters),
            "weights": "\n".join(map(str, options.weights)),
        }
        return {
            "job": mark,
            "adapter": request.adapter,
            "revision": request.revision,
            "subfolder": request.subfolder,
            "options": {name: value for name, value in chosen.items() if value not in (None, "")},
        }

    def _outcome(self, job: Job, run: WorkflowRun, token: str, watch: Watch) -> Outcome:
        if run.conclusion == "cancelled":
            return Outcome(JobState.CANCELLED, message=f"the workflow run was cancelled: {run.url}")
        archive = self._github.artifact(run.id, artifact.NAME, limit=artifact.LIMIT)
        result = artifact.read_result(archive, job.request) if archive is not None else None
        if result is not None:
            return _reported(result, run, watch)
        if run.conclusion == "success":
            return self._published(job, run, token, watch)
        return Outcome(
            JobState.FAILED,
            int(ExitCode.BUG),
            f"the workflow run ended with {run.conclusion} and left no result: {run.url}",
            f"Its log tells why. The artifact {artifact.NAME} would: see docs/examples/dispatch.yml.",
        )

    def _published(self, job: Job, run: WorkflowRun, token: str, watch: Watch) -> Outcome:
        """What a run that succeeded without leaving a result put on the Hub."""
        hub = Hub(self._settings.endpoint or None, token or None)
        options, settings = job.request.options, settings_of(job.request)
        publishing = PublishSettings(target_repo=options.target_repo, license=options.license)
        sources = resolve(source_of(job.request), hub=hub, quantized_base=settings.quantized_base)
        publishing = prepare(sources, settings, publishing, hub=hub)
        sources = repinned(sources, publishing, hub=hub)
        published = find_published(sources, settings, publishing, hub=hub)
        if published is None:
            message = f"the workflow run succeeded, but nothing is published: {run.url}"
            return Outcome(JobState.FAILED, int(ExitCode.BUG), message, "Look at the run's summary.")
        keep_report(watch.folder, published.report)
        verdict = str(published.report["verification"]["verdict"])
        return Outcome(
            JobState.DONE, 0, verdict=verdict, publication=publication_entry(published.publication)
        )


def _reported(result: artifact.RunResult, run: WorkflowRun, watch: Watch) -> Outcome:
    """The outcome that the action itself reported."""
    report = result.report or {}
    if report:
        keep_report(watch.folder, report)
    outcome = outcome_of(result.exit_code, {**report, **({"error": result.error} if result.error else {})})
    if outcome.exit_code == 0:
        return outcome
    return replace(outcome, hint=f"{outcome.hint} The run: {run.url}".strip())
