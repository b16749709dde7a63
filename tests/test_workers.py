"""Worker threads: every job once, in order per queue, and a prompt end when one fails."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from functools import partial

import pytest

from merge_adapter.workers import Queues, Stop, Stopped, run_jobs


def test_every_job_runs_once_and_queues_keep_their_order() -> None:
    """A single worker empties one queue after the other; more of them share without losing any."""
    for threads in (1, 3):
        seen: list[tuple[int, int]] = []
        queues = [[partial(seen.append, (queue, job)) for job in range(20)] for queue in range(5)]
        run_jobs(Queues(queues), threads=threads, stop=Stop())
        assert sorted(seen) == [(queue, job) for queue in range(5) for job in range(20)]
        if threads == 1:
            assert seen == sorted(seen)


def test_idle_workers_help_with_the_longest_queue() -> None:
    """One file alone keeps all of them busy."""
    barrier = threading.Barrier(3, timeout=120)
    run_jobs(Queues([[], [barrier.wait] * 3]), threads=3, stop=Stop())


def test_a_failing_job_stops_the_others() -> None:
    """The error comes to the caller when every worker has ended."""
    stop = Stop()
    running = threading.Event()

    def long() -> None:
        running.set()
        while True:
            stop.check()
            time.sleep(0.001)

    def fail() -> None:
        assert running.wait(120)
        raise RuntimeError("this one")

    with pytest.raises(RuntimeError, match="this one"):
        run_jobs(Queues([[long], [fail]]), threads=2, stop=stop)
    with pytest.raises(Stopped):
        stop.check()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("merge-")]


@pytest.mark.parametrize("at", [0, 1, 7, 60])
def test_after_an_interrupt_nobody_works_any_more(at: int) -> None:
    """Wherever it meets the caller, who may still be starting workers: some have not come to their first line yet."""
    over, late, count = threading.Event(), threading.Event(), itertools.count()

    def job() -> None:
        if next(count) == at:
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.001)
        if over.is_set():
            late.set()

    # where a shell runs us behind, the signal is ignored
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        for _ in range(20):
            count = itertools.count()
            over.clear()
            with pytest.raises(KeyboardInterrupt):
                run_jobs(Queues([[job] * 50 for _ in range(40)]), threads=40, stop=Stop())
            over.set()
            time.sleep(0.01)
            assert not late.is_set()
    finally:
        signal.signal(signal.SIGINT, inherited)


def test_no_jobs_are_no_problem() -> None:
    """Empty queues, or none."""
    run_jobs(Queues([]), threads=2, stop=Stop())
    run_jobs(Queues([[], []]), threads=2, stop=Stop())
