"""Known faults injected into the gate's own weights part: a gate that does not catch them has shown nothing.

Nothing is written; the faults are made in memory, on a few of the tensors the adapter changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from merge_adapter.verify.expectations import Expectations
from merge_adapter.verify.findings import Finding, undecided
from merge_adapter.verify.oracle import Replaced, Update, as_matrix
from merge_adapter.verify.weights import Agreement, blocks, judge_update

SAMPLED = 3
"""Tensors a fault is tried on: the first, the middle and the last that the adapter changes."""

LARGEST = 1 << 24
"""Elements of a tensor above which a mutant is made on its first rows only."""


@dataclass(frozen=True)
class Mutant:
    """One kind of fault."""

    name: str
    makes: str
    """In words."""
    change: Callable[[Tensor, Tensor, int], Tensor]
    """(base rows, update rows, seed) -> rows of the faulty merge before rounding, fp64."""


def _foreign(base: Tensor, delta: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(delta.numel(), generator=generator)
    return base + delta.flatten()[order].reshape(delta.shape)


MUTANTS = (
    Mutant("no-op", "the base itself", lambda base, _delta, _seed: base),
    Mutant("twice", "the update added twice", lambda base, delta, _seed: base + 2 * delta),
    Mutant("scaled by 1.1", "the update a tenth too strong", lambda base, delta, _seed: base + 1.1 * delta),
    Mutant("sign", "the update subtracted", lambda base, delta, _seed: base - delta),
    Mutant("foreign adapter", "another update of the same size", _foreign),
)


def run_mutants(expected: Expectations, storage: torch.dtype, seed: int) -> list[dict[str, object]]:
    """Each fault on the sampled tensors: how many the weights part caught. JSON-ready."""
    names = [name for name, update in expected.updates.items() if not isinstance(update, Replaced)]
    if not names:
        return []
    picked = sorted({0, len(names) // 2, len(names) - 1})[:SAMPLED]
    results: list[dict[str, object]] = []
    for mutant in MUTANTS:
        caught = tried = 0
        missed = []
        for at in picked:
            name = names[at]
            tried += 1
            if _caught(mutant, expected.updates[name], storage, seed):
                caught += 1
            else:
                missed.append(name)
        results.append(
            {
                "fault": f"{mutant.name}: {mutant.makes}",
                "tried": tried,
                "caught": {"weights": caught},
                "caught_by": ["weights"] if caught == tried else [],
                "missed": missed,
            }
        )
    # one tensor of the whole model left out is the no-op on that tensor alone: the verdict needs no second one
    dropped = dict(results[0], fault="dropped module: one module left unmerged")
    return [*results[:1], dropped, *results[1:]]


def _caught(mutant: Mutant, update: Update, dtype: torch.dtype, seed: int) -> bool:
    part = _Head(update)
    pieces = []
    for start, stop in blocks(part.shape):
        base = part.base_rows(start, stop, torch.float64)
        delta = part.target_rows(start, stop, torch.float64) - base
        pieces.append(mutant.change(base, delta, seed + start).to(dtype))
    faulty = torch.cat(pieces).reshape(part.shape)
    return judge_update("mutant", faulty, part).agreement is Agreement.WRONG


class _Head(Update):
    """The first rows of an update, so that a mutant of a huge tensor stays small."""

    def __init__(self, whole: Update) -> None:
        rows = whole.shape[0]
        width = max(1, whole.base.numel() // max(1, rows))
        keep = max(1, min(rows, LARGEST // width))
        self._whole = whole
        self.base = whole.base[:keep]
        self.form = whole.form

    def base_rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        return as_matrix(self.base)[start:stop].to(dtype)

    def target_rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        return self._whole.target_rows(start, stop, dtype)

    def product_error(self, start: int, stop: int) -> Tensor:
        return self._whole.product_error(start, stop)

    def cast_error(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        return self._whole.cast_error(start, stop, dtype)


def judge_mutants(results: list[dict[str, object]]) -> Iterator[Finding]:
    """A fault that slipped through leaves the answer open."""
    for entry in results:
        if not entry["caught_by"]:
            text = (
                f"this injected fault went unseen in {entry['missed']}: the update is too small for this dtype "
                "to show it; a wider dtype would"
            )
            yield undecided("mutants", str(entry["fault"]), text)
