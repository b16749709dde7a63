"""Workers: take a job, hold its lease while a runner carries it out, store how it ended.

`python -m merge_adapter.bot.worker` is a process with `workers` slots. It reads its settings, secrets among them,
from the first line of its standard input, which stays open as long as the server lives: when it closes, the
worker hands its leases back and ends.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from merge_adapter.bot.jobs import JobState, Outcome, Stage
from merge_adapter.bot.logs import log, logging_to
from merge_adapter.bot.queue import Hold, Lease, Queue, RetryRule
from merge_adapter.bot.rows import find_job
from merge_adapter.bot.runners.base import Interrupted, Runner, Watch
from merge_adapter.bot.runners.local import LocalRunner, remove_left_behind
from merge_adapter.bot.settings import BotSettings, RunnerKind, load_settings
from merge_adapter.bot.store import Store
from merge_adapter.bot.vault import Vault, open_vault
from merge_adapter.errors import ExitCode, MergeAdapterError, RemoteError, StorageError
from merge_adapter.hub.errors import RefusedError

_POLL = 0.5
"""Seconds between two looks into an empty queue."""
_SHOW = 1.0
"""Seconds between two updates of what a running job does."""
_HOLD = 5.0
"""Seconds between two renewals of a lease at most: a job that was cancelled learns it then."""


@dataclasses.dataclass(frozen=True)
class Attempt:
    """How one attempt at a job ended."""

    outcome: Outcome | Interrupted
    hold: Hold
    """What became of the lease."""
    again: bool = False
    """Whether it failed in a way that may pass: the network, a full disk, a killed process."""
    goes_on: bool = False
    """Whether what runs elsewhere may still run: the runner could not tell."""


def runner_for(settings: BotSettings) -> Runner:
    """The runner that the settings name. Raises InputError when its own settings are missing."""
    if settings.runner is RunnerKind.GITHUB:
        from merge_adapter.bot.runners.github import GitHubRunner

        return GitHubRunner(settings)
    if settings.runner is RunnerKind.HF_JOBS:
        from merge_adapter.bot.runners.hf_jobs import HfJobsRunner

        return HfJobsRunner(settings)
    return LocalRunner(settings)


def queue_for(store: Store, settings: BotSettings) -> Queue:
    """The queue in `store` with the lease and the retries of the settings."""
    rule = RetryRule(settings.attempts, settings.first_wait, settings.longest_wait)
    return Queue(store, lease_seconds=settings.lease_seconds, retry=rule)


class Worker:
    """Slots that take jobs until `stop`, each one at a time."""

    def __init__(self, queue: Queue, runner: Runner, settings: BotSettings, vault: Vault) -> None:
        self._queue = queue
        self._runner = runner
        self._settings = settings
        self._vault = vault
        self._stopped = threading.Event()
        self._name = f"{os.uname().nodename}:{os.getpid()}"
        self._slots = [
            threading.Thread(target=self._take_jobs, args=(slot,), name=f"slot-{slot}", daemon=True)
            for slot in range(settings.workers)
        ]

    def start(self) -> None:
        for slot in self._slots:
            slot.start()

    def stop(self) -> None:
        """Stop the running jobs, hand their leases back, and wait until that is done."""
        self._stopped.set()
        for slot in self._slots:
            if slot.is_alive():
                slot.join()

    def _take_jobs(self, slot: int) -> None:
        while not self._stopped.is_set():
            try:
                lease = self._queue.claim(f"{self._name}:{slot}")
                if lease is not None:
                    self._carry_out(lease, slot)
            except Exception as error:  # noqa: BLE001  # a slot that ended would leave its jobs waiting, unseen
                log("slot-failed", slot=slot, error=getattr(error, "message", repr(error)))
                self._stopped.wait(_POLL * 10)
                continue
            if lease is None:
                self._stopped.wait(_POLL)

    def _carry_out(self, lease: Lease, slot: int) -> None:
        request = lease.job.request
        facts = {"job": lease.job.id, "attempt": lease.attempt}
        log(
            "job-started",
            **facts,
            adapter=request.adapter,
            revision=request.revision,
            kind=request.kind.value,
        )
        begun = time.monotonic()
        try:
            told = self._store(lease, self._run(lease, slot))
        except MergeAdapterError as error:  # the store failed: the lease runs out, and the job comes back
            log("job-lost", **facts, error=error.message)
            return
        log("job-ended", **facts, outcome=told, seconds=round(time.monotonic() - begun, 2))

    def _run(self, lease: Lease, slot: int) -> Attempt:
        """Run the job under a lease that is renewed."""
        try:
            token = self._token(lease)
            watch = Watch(self._settings.job_folder(lease.job.id), token)
        except MergeAdapterError as error:
            return Attempt(_refusal(error), Hold.HELD)
        except OSError as error:
            return Attempt(_no_room(error), Hold.HELD, again=True, goes_on=True)
        if lease.job.cancel is not None:  # it was cancelled while it ran elsewhere: its runner stops it there
            watch.cancelled.set()
            watch.stop.set()
        heartbeat = _Heartbeat(self._queue, lease, watch, self._stopped)
        try:
            attempt = self._attempt(lease, token, watch, slot)
        finally:
            heartbeat.stop()
            watch.close()
        return dataclasses.replace(attempt, hold=heartbeat.hold)

    def _attempt(self, lease: Lease, token: str, watch: Watch, slot: int) -> Attempt:
        """What the runner says, or raises. A refusal is final; the network's faults are not."""
        goes_on = True
        again = False
        try:
            outcome = self._runner.run(lease.job, token, watch, slot=slot)
            goes_on = isinstance(outcome, Interrupted)
            again = isinstance(outcome, Outcome) and _may_pass(outcome)
        except RemoteError as error:
            outcome = _refusal(error)
            again = not isinstance(error, RefusedError)
        except MergeAdapterError as error:
            outcome = _refusal(error)
            again = isinstance(error, StorageError)
        except OSError as error:
            outcome, again = _no_room(error), True
        except Exception as error:  # noqa: BLE001  # one job's bug must not end the worker
            outcome = Outcome(JobState.FAILED, int(ExitCode.BUG), f"{type(error).__name__} in the runner")
            log("runner-bug", job=lease.job.id, error=repr(error))
        if again and isinstance(outcome, Outcome):
            outcome = dataclasses.replace(outcome, state=JobState.FAILED)
        if isinstance(outcome, Outcome) and outcome.message:
            said = (f"{outcome.state.value}: {outcome.message}", outcome.hint)
            watch.line("\n  ".join(filter(None, said)))
        return Attempt(outcome, Hold.HELD, again=again, goes_on=goes_on)

    def _token(self, lease: Lease) -> str:
        sealed = lease.job.request.token
        return self._settings.token if sealed is None else self._vault.open(sealed)

    def _store(self, lease: Lease, attempt: Attempt) -> str:
        """Store how an attempt ended; the word for it in the log."""
        outcome = attempt.outcome
        if attempt.hold is Hold.LOST:
            return "lease lost"
        if isinstance(outcome, Interrupted):
            if attempt.hold is Hold.CANCELLED:
                job = find_job(self._queue.store, lease.job.id)
                reason = (job.cancel if job else None) or "cancelled"
                self._queue.finish(lease, Outcome(JobState.CANCELLED, message=reason))
                return "cancelled"
            self._queue.release(lease)
            return "handed back"
        if attempt.again:
            self._queue.retry(lease, outcome, goes_on=attempt.goes_on)
            return "to be tried again"
        self._queue.finish(lease, outcome)
        return outcome.state.value


