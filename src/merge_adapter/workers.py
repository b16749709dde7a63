"""Worker threads that share queues of jobs, stop together, and leave nothing running."""

from __future__ import annotations

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


def run_jobs(queues: Queues, *, threads: int, stop: Stop) -> None:
    """Run every job; returns when all are done.

    When a job raises, or the caller's thread is interrupted, all workers are told to stop, are waited for,
    and the first error is raised.
    """
    errors: list[BaseException] = []
    lock = Lock()

    def work() -> None:
        current: int | None = None
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

    workers = [Thread(target=work, name=f"merge-{number}", daemon=True) for number in range(threads)]
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            while worker.is_alive():
                worker.join(timeout=0.2)  # short, so that Ctrl-C reaches this thread
    except BaseException:
        stop.set()
        for worker in workers:
            if worker.ident is not None:
                worker.join()
        raise
    if errors:
        raise errors[0]
