"""What has to be done now and then: answers in discussions, old jobs removed, sessions ended."""

from __future__ import annotations

import shutil
import sqlite3
import threading
import time
from pathlib import Path

from merge_adapter.bot.answers import ended_text, marker_of
from merge_adapter.bot.intake import is_final
from merge_adapter.bot.jobs import Job
from merge_adapter.bot.logs import log
from merge_adapter.bot.queue import Queue
from merge_adapter.bot.settings import BotSettings
from merge_adapter.errors import MergeAdapterError, RemoteError
from merge_adapter.hub import Hub
from merge_adapter.hub.conversations import say_once

_INTERVAL = 2.0
_LONGEST_WAIT = 300.0
"""Seconds between two tries at one answer while the Hub fails."""
_DAY = 86_400.0


class Housekeeping:
    """A thread that looks every few seconds."""

    def __init__(self, queue: Queue, hub: Hub, settings: BotSettings) -> None:
        self._queue, self._hub, self._settings = queue, hub, settings
        self._stopped = threading.Event()
        self._later: dict[str, tuple[float, float]] = {}
        """Job -> when to try its answer again, and the wait before that. Forgotten at a restart, which does no harm."""
        self._thread = threading.Thread(target=self._loop, name="housekeeping", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()

    def _loop(self) -> None:
        while not self._stopped.wait(_INTERVAL):
            try:
                self.answer()
                self.remove_old()
            except Exception as error:  # noqa: BLE001  # a thread that ended would leave every asker without an answer
                log("housekeeping-failed", error=getattr(error, "message", repr(error)))

    def answer(self) -> None:
        """Tell each asker in a discussion how the job ended, once. Where the Hub fails, the others need not wait."""
        now = time.monotonic()
        for job in self._queue.unanswered():
            if self._stopped.is_set():
                return
            if self._later.get(job.id, (0.0, 0.0))[0] > now:
                continue
            try:
                self._tell(job)
            except RemoteError as error:
                wait = min(_LONGEST_WAIT, 2 * self._later.get(job.id, (0.0, _INTERVAL))[1])
                self._later[job.id] = (time.monotonic() + wait, wait)
                log("answer-postponed", job=job.id, error=error.message)
                continue
            self._later.pop(job.id, None)
            self._queue.answered(job.id)

    def _tell(self, job: Job) -> None:
        """Raises RemoteError when the Hub is away."""
        assert job.request.reply is not None
        marker, reply = marker_of(job.id), job.request.reply
        text = f"{ended_text(job, self._settings.public_url)}\n\n{marker}"
        try:
            say_once(self._hub, reply.repo_id, reply.number, text, marker=marker)
        except MergeAdapterError as error:
            if isinstance(error, RemoteError) and not is_final(error):
                raise
            log("answer-lost", job=job.id, error=error.message)  # the discussion is gone or closed to us

    def remove_old(self) -> None:
        """Forget what ended more than `retention_days` ago, folders included. Dedupe keys of pushes go with it."""
        store = self._queue.store
        before = store.clock() - self._settings.retention_days * _DAY
        old = store.read("SELECT id FROM jobs WHERE finished < ? LIMIT 100", (before,))
        expired = store.read("SELECT 1 FROM sessions WHERE expires < ? LIMIT 1", (store.clock(),))
        done = store.read("SELECT 1 FROM events WHERE state = 'done' AND received < ? LIMIT 1", (before,))
        for row in old:
            shutil.rmtree(self._folder(row["id"]), ignore_errors=True)
        if not (old or expired or done):
            return

        def work(db: sqlite3.Connection) -> None:
            db.executemany("DELETE FROM jobs WHERE id = ?", [(row["id"],) for row in old])
            db.execute("DELETE FROM sessions WHERE expires < ?", (store.clock(),))
            db.execute("DELETE FROM events WHERE state = 'done' AND received < ?", (before,))

        store.write(work)

    def _folder(self, job_id: str) -> Path:
        return self._settings.job_folder(job_id)
