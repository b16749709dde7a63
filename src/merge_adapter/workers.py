"""Worker threads that share queues of jobs, stop together, and leave nothing running."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from threading import Event, Lock, Thread

Job = Callable[[], None]


class Stopped(BaseException):
    """Raised inside a job when another job failed or the user interrupted; never seen outside `run_jobs`.

    A BaseException, so that no handler for errors swallows it.
    """


class Stop:
    """What jobs look at, often, to learn that they should end."""

    def __init__(self) -> None:
        self._event = Event()

    def set(self) -> None:
        self._event.set()

    def check(self) -> None:
        """Raise Stopped when the work is to end."""
        if self._event.is_set():
            raise Stopped


class Queues:
    """Jobs in several ordered queues, one per output file.

    A worker stays with its queue while that has jobs, then opens the next untouched one, then helps where
    most is left. So files are written front to back, few at a time, and a single file still keeps all busy.
    """

    def __init__(self, queues: Iterable[Iterable[Job]]) -> None:
        self._queues = [deque(queue) for queue in queues]
        self._untouched = deque(range(len(self._queues)))
        self._lock = Lock()

    def take(self, current: int | None) -> tuple[int, Job] | None:
        """The next job for a worker whose last queue was `current`, and its queue; None when all are taken."""
        with self._lock:
            if current is None or not self._queues[current]:
                current = self._next()
            return None if current is None else (current, self._queues[current].popleft())

    def _next(self) -> int | None:
        while self._untouched:
            index = self._untouched.popleft()
            if self._queues[index]:
                return index
        longest = max(range(len(self._queues)), key=lambda index: len(self._queues[index]), default=None)
        return longest if longest is not None and self._queues[longest] else None


class _Roll:
    """Who is at work, and whether anybody may still begin.

    A plain lock, which an interrupt cannot leave taken as it can that of a Condition or an Event; and not the threads'
    own word, which can neither be asked nor waited for while a thread that is already running comes to its first line.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._at_work = 0
        self._closed = False

    def enter(self) -> bool:
        """Begin; False when it is too late to."""
        with self._lock:
            self._at_work += not self._closed
            return not self._closed

    def leave(self) -> None:
        with self._lock:
            self._at_work -= 1

    def close(self) -> None:
        """Let nobody begin any more."""
        with self._lock:
            self._closed = True

    @property
    def empty(self) -> bool:
        with self._lock:
            return not self._at_work


def run_jobs(queues: Queues, *, threads: int, stop: Stop) -> None:
    """Run every job; returns when all are done.

    When a job raises, or the caller's thread is interrupted, all workers are told to stop, are waited for,
    and the first error is raised.
    """
    errors: list[BaseException] = []
    lock = Lock()
    roll = _Roll()

    def work() -> None:
        current: int | None = None
        if not roll.enter():
            return
        try:
            while True:
                stop.check()
                taken = queues.take(current)
                if taken is None:
                    return
                current, job = taken
                job()
        except Stopped:
            return
        except BaseException as error:  # noqa: BLE001 - carried to the caller's thread and raised there
            with lock:
                errors.append(error)
            stop.set()
        finally:
            roll.leave()

    workers = [Thread(target=work, name=f"merge-{number}", daemon=True) for number in range(threads)]
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            while worker.is_alive():
                worker.join(timeout=0.2)  # short, so that Ctrl-C reaches this thread
    except BaseException:
        stop.set()
        roll.close()
        while not roll.empty:
            time.sleep(0.002)
        raise
    if errors:
        raise errors[0]
