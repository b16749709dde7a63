"""Progress for people: one live line per stage on a terminal, a plain line every few seconds in a log."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import IO, TYPE_CHECKING

from merge_adapter.report.printable import printable
from merge_adapter.sizes import human_bytes
from merge_adapter.types import Progress, Silent, Task

if TYPE_CHECKING:
    from rich.console import Console

_LOG_INTERVAL = 5.0
"""Seconds between two plain lines of one stage."""


def human_seconds(seconds: float) -> str:
    """Seconds as a person says them: 0.4 s, 12 s, 3 min 20 s, 2 h 5 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _counted(total: int | None, unit: str) -> bool:
    """Whether a stage has figures; "0 bytes" of text being written would be none."""
    return total is not None or unit != "bytes"


def progress_for(console: Console, *, quiet: bool) -> Progress:
    """The progress that suits where `console` writes: live on a terminal, plain lines elsewhere, none when
    `quiet`."""
    if quiet:
        return Silent()
    if console.is_terminal:
        return LiveProgress(console)
    return LogProgress(console.file)


class _LogTask:
    def __init__(self, label: str, total: int | None, unit: str, stream: IO[str]) -> None:
        self._label, self._total, self._unit, self._stream = label, total, unit, stream
        self._lock = threading.Lock()
        self._done = 0
        self._start = self._spoke = time.monotonic()

    def advance(self, amount: int, /) -> None:
        with self._lock:
            self._done += amount
            now = time.monotonic()
            if now - self._spoke >= _LOG_INTERVAL:
                self._spoke = now
                print(self.line(now), file=self._stream, flush=True)

    def line(self, now: float) -> str:
        elapsed = max(now - self._start, 1e-9)
        rate = self._done / elapsed
        parts = [f"{self._label}:"]
        if not _counted(self._total, self._unit):
            parts.append(human_seconds(elapsed))
        elif self._unit == "bytes":
            parts.append(human_bytes(self._done))
            if self._total:
                parts.append(f"of {human_bytes(self._total)}")
            parts.append(f"({human_bytes(rate)}/s)")
        else:
            parts.append(f"{self._done}" + (f" of {self._total}" if self._total else "") + f" {self._unit}")
        if self._total and 0 < self._done < self._total:
            parts.append(f"{human_seconds((self._total - self._done) / rate)} left")
        return " ".join(parts)

    def finished(self) -> str:
        return f"{self._label}: done in {human_seconds(time.monotonic() - self._start)}"


class LogProgress:
    """Plain lines, for logs: one every few seconds and one when a stage ends."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    @contextmanager
    def _run(self, task: _LogTask) -> Iterator[Task]:
        yield task
        print(task.finished(), file=self._stream, flush=True)

    def task(self, label: str, total: int | None, *, unit: str = "bytes") -> AbstractContextManager[Task]:
        return self._run(_LogTask(label, total, unit, self._stream))

    def note(self, text: str) -> None:
        print(printable(text), file=self._stream, flush=True)


class LiveProgress:
    """One live line per stage with bytes, rate and time left."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @contextmanager
    def _run(self, label: str, total: int | None, unit: str) -> Iterator[Task]:
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            MofNCompleteColumn,
            ProgressColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )
        from rich.progress import Progress as RichProgress

        counts: tuple[ProgressColumn, ...] = ()
        if _counted(total, unit):
            counts = (DownloadColumn(), TransferSpeedColumn()) if unit == "bytes" else (MofNCompleteColumn(),)
        columns = (
            TextColumn("{task.description:<24}", markup=False),
            BarColumn(bar_width=24),
            *counts,
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with RichProgress(*columns, console=self._console) as live:
            identifier = live.add_task(label, total=total)
            yield _LiveTask(live, identifier)
            if total is None:
                live.update(identifier, total=live.tasks[0].completed)

    def task(self, label: str, total: int | None, *, unit: str = "bytes") -> AbstractContextManager[Task]:
        return self._run(label, total, unit)

    def note(self, text: str) -> None:
        self._console.print(printable(text), markup=False, highlight=False)


class _LiveTask:
    def __init__(self, live: object, identifier: object) -> None:
        self._advance = live.advance  # type: ignore[attr-defined]  # rich is imported only where it is used
        self._identifier = identifier

    def advance(self, amount: int, /) -> None:
        self._advance(self._identifier, amount)
