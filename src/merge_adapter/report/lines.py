"""Progress for programs: one JSON object per line, for whoever runs merge-adapter and shows how far it is.

Asked for with `MERGE_ADAPTER_PROGRESS=lines` in the environment; the bot does, wherever its jobs run.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TextIO

from merge_adapter.report.printable import printable
from merge_adapter.types import Task

VARIABLE = "MERGE_ADAPTER_PROGRESS"
_INTERVAL = 0.5
"""Seconds between two lines of one stage."""


@dataclass(frozen=True)
class StageLine:
    """How far a stage is."""

    label: str
    done: int
    total: int | None
    unit: str


def parse_line(line: str) -> StageLine | None:
    """The stage in a line that `LineProgress` wrote; None for any other line."""
    if not line.startswith('{"stage":'):
        return None
    try:
        entry = json.loads(line)
        label, done, total, unit = entry["stage"], entry["done"], entry["total"], entry["unit"]
    except (ValueError, KeyError, TypeError):
        return None
    if not isinstance(label, str) or not isinstance(unit, str) or type(done) is not int:
        return None
    return StageLine(label[:100], done, total if type(total) is int else None, unit[:20])


class _LineTask:
    def __init__(self, label: str, total: int | None, unit: str, stream: TextIO) -> None:
        self._label, self._total, self._unit, self._stream = label, total, unit, stream
        self._lock = threading.Lock()
        self._done = 0
        self._spoke = 0.0

    def advance(self, amount: int, /) -> None:
        with self._lock:
            self._done += amount
            if time.monotonic() - self._spoke >= _INTERVAL:
                self.speak()

    def speak(self) -> None:
        self._spoke = time.monotonic()
        line = {"stage": self._label, "done": self._done, "total": self._total, "unit": self._unit}
        print(json.dumps(line), file=self._stream, flush=True)


class LineProgress:
    """A Progress that writes `StageLine`s, and notes as plain lines, to `stream`."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    @contextmanager
    def _run(self, task: _LineTask) -> Iterator[Task]:
        task.speak()
        yield task
        task.speak()

    def task(self, label: str, total: int | None, *, unit: str = "bytes") -> AbstractContextManager[Task]:
        return self._run(_LineTask(label, total, unit, self._stream))

    def note(self, text: str) -> None:
        print(printable(" ".join(text.split())), file=self._stream, flush=True)
