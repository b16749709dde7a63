"""Catching up: jobs for the adapters that a survey found wanting, carried out here and told in one summary.

The jobs go through the bot's own queue, so a run that is stopped goes on where it was, and a bot that serves from
the same data folder takes its part of them.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from merge_adapter.bot.jobs import OPEN_STATES, Job, JobState
from merge_adapter.bot.rows import find_job
from merge_adapter.bot.settings import BotSettings
from merge_adapter.bot.store import Store
from merge_adapter.bot.submission import Duplicate, Submitted
from merge_adapter.bot.survey import Candidate, Standing
from merge_adapter.bot.vault import open_vault
from merge_adapter.bot.worker import Worker, queue_for, runner_for

_LOOK = 0.3
"""Seconds between two looks at the jobs."""


@dataclass(frozen=True)
class Summary:
    """How a backfill ended."""

    jobs: tuple[Job, ...]
    """One per adapter that had to be done, in the order of the survey."""
    interrupted: bool

    @property
    def counts(self) -> Counter[JobState]:
        return Counter(job.state for job in self.jobs)

    @property
    def complete(self) -> bool:
        """Whether every adapter now has an up-to-date merge that passed."""
        return all(job.state is JobState.DONE for job in self.jobs)


def carry_out(
    candidates: Iterable[Candidate],
    settings: BotSettings,
    *,
    parallel: int,
    stop: threading.Event,
    told: Callable[[Job], None] = lambda _: None,
) -> Summary:
    """Queue a job for each candidate that is to do, and work them off, `parallel` at a time, until all have ended.

    `stop` hands the running ones back; the next call goes on with them. `told` hears of each job that ended.
    """
    todo = [one for one in candidates if one.standing is Standing.TO_DO]
    with Store(settings.database) as store:
        ids = _submit(todo, store, settings)
        worker = Worker(
            queue_for(store, settings),
            runner_for(settings),
            replace(settings, workers=parallel),
            open_vault(settings),
        )
        worker.start()
        try:
            _wait(ids, store, stop, told)
        finally:
            worker.stop()
        jobs = tuple(job for job in (find_job(store, one) for one in ids) if job is not None)
    return Summary(jobs, interrupted=any(job.state in OPEN_STATES for job in jobs))


def _submit(todo: list[Candidate], store: Store, settings: BotSettings) -> list[str]:
    """Ids of the jobs, those that were there already among them."""
    queue = queue_for(store, settings)
    names = "\n".join(f"{one.repo_id}@{one.revision} {one.subfolder}" for one in todo)
    batch = hashlib.sha256(names.encode()).hexdigest()[:12]
    futures = [queue.submit_soon(one.request(batch=batch)) for one in todo]
    submissions = [future.result() for future in futures]
    return [one.job_id for one in submissions if isinstance(one, (Submitted, Duplicate))]


def _wait(ids: list[str], store: Store, stop: threading.Event, told: Callable[[Job], None]) -> None:
    waiting = list(ids)
    while waiting and not stop.is_set():
        time.sleep(_LOOK)
        for job_id in list(waiting):
            job = find_job(store, job_id)
            if job is None or not job.open:
                waiting.remove(job_id)
                if job is not None:
                    told(job)
