"""One line per stage: what the shards of a stage tell one by one, told as one task."""

from __future__ import annotations

from contextlib import AbstractContextManager

from merge_adapter.types import Progress, Silent, Task


class Meter:
    """A Progress whose tasks, where they count bytes, all advance one task of another."""

    def __init__(self, task: Task, progress: Progress) -> None:
        self._task = task
        self._progress = progress

    def advance(self, amount: int) -> None:
        self._task.advance(amount)

    def task(self, label: str, total: int | None, *, unit: str = "bytes") -> AbstractContextManager[Task]:
        if unit != "bytes" or total is None:
            return Silent().task(label, total, unit=unit)
        return _Part(self._task)

    def note(self, text: str) -> None:
        self._progress.note(text)


class _Part(AbstractContextManager[Task]):
    def __init__(self, task: Task) -> None:
        self._task = task

    def __enter__(self) -> Task:
        return self._task

    def __exit__(self, *exc: object) -> None:
        """The whole goes on."""
