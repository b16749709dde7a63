"""Jobs on Hugging Face Jobs: hardware chosen from the plan, secrets passed as secrets, log and state followed."""

from __future__ import annotations

import contextlib
import json
import threading
from typing import Any

from merge_adapter.bot.jobs import Job, JobState, Outcome
from merge_adapter.bot.runners.base import Interrupted, Watch, arguments_of, keep_report, outcome_of
from merge_adapter.bot.runners.child import RESULT
from merge_adapter.bot.runners.flavours import choose_flavour, estimate, price_text
from merge_adapter.bot.settings import BotSettings
from merge_adapter.bot.sources import settings_of, source_of
from merge_adapter.errors import ExitCode, InputError, MergeAdapterError
from merge_adapter.hub import Hub
from merge_adapter.hub.errors import RefusedError
from merge_adapter.hub.jobs import JobSpec, RemoteJob, cancel_job, hardware, job_log, look_at_job, start_job
from merge_adapter.report.document import REPORT_FILE
from merge_adapter.report.lines import VARIABLE

_LOG_SECONDS = 15.0
"""How long the end of a log may take to arrive after its job ended."""


class HfJobsRunner:
    """Starts a job per merge under `jobs_namespace`, whose owner pays."""

    def __init__(self, settings: BotSettings) -> None:
        if not settings.jobs_image:
            raise InputError(
                "the runner hf-jobs needs the setting jobs_image",
                hint="Name an image of merge-adapter, such as ghcr.io/OWNER/merge-adapter:1.",
            )
        self._settings = settings
        self._hub = Hub(settings.endpoint or None, settings.token or None)

    def run(self, job: Job, token: str, watch: Watch, *, slot: int) -> Outcome | Interrupted:  # noqa: ARG002
        """See `Runner`. A job that an earlier attempt started is followed, not started again."""
        namespace = self._settings.jobs_namespace or self._hub.user
        if job.remote is None:
            remote = start_job(self._hub, self._spec(job, token, watch), namespace=namespace)
        else:
            known = look_at_job(self._hub, job.remote, namespace=namespace)
            if known is None:
                return _gone(job.remote)
            remote = known
            watch.line(f"following job {remote.id} again")
        watch.runs_at(remote.id)
        result: list[dict[str, Any]] = []
        log = threading.Thread(target=self._read_log, args=(remote.id, namespace, watch, result), daemon=True)
        log.start()
        while not remote.ended:
            if watch.stop.wait(self._settings.poll_seconds):
                if watch.cancelled.is_set():
                    with contextlib.suppress(RefusedError, InputError):  # it ended meanwhile, or is gone
                        cancel_job(self._hub, remote.id, namespace=namespace)
                return Interrupted()
            found = look_at_job(self._hub, remote.id, namespace=namespace)
            if found is None:
                return _gone(remote.id)
            remote = found
        log.join(_LOG_SECONDS)
        if not result:  # the stream was cut: the whole log once more
            self._read_log(remote.id, namespace, watch, result, follow=False)
        return self._outcome(remote, result, token, watch)

    def _spec(self, job: Job, token: str, watch: Watch) -> JobSpec:
        flavour = self._settings.jobs_flavor
        if flavour == "auto":
            flavour = self._choose(job, token, watch)
        endpoint = self._settings.endpoint
        return JobSpec(
            image=self._settings.jobs_image,
            command=(
                "python",
                "-m",
                "merge_adapter.bot.runners.child",
                "--result-line",
                *arguments_of(job, self._settings),
            ),
            environment={VARIABLE: "lines", **({"HF_ENDPOINT": endpoint} if endpoint else {})},
            secrets={"HF_TOKEN": token} if token else {},
            flavour=flavour,
            timeout=self._settings.job_timeout,
            label=f"{job.id}-{job.round}",
        )

    def _choose(self, job: Job, token: str, watch: Watch) -> str:
        """The cheapest hardware that the plan fits on."""
        from merge_adapter.pipeline import MergeRequest, plan_merge

        hub = Hub(self._settings.endpoint or None, token or None)
        _, plan = plan_merge(
            MergeRequest(source_of(job.request), settings_of(job.request), gate=None), hub=hub
        )
        chosen = choose_flavour(
            hardware(self._hub), "auto", memory=plan.memory_bytes, disk=plan.disk_bytes + plan.bytes_read
        )
        watch.line(f"hardware {chosen.name}, {price_text(estimate(chosen, plan.bytes_written))}")
        return chosen.name

    def _read_log(
        self, job_id: str, namespace: str, watch: Watch, result: list[dict[str, Any]], *, follow: bool = True
    ) -> None:
        try:
            for line in job_log(self._hub, job_id, namespace=namespace, follow=follow):
                if line.startswith(RESULT):
                    with contextlib.suppress(ValueError):
                        result.append(json.loads(line)["result"])
                elif follow:
                    watch.line(line)
        except MergeAdapterError as error:  # the state tells how it ended; only lines are lost
            watch.line(error.message)

    def _outcome(self, remote: RemoteJob, result: list[dict[str, Any]], token: str, watch: Watch) -> Outcome:
        if not result:
            message = f"job {remote.id} ended as {remote.stage} without a result: {remote.message}".rstrip(
                ": "
            )
            return Outcome(JobState.FAILED, int(ExitCode.BUG), message, "Its log may say why.")
        document = result[-1]
        code = document.get("exit_code")
        outcome = outcome_of(code if isinstance(code, int) else int(ExitCode.BUG), document)
        if outcome.publication is not None:
            self._fetch_report(outcome, token, watch)
        return outcome

    def _fetch_report(self, outcome: Outcome, token: str, watch: Watch) -> None:
        """The whole report, from where it was published."""
        assert outcome.publication is not None
        try:
            hub = Hub(self._settings.endpoint or None, token or None)
            repository = hub.open(
                str(outcome.publication["repo"]), revision=str(outcome.publication["commit"])
            )
            path = min(
                (path for path in repository.files if path.split("/")[-1] == REPORT_FILE),
                key=len,
                default=None,
            )
            if path is not None:
                keep_report(watch.folder, json.loads(repository.read(path)))
        except (MergeAdapterError, KeyError, ValueError) as error:
            watch.line(f"the report was not fetched: {error}")


def _gone(job_id: str) -> Outcome:
    """Somebody deleted the job, or it was lost. What it did is found when it is done again."""
    message = f"job {job_id} is no longer on Hugging Face Jobs, and did not tell how it ended"
    return Outcome(JobState.FAILED, int(ExitCode.REMOTE), message, "It is started afresh.")
