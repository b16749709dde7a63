"""Python's collector of cyclic garbage, told that what a command imports is there to stay.

torch, transformers and PEFT make a million objects. Looking through all of them again and again while they are made,
and once more when the process ends, is 1.5 of the 4.6 processor seconds that importing them and leaving takes.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_OBJECTS = 10_000
"""New objects after which the collector looks; Python's own figure is 700."""


@contextmanager
def seldom_collected() -> Iterator[None]:
    """For the whole of a short-lived process: collect seldom, and not at all on the way out."""
    gc.set_threshold(_OBJECTS)
    try:
        yield
    finally:
        gc.freeze()
