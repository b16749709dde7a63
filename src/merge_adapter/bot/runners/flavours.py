"""Which hardware a merge needs on Hugging Face Jobs, and about what it costs."""

from __future__ import annotations

from collections.abc import Iterable

from merge_adapter.errors import InputError
from merge_adapter.hub.jobs import Flavour
from merge_adapter.sizes import human_bytes

_RUNTIME_BYTES = 2_000_000_000
"""Memory of Python, torch and transformers before any weight is loaded, with room to spare."""
_START_SECONDS = 120.0
"""Pulling the image and importing torch."""
_BYTES_PER_SECOND = 60e6
"""Of weights, through download, merge, gate and upload together on two virtual cores. A guess that errs high."""


def choose_flavour(flavours: Iterable[Flavour], wanted: str, *, memory: int, disk: int) -> Flavour:
    """The hardware named `wanted`; for "auto" the cheapest on which `memory` and `disk` bytes fit.

    Raises InputError when there is none.
    """
    known = tuple(flavours)
    if wanted != "auto":
        for one in known:
            if one.name == wanted:
                return one
        raise InputError(
            f"there is no hardware {wanted!r}",
            hint=f"jobs_flavor is one of {', '.join(f.name for f in known)}",
        )
    needed = memory + _RUNTIME_BYTES
    for one in sorted(known, key=lambda flavour: flavour.dollars_per_hour):
        if one.memory_bytes >= needed and (one.disk_bytes is None or one.disk_bytes >= disk):
            return one
    raise InputError(
        f"no hardware of Hugging Face Jobs has {human_bytes(needed)} of memory and {human_bytes(disk)} of disk",
        hint="Run this merge on a machine of your own, and publish it with merge-adapter publish.",
    )


def price_text(dollars: float) -> str:
    """A price for people."""
    return f"about ${dollars:.2f}" if dollars >= 1 else f"about ${dollars:.2g}"


def estimate(flavour: Flavour, weights: int) -> float:
    """Dollars that a merge of `weights` bytes costs about."""
    seconds = _START_SECONDS + weights / _BYTES_PER_SECOND
    return flavour.dollars_per_hour * seconds / 3600
