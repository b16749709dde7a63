"""The four stages side by side: while one shard is fetched, the one before merges, the one before that is judged, and
the one before that is sent.

Every stage takes the units in their order, in a thread of its own; the merge runs in the caller's, where an
interruption arrives. The ledger decides who may go on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Lock, Thread

from merge_adapter.staging.ledger import Halted, Ledger
from merge_adapter.staging.units import Unit
from merge_adapter.types import OutputFile

Made = tuple[OutputFile, ...]


@dataclass(frozen=True)
class Stages:
    """What is done with a unit. What a stage raises ends the relay, and is raised by it."""

    fetch: Callable[[Unit], None]
    """Bring the base's shards here."""
    merge: Callable[[Unit], Made]
    judge: Callable[[Unit, Made], None]
    """Raises when the output may not leave."""
    release: Callable[[Unit], None]
    """Let the base's shards go."""
    send: Callable[[Unit, Made], None]
    """Hand the output over and let it go."""


@dataclass
class Seconds:
    """How long each stage was at work, waiting left out."""

    fetch: float = 0.0
    merge: float = 0.0
    judge: float = 0.0
    send: float = 0.0
    total: float = 0.0
    """From the first to the last moment, all side by side."""

    def stages(self) -> dict[str, float]:
        """Seconds by stage, and in all."""
        names = ("fetch", "merge", "judge", "send", "total")
        return {name: round(getattr(self, name), 3) for name in names}

    @contextmanager
    def of(self, stage: str) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:  # each stage has one thread, and a field of its own
            setattr(self, stage, getattr(self, stage) + time.monotonic() - began)


_PATIENCE = 2.0
"""Seconds that somebody who pressed Ctrl-C waits for an upload that cannot be interrupted."""

_Queue = SimpleQueue[tuple[int, Made] | None]


def relay(units: Sequence[Unit], stages: Stages, ledger: Ledger) -> Seconds:
    """Take every unit through every stage; returns when all are done.

    When a stage raises, or the caller is interrupted, the others end at their next step and the first error is raised.
    Nothing is left running.
    """
    return _Relay(units, stages, ledger).run()


class _Relay:
    def __init__(self, units: Sequence[Unit], stages: Stages, ledger: Ledger) -> None:
        self._units = units
        self._stages = stages
        self._ledger = ledger
        self._seconds = Seconds()
        self._errors: list[BaseException] = []
        self._lock = Lock()
        self._fetched: _Queue = SimpleQueue()
        self._merged: _Queue = SimpleQueue()
        self._judged: _Queue = SimpleQueue()

    def run(self) -> Seconds:
        began = time.monotonic()
        threads = [
            Thread(target=self._guarded, args=(work, then), name=name, daemon=True)
            for name, work, then in (
                ("fetch", self._fetch, self._fetched),
                ("judge", self._judge, self._judged),
                ("send", self._send, None),
            )
        ]
        try:
            for thread in threads:
                thread.start()
            self._guarded(self._merge, self._merged)
            for thread in threads:
                while thread.is_alive():
                    thread.join(timeout=0.2)  # short, so that Ctrl-C reaches this thread
        except BaseException as error:
            self._fail(error)
            self._end(threads, patience=_PATIENCE)
            raise
        self._end(threads, patience=None)
        if self._errors:
            raise self._errors[0]
        self._seconds.total = time.monotonic() - began
        return self._seconds

    def _end(self, threads: Sequence[Thread], *, patience: float | None) -> None:
        """Let every stage come to its end; one that is in the middle of a request gets so many seconds."""
        for queue in (self._fetched, self._merged, self._judged):
            queue.put(None)
        for thread in threads:
            if thread.ident is not None:
                thread.join(timeout=patience)

    def _guarded(self, work: Callable[[], None], then: _Queue | None) -> None:
        """Run a stage to its end; its error halts the others, and the stage behind it learns that no more comes."""
        try:
            work()
        except Halted:
            pass
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # noqa: BLE001 - carried to the caller's thread and raised there
            self._fail(error)
        finally:
            if then is not None:
                then.put(None)

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            self._errors.append(error)
        self._ledger.halt()

    def _fetch(self) -> None:
        for number, unit in enumerate(self._units):
            self._ledger.take_base(number, unit.source_bytes)
            with self._seconds.of("fetch"):
                self._stages.fetch(unit)
            self._fetched.put((number, ()))

    def _merge(self) -> None:
        for number, _ in self._arriving(self._fetched):
            self._ledger.take_output(number)
            with self._seconds.of("merge"):
                made = self._stages.merge(self._units[number])
            self._merged.put((number, made))

    def _judge(self) -> None:
        for number, made in self._arriving(self._merged):
            unit = self._units[number]
            with self._seconds.of("judge"):
                self._stages.judge(unit, made)
            self._stages.release(unit)
            self._ledger.drop_base(number)
            self._judged.put((number, made))

    def _send(self) -> None:
        for number, made in self._arriving(self._judged):
            with self._seconds.of("send"):
                self._stages.send(self._units[number], made)
            self._ledger.drop_output(number)

    def _arriving(self, queue: _Queue) -> Iterator[tuple[int, Made]]:
        while (arrived := queue.get()) is not None:
            self._ledger.check()
            yield arrived
