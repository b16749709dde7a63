"""The queue: jobs leased to workers, retried, cancelled, finished. How they come in: `submission`.

A lease is held by renewing it. Every change by a worker names the owner and the attempt it leased, so that a
worker that was paused for longer than its lease can do no harm: the job belongs to somebody else by then.
"""

# ruff: noqa: S608  # the SQL is put together from constants of this file alone; values go through question marks
from __future__ import annotations

import json
import random
import sqlite3
from concurrent.futures import Future
from dataclasses import dataclass, replace
from enum import StrEnum

from merge_adapter.bot.jobs import Job, JobRequest, JobState, Outcome, Stage
from merge_adapter.bot.rows import job_from_row
from merge_adapter.bot.store import Store
from merge_adapter.bot.submission import Submission, cancel_within, submit_within
from merge_adapter.errors import ExitCode


class Hold(StrEnum):
    """What a worker learns when it renews its lease."""

    HELD = "held"
    CANCELLED = "cancelled"
    """Still its own, but it is to stop."""
    LOST = "lost"
    """Somebody else has the job now, or nobody needs it: stop and write nothing."""


@dataclass(frozen=True)
class Lease:
    """A job in the hands of one worker."""

    job: Job
    owner: str
    attempt: int


@dataclass(frozen=True)
class RetryRule:
    """When a failed job is tried again."""

    attempts: int = 8
    """Failures after which it stays failed."""
    first_wait: float = 15.0
    """Seconds before the second attempt; doubled each time, plus up to a quarter at random."""
    longest_wait: float = 3600.0

    def wait(self, failures: int) -> float:
        """Seconds to wait after failure number `failures`, counted from 1."""
        wait = min(self.longest_wait, self.first_wait * 2.0 ** min(failures - 1, 30))
        return float(wait * (1 + random.random() / 4))  # noqa: S311  # spreads retries, guards nothing


