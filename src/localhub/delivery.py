"""The thread that sends webhooks: in order for each webhook, all webhooks side by side."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from localhub.webhooks import Webhooks, post

_PARALLEL = 16
_LONGEST_WAIT = 1.0
"""Seconds after which the queue is looked at even when nothing woke the thread."""

StartJob = Callable[[str, dict[str, Any], dict[str, str]], None]
"""Starts the job of a webhook: (user, its spec, environment to add)."""


class Courier:
    """Delivers what `Webhooks` has queued until it is stopped."""

    def __init__(self, webhooks: Webhooks, start_job: StartJob) -> None:
        self._webhooks = webhooks
        self._start_job = start_job
        self._stopping = threading.Event()
        self._busy: set[str] = set()
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(_PARALLEL, thread_name_prefix="webhook")
        self._thread = threading.Thread(target=self._run, name="webhooks", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Begin no more attempts; what is left goes out after the next start.

        An attempt that is under way is not waited for. If the process ends before it does, it is made again.
        """
        self._stopping.set()
        self._webhooks.wake.set()
        self._thread.join()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._webhooks.wake.clear()
            due, pause = self._take()
            for row in due:
                self._pool.submit(self._deliver, row)
            self._webhooks.wake.wait(pause)

    def _take(self) -> tuple[list[sqlite3.Row], float]:
        """The due deliveries of idle webhooks, which are busy from now on, and seconds until the next is due.

        One look under the lock: a delivery that is settled between the query and the check would still be
        in the answer, its webhook idle again, and it would be sent twice.
        """
        with self._lock:
            idle = [row for row in self._webhooks.next_of_each() if row["webhook"] not in self._busy]
            now = time.time()
            due = [row for row in idle if row["due"] <= now]
            self._busy.update(row["webhook"] for row in due)
        later = [row["due"] - now for row in idle if row["due"] > now]
        return due, min([_LONGEST_WAIT, *later])

    def _deliver(self, row: sqlite3.Row) -> None:
        try:
            try:
                status, error = self._attempt(row)
            except Exception as failure:  # noqa: BLE001 - whatever it was: tried again, not at once and for ever
                status, error = None, f"{type(failure).__name__}: {failure}"
            self._webhooks.settle(row, status, error)
        finally:
            with self._lock:
                self._busy.discard(row["webhook"])
            self._webhooks.wake.set()

    def _attempt(self, row: sqlite3.Row) -> tuple[int | None, str | None]:
        if row["job"] is None:
            return post(row["url"], row["payload"], row["secret"])
        self._start_job(*self._webhooks.job_of(row))
        return None, None