def _refusal(error: MergeAdapterError) -> Outcome:
    return Outcome(JobState.REFUSED, int(error.exit_code), error.message, error.hint)


def _no_room(error: OSError) -> Outcome:
    """This machine failed, not the job: most often its disk is full."""
    return Outcome(
        JobState.FAILED,
        int(ExitCode.INPUT),
        f"the bot's machine failed: {error.strerror or error} ({error.filename or 'no file'})",
        "Check the room on its disk; the job is tried again.",
    )


def _may_pass(outcome: Outcome) -> bool:
    """Whether the same job may end otherwise the next time. A verdict and a refusal never do."""
    killed = outcome.exit_code is not None and outcome.exit_code < 0
    remote = outcome.exit_code == ExitCode.REMOTE
    full = outcome.error_type == StorageError.__name__
    return outcome.state is JobState.FAILED and (killed or remote or full)


class _Heartbeat:
    """Renews a lease, tells what the job does, and stops it when the lease or the worker ends."""

    def __init__(self, queue: Queue, lease: Lease, watch: Watch, stopped: threading.Event) -> None:
        self._queue, self._lease, self._watch, self._stopped = queue, lease, watch, stopped
        self._over = threading.Event()
        self.hold = Hold.HELD if lease.job.cancel is None else Hold.CANCELLED
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        self._thread.join()

    def _beat(self) -> None:
        every = min(self._queue.lease_seconds / 4, _HOLD)
        held_at = told_at = time.monotonic()
        told: Stage | None = None
        told_remote: str | None = None
        over = False
        while not over:
            over = self._over.wait(min(0.2, every))
            now = time.monotonic()
            stage, remote = self._watch.stage, self._watch.remote
            if self._stopped.is_set():
                self._watch.stop.set()
            # where it runs is stored even if the runner has given up by now: the next attempt looks there
            news = remote != told_remote or (stage != told and now - told_at >= _SHOW and not over)
            if not news and (over or now - held_at < every):
                continue
            told, told_remote, told_at = stage, remote, now
            try:
                hold = self._queue.hold(self._lease, stage, remote=remote)
                held_at = now
            except MergeAdapterError as error:
                log("heartbeat-failed", job=self._lease.job.id, error=error.message)
                told_remote = None  # not stored yet
                hold = Hold.LOST if now - held_at > self._queue.lease_seconds else self.hold
            if hold is not Hold.HELD:
                self.hold = hold
                if hold is Hold.CANCELLED:
                    self._watch.cancelled.set()
                self._watch.stop.set()