class Queue:
    """Jobs in `store`. Every method may be called from any thread, and by several processes."""

    def __init__(self, store: Store, *, lease_seconds: float = 60.0, retry: RetryRule | None = None) -> None:
        self.store = store
        self.lease_seconds = lease_seconds
        self.retry_rule = retry or RetryRule()

    # ---------------------------------------------------------------------------------- asking for work

    def submit(self, request: JobRequest, *, limit: int | None = None) -> Submission:
        """Store a job; see `submit_within`."""
        return self.store.write(lambda db: submit_within(db, request, self.store.clock(), limit=limit))

    def submit_soon(self, request: JobRequest) -> Future[Submission]:
        """`submit` for callers that submit many: the future is done when the job is on the disk."""
        return self.store.submit(lambda db: submit_within(db, request, self.store.clock()))

    def cancel(self, job_id: str, *, reason: str) -> bool:
        """Cancel an open job: at once while it waits, at its worker's next heartbeat while it runs.

        One that runs elsewhere with no worker at it is given to one, which stops it there. False when it had ended.
        """
        return self.store.write(
            lambda db: bool(cancel_within(db, "id = ?", (job_id,), reason, self.store.clock()))
        )

    # -------------------------------------------------------------------------------------- doing work

    def claim(self, owner: str) -> Lease | None:
        """The next job that may run, leased to `owner` for `lease_seconds`; None when there is none.

        A job whose lease ran out counts as waiting; its worker's death counts as a failure. Never two jobs of one
        target at once, and one that runs elsewhere counts there as long as nobody saw it end.
        """

        def work(db: sqlite3.Connection) -> sqlite3.Row | None:
            now = self.store.clock()
            self._give_up_on_the_dead(db, now)
            row: sqlite3.Row | None = db.execute(
                """
                UPDATE jobs SET state = 'running', owner = :owner, attempt = attempt + 1, lease_until = :until,
                    failures = failures + (state = 'running'), started = coalesce(started, :now),
                    stage = NULL, stage_done = NULL, stage_total = NULL, message = NULL, hint = NULL
                WHERE id = (
                    SELECT id FROM jobs AS next
                    WHERE ((state = 'queued' AND not_before <= :now) OR (state = 'running' AND lease_until < :now))
                      AND NOT EXISTS (
                        SELECT 1 FROM jobs AS other WHERE other.target = next.target AND other.id <> next.id
                          AND other.state IN ('queued', 'running')
                          AND (other.remote IS NOT NULL OR (other.state = 'running' AND other.lease_until >= :now)))
                    ORDER BY priority, created LIMIT 1)
                RETURNING *
                """,
                {"owner": owner, "until": now + self.lease_seconds, "now": now},
            ).fetchone()
            return row

        row = self.store.write(work)
        if row is None:
            return None
        job = job_from_row(row)
        return Lease(job, owner, job.attempt)

    def hold(self, lease: Lease, stage: Stage | None = None, *, remote: str | None = None) -> Hold:
        """Renew the lease, and tell where the job stands."""
        shown = stage or Stage("", 0, None, "")

        def work(db: sqlite3.Connection) -> Hold:
            row = db.execute(
                f"""
                UPDATE jobs SET lease_until = ?, remote = coalesce(?, remote), stage = coalesce(nullif(?, ''), stage),
                    stage_done = ?, stage_total = ?, stage_unit = ?
                WHERE {_FENCE} RETURNING cancel
                """,
                (
                    self.store.clock() + self.lease_seconds,
                    remote,
                    shown.label,
                    shown.done,
                    shown.total,
                    shown.unit,
                    *_fence(lease),
                ),
            ).fetchone()
            if row is None:
                return Hold.LOST
            return Hold.HELD if row["cancel"] is None else Hold.CANCELLED

        return self.store.write(work)

    def finish(self, lease: Lease, outcome: Outcome) -> Hold:
        """Store how the job ended, and forget the token it ran with. LOST: nothing was stored."""
        return self.store.write(lambda db: _finish(db, lease, outcome, self.store.clock()))

    def retry(self, lease: Lease, outcome: Outcome, *, goes_on: bool = False) -> Hold:
        """The attempt failed in a way that may pass: wait and try again, or end with `outcome` after too many.

        `goes_on`: what runs elsewhere may still run there, only it could not be asked; the next attempt follows it.
        Otherwise the next one starts afresh, as another round. A job that was cancelled meanwhile ends.
        """
        failures = lease.job.failures + 1
        if failures >= self.retry_rule.attempts:
            return self.finish(
                lease, replace(outcome, message=f"{outcome.message} (tried {failures} times)".strip())
            )

        def work(db: sqlite3.Connection) -> Hold:
            now = self.store.clock()
            if (ended := _end_cancelled(db, lease, now, remote_ended=not goes_on)) is not None:
                return ended
            row = db.execute(
                f"""
                UPDATE jobs SET state = 'queued', owner = NULL, lease_until = NULL, failures = ?, not_before = ?,
                    remote = CASE WHEN ? THEN remote END, round = round + ?, exit_code = ?, message = ?, hint = ?
                WHERE {_FENCE} RETURNING id
                """,
                (
                    failures,
                    now + self.retry_rule.wait(failures),
                    goes_on,
                    not goes_on,
                    outcome.exit_code,
                    outcome.message,
                    outcome.hint,
                    *_fence(lease),
                ),
            ).fetchone()
            return Hold.LOST if row is None else Hold.HELD

        return self.store.write(work)

    def release(self, lease: Lease) -> Hold:
        """Hand the job back unharmed, for a worker that has to stop: the next one may take it at once.

        A job that was cancelled meanwhile ends, unless it runs elsewhere and has to be stopped there.
        """

        def work(db: sqlite3.Connection) -> Hold:
            now = self.store.clock()
            if (ended := _end_cancelled(db, lease, now, remote_ended=False)) is not None:
                return ended
            row = db.execute(
                f"UPDATE jobs SET state = 'queued', owner = NULL, lease_until = NULL, not_before = ? "
                f"WHERE {_FENCE} RETURNING id",
                (now, *_fence(lease)),
            ).fetchone()
            return Hold.LOST if row is None else Hold.HELD

        return self.store.write(work)

    def _give_up_on_the_dead(self, db: sqlite3.Connection, now: float) -> None:
        """Jobs whose workers keep dying are ended: most likely it is the job that kills them. So are cancelled
        ones whose worker is gone, unless they run elsewhere: the next worker stops them there."""
        db.execute(
            """
            UPDATE jobs SET state = 'cancelled', finished = ?, owner = NULL, lease_until = NULL, message = cancel,
                token = NULL
            WHERE state = 'running' AND lease_until < ? AND cancel IS NOT NULL AND remote IS NULL
            """,
            (now, now),
        )
        db.execute(
            """
            UPDATE jobs SET state = 'failed', finished = ?, owner = NULL, lease_until = NULL, exit_code = ?,
                failures = failures + 1, message = 'the worker died during this job, ' || (failures + 1) || ' times',
                hint = 'Look at the end of its log; most often the machine ran out of memory.',
                token = NULL
            WHERE state = 'running' AND lease_until < ? AND failures + 1 >= ?
            """,
            (now, int(ExitCode.BUG), now, self.retry_rule.attempts),
        )

    # ----------------------------------------------------------------------------------------- answers

    def unanswered(self) -> list[Job]:
        """Ended jobs whose asker waits in a discussion."""
        rows = self.store.read(
            "SELECT * FROM jobs WHERE reply IS NOT NULL AND replied = 0 AND finished IS NOT NULL ORDER BY finished"
        )
        return [job_from_row(row) for row in rows]

    def answered(self, job_id: str) -> None:
        """The asker has been told."""
        self.store.write(
            lambda db: db.execute("UPDATE jobs SET replied = 1 WHERE id = ?", (job_id,)) and None
        )


_FENCE = "id = ? AND owner = ? AND attempt = ? AND state = 'running'"


def _fence(lease: Lease) -> tuple[str, str, int]:
    return lease.job.id, lease.owner, lease.attempt


def _end_cancelled(db: sqlite3.Connection, lease: Lease, now: float, *, remote_ended: bool) -> Hold | None:
    """End a job that was cancelled while its worker did not know yet; None for one that goes on."""
    row = db.execute(f"SELECT cancel, remote FROM jobs WHERE {_FENCE}", _fence(lease)).fetchone()
    if row is None:
        return Hold.LOST
    if row["cancel"] is None or not (remote_ended or row["remote"] is None):
        return None
    return _finish(db, lease, Outcome(JobState.CANCELLED, message=row["cancel"]), now)


def _finish(db: sqlite3.Connection, lease: Lease, outcome: Outcome, now: float) -> Hold:
    row = db.execute(
        f"""
        UPDATE jobs SET state = ?, finished = ?, owner = NULL, lease_until = NULL, exit_code = ?, message = ?, hint = ?,
            verdict = ?, publication = ?, token = NULL
        WHERE {_FENCE} RETURNING id
        """,
        (
            outcome.state.value,
            now,
            outcome.exit_code,
            outcome.message,
            outcome.hint,
            outcome.verdict,
            json.dumps(dict(outcome.publication)) if outcome.publication is not None else None,
            *_fence(lease),
        ),
    ).fetchone()
    return Hold.LOST if row is None else Hold.HELD
