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
from merge_adapter.bot.logs import log, log_to
from merge_adapter.bot.queue import Hold, Lease, Queue, RetryRule
from merge_adapter.bot.rows import find_job
from merge_adapter.bot.runners.base import Interrupted, Runner, Watch
from merge_adapter.bot.settings import BotSettings, RunnerKind, load_settings
from merge_adapter.bot.store import Store
from merge_adapter.bot.vault import Vault, open_vault
from merge_adapter.errors import ExitCode, MergeAdapterError, RemoteError
from merge_adapter.hub.errors import RefusedError

_POLL = 0.5
"""Seconds between two looks into an empty queue."""
_SHOW = 1.0
"""Seconds between two updates of what a running job does."""


def runner_for(settings: BotSettings) -> Runner:
    """The runner that the settings name. Raises InputError when its own settings are missing."""
    if settings.runner is RunnerKind.GITHUB:
        from merge_adapter.bot.runners.github import GitHubRunner

        return GitHubRunner(settings)
    if settings.runner is RunnerKind.HF_JOBS:
        from merge_adapter.bot.runners.hf_jobs import HfJobsRunner

        return HfJobsRunner(settings)
    from merge_adapter.bot.runners.local import LocalRunner

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
            except MergeAdapterError as error:
                log("claim-failed", error=error.message)
                self._stopped.wait(_POLL * 10)
                continue
            if lease is None:
                self._stopped.wait(_POLL)
                continue
            self._carry_out(lease, slot)

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
            outcome, hold = self._run(lease, slot)
            told = self._store(lease, outcome, hold)
        except MergeAdapterError as error:  # the store failed: the lease runs out, and the job comes back
            log("job-lost", **facts, error=error.message)
            return
        log("job-ended", **facts, outcome=told, seconds=round(time.monotonic() - begun, 2))

    def _run(self, lease: Lease, slot: int) -> tuple[Outcome | Interrupted, Hold]:
        """Run the job under a lease that is renewed; how it ended, and what became of the lease."""
        try:
            token = self._token(lease)
        except MergeAdapterError as error:
            return Outcome(JobState.REFUSED, int(error.exit_code), error.message, error.hint), Hold.HELD
        watch = Watch(self._settings.job_folder(lease.job.id), token)
        heartbeat = _Heartbeat(self._queue, lease, watch, self._stopped)
        try:
            outcome = self._runner.run(lease.job, token, watch, slot=slot)
        except MergeAdapterError as error:
            outcome = Outcome(JobState.FAILED, int(error.exit_code), error.message, error.hint)
            if not isinstance(error, RemoteError) or isinstance(error, RefusedError):
                outcome = dataclasses.replace(outcome, state=JobState.REFUSED)
        except Exception as error:  # noqa: BLE001  # one job's bug must not end the worker
            outcome = Outcome(JobState.FAILED, int(ExitCode.BUG), f"{type(error).__name__} in the runner")
            log("runner-bug", job=lease.job.id, error=repr(error))
        finally:
            heartbeat.stop()
            if isinstance(outcome, Outcome) and outcome.message:
                watch.line(f"{outcome.state.value}: {outcome.message} {outcome.hint}".rstrip())
            watch.close()
        return outcome, heartbeat.hold

    def _token(self, lease: Lease) -> str:
        sealed = lease.job.request.token
        return self._settings.token if sealed is None else self._vault.open(sealed)

    def _store(self, lease: Lease, outcome: Outcome | Interrupted, hold: Hold) -> str:
        """Store how an attempt ended; the word for it in the log."""
        if hold is Hold.LOST:
            return "lease lost"
        if isinstance(outcome, Interrupted):
            if hold is Hold.CANCELLED:
                job = find_job(self._queue.store, lease.job.id)
                reason = (job.cancel if job else None) or "cancelled"
                self._queue.finish(lease, Outcome(JobState.CANCELLED, message=reason))
                return "cancelled"
            self._queue.release(lease)
            return "handed back"
        killed = outcome.exit_code is not None and outcome.exit_code < 0
        lost = outcome.exit_code == ExitCode.REMOTE and outcome.state is JobState.FAILED
        if lost or killed:
            self._queue.retry(lease, outcome)
            return "to be tried again"
        self._queue.finish(lease, outcome)
        return outcome.state.value


class _Heartbeat:
    """Renews a lease, tells what the job does, and stops it when the lease or the worker ends."""

    def __init__(self, queue: Queue, lease: Lease, watch: Watch, stopped: threading.Event) -> None:
        self._queue, self._lease, self._watch, self._stopped = queue, lease, watch, stopped
        self._over = threading.Event()
        self.hold = Hold.HELD
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        self._thread.join()

    def _beat(self) -> None:
        every = self._queue.lease_seconds / 4
        held_at = told_at = time.monotonic()
        told: Stage | None = None
        told_remote: str | None = None
        while not self._over.wait(min(0.2, every)):
            now = time.monotonic()
            stage, remote = self._watch.stage, self._watch.remote
            if self._stopped.is_set():
                self._watch.stop.set()
            news = remote != told_remote or (stage != told and now - told_at >= _SHOW)
            if not news and now - held_at < every:
                continue
            told, told_remote, told_at = stage, remote, now
            try:
                hold = self._queue.hold(self._lease, stage, remote=remote)
                held_at = now
            except MergeAdapterError as error:
                log("heartbeat-failed", job=self._lease.job.id, error=error.message)
                hold = Hold.LOST if now - held_at > self._queue.lease_seconds else Hold.HELD
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
    log_to(settings.log_file)
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_watch_parent, args=(stop,), daemon=True).start()
    with Store(settings.database) as store:
        worker = Worker(queue_for(store, settings), runner_for(settings), settings, open_vault(settings))
        worker.start()
        log("worker-ready", pid=os.getpid(), slots=settings.workers, runner=settings.runner.value)
        stop.wait()
        worker.stop()
    log("worker-stopped", pid=os.getpid())
    return 0


def _watch_parent(stop: threading.Event) -> None:
    sys.stdin.read()
    stop.set()


if __name__ == "__main__":
    sys.exit(main())
