"""The demo's view of the bot: a job found, followed while it runs, and asked for again."""

from __future__ import annotations

import json
import time
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from merge_adapter.types import Progress, Task

if TYPE_CHECKING:
    from merge_adapter.bot.jobs import Job, Stage
    from merge_adapter.bot.server import RunningBot

_LOOK = 0.1
"""Seconds between two looks at a job."""


def find_push(bot: RunningBot, repo_id: str, sha: str, *, seconds: float) -> Job | None:
    """The job that the push of this commit started; None when there is none after `seconds`."""
    from merge_adapter.bot.rows import JobFilter, list_jobs

    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for job in list_jobs(bot.queue.store, JobFilter(text=repo_id)):
            if (job.request.adapter, job.request.revision) == (repo_id, sha):
                return job
        time.sleep(_LOOK)
    return None


def follow(bot: RunningBot, job_id: str, progress: Progress) -> Job:
    """The job once it has ended; its stages are shown meanwhile."""
    from merge_adapter.bot.rows import find_job

    with ExitStack() as stack:
        shown = _Shown(progress, stack)
        while True:
            job = find_job(bot.queue.store, job_id)
            assert job is not None, "jobs are kept for months"
            if not job.open:
                return job
            if job.stage is not None:
                shown.update(job.stage)
            time.sleep(_LOOK)


def report_of(bot: RunningBot, job: Job) -> dict[str, Any] | None:
    """The report that the job left; None when it left none."""
    from merge_adapter.bot.runners.base import REPORT_FILE

    path = bot.settings.job_folder(job.id) / REPORT_FILE
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


def repeat(bot: RunningBot, job: Job) -> Job:
    """The same asked for by hand, once it has ended: a push counts only once, a person may ask again."""
    from merge_adapter.bot.jobs import Source
    from merge_adapter.bot.submission import Submitted
    from merge_adapter.types import Silent

    submission = bot.queue.submit(replace(job.request, source=Source.PAGE, requested_by="demo"))
    assert isinstance(submission, Submitted), "nothing else is open"
    return follow(bot, submission.job_id, Silent())


class _Shown:
    """One stage at a time on a Progress."""

    def __init__(self, progress: Progress, stack: ExitStack) -> None:
        self._progress, self._stack = progress, stack
        self._stage: Stage | None = None
        self._task: Task | None = None

    def update(self, stage: Stage) -> None:
        if self._stage is None or stage.label != self._stage.label:
            self._stack.close()
            self._task = self._stack.enter_context(
                self._progress.task(stage.label, stage.total, unit=stage.unit or "steps")
            )
            self._stage = replace(stage, done=0)
        assert self._task is not None
        self._task.advance(max(0, stage.done - self._stage.done))
        self._stage = stage