def settings_to_line(settings: BotSettings) -> str:
    """One line that `settings_from_line` reads back; it holds secrets and goes through pipes only."""
    return json.dumps(dataclasses.asdict(settings), default=str)


def settings_from_line(line: str) -> BotSettings:
    """The settings in a line of `settings_to_line`."""
    return load_settings(None, {}, **_fields(json.loads(line)))


def _fields(parsed: dict[str, Any]) -> dict[str, Any]:
    convert: dict[str, Callable[[Any], Any]] = {"data": Path, "runner": RunnerKind}
    return {
        name: convert[name](value) if name in convert else tuple(value) if isinstance(value, list) else value
        for name, value in parsed.items()
    }


def main() -> int:
    """Work until standard input closes or SIGTERM comes."""
    line = sys.stdin.readline()
    if not line:
        return 0
    settings = settings_from_line(line)
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_watch_parent, args=(stop,), daemon=True).start()
    with logging_to(settings.log_file):
        try:
            _work(settings, stop)
        except MergeAdapterError as error:  # the server starts another, later
            log("worker-failed", pid=os.getpid(), error=error.message)
            return int(error.exit_code)
        log("worker-stopped", pid=os.getpid())
    return 0


def _work(settings: BotSettings, stop: threading.Event) -> None:
    with Store(settings.database) as store:
        worker = Worker(queue_for(store, settings), runner_for(settings), settings, open_vault(settings))
        remove_left_behind(lambda job_id: (job := find_job(store, job_id)) is not None and not job.open)
        worker.start()
        log("worker-ready", pid=os.getpid(), slots=settings.workers, runner=settings.runner.value)
        stop.wait()
        worker.stop()


def _watch_parent(stop: threading.Event) -> None:
    sys.stdin.read()
    stop.set()


if __name__ == "__main__":
    sys.exit(main())
