"""Who may take how much of the disk.

A unit takes space twice: for the base's shards when they are fetched, and for its own output when it is merged. The
first is given back when the output was judged, the second when it was sent. A fetch waits when it would leave too
little for the merges that must come before its own, so that everybody who waits is waiting for somebody who is not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from threading import Condition


class Halted(Exception):
    """Raised in whoever waits, or asks, after `halt`; never seen outside the relay."""


class Ledger:
    """Bytes of one budget. Units have numbers, and are fetched and merged in their order. Thread-safe."""

    def __init__(self, limit: int, outputs: Mapping[int, int]) -> None:
        """`limit` in bytes; `outputs` says how many bytes each unit writes."""
        self._limit = limit
        self._outputs = dict(outputs)
        self._fetched: dict[int, int] = {}
        self._written: dict[int, int] = {}
        self._unmerged: list[int] = []
        """Units that hold their base and have no room for their output yet, in order."""
        self._merging = 0
        """How many wait for room for their output: they come first."""
        self._halted = False
        self._changed = Condition()
        self.peak = 0
        """The most bytes that were taken at a time."""

    @property
    def taken(self) -> int:
        """Bytes taken now."""
        with self._changed:
            return self._taken()

    def take_base(self, unit: int, size: int) -> None:
        """Wait until `size` bytes of the base can be fetched for `unit`."""
        with self._changed:
            self._wait(lambda: not self._merging and self._fits(size) and self._leads_on(unit, size))
            self._fetched[unit] = size
            self._unmerged.append(unit)
            self._note()

    def take_output(self, unit: int) -> None:
        """Wait until there is room for what `unit` writes. Its base must have been taken."""
        with self._changed:
            size = self._outputs[unit]
            self._merging += 1
            try:
                self._wait(lambda: self._fits(size))
            finally:
                self._merging -= 1
            self._unmerged.remove(unit)
            self._written[unit] = size
            self._note()

    def drop_base(self, unit: int) -> None:
        """The base's shards of `unit` are gone."""
        with self._changed:
            del self._fetched[unit]
            self._changed.notify_all()

    def drop_output(self, unit: int) -> None:
        """What `unit` wrote is gone."""
        with self._changed:
            del self._written[unit]
            self._changed.notify_all()

    def halt(self) -> None:
        """Let nobody wait any more: whoever does, or comes, gets Halted."""
        with self._changed:
            self._halted = True
            self._changed.notify_all()

    def check(self) -> None:
        """Raise Halted after `halt`."""
        with self._changed:
            if self._halted:
                raise Halted

    def _wait(self, ready: Callable[[], bool]) -> None:
        while not self._halted and not ready():
            self._changed.wait()
        if self._halted:
            raise Halted

    def _taken(self) -> int:
        return sum(self._fetched.values()) + sum(self._written.values())

    def _fits(self, size: int) -> bool:
        return self._taken() + size <= self._limit

    def _leads_on(self, unit: int, size: int) -> bool:
        """Whether every unit that is still to be merged would find room once those before it are done.

        Outputs that are being sent leave by themselves, and so do the bases of units that have room already.
        """
        sizes = {**self._fetched, unit: size}
        left = [*self._unmerged, unit]
        return all(
            sum(sizes[later] for later in left[at:]) + self._outputs[one] <= self._limit
            for at, one in enumerate(left)
        )

    def _note(self) -> None:
        self.peak = max(self.peak, self._taken())
        self._changed.notify_all()
