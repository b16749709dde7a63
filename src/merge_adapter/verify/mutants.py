"""Known faults injected into the gate itself: a gate that does not catch them has shown nothing.

Nothing is written; the faults are made in memory. Every run tries them on a few of the tensors the adapter changes,
through the weights and the modules part; on request each is also made in the whole model and put to the outputs part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from merge_adapter.verify.expectations import Expectations
from merge_adapter.verify.findings import Finding, undecided
from merge_adapter.verify.layers import judge_layer
from merge_adapter.verify.oracle import Points, Replaced, Single, Update, as_matrix
from merge_adapter.verify.scratch import Scratch
from merge_adapter.verify.threads import workers
from merge_adapter.verify.weights import Agreement, blocks, judge_update

SAMPLED = 3
"""Tensors a fault is tried on: the first, the middle and the last that the adapter changes."""

LARGEST = 1 << 20
"""Elements of a tensor above which a mutant is made on its first rows only, and not put to the modules part."""


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


DROPPED = "dropped layer: the layers of one block left unmerged"
"""The fault that only exists in a whole model."""

MUTANTS = (
    Mutant("no-op", "the base itself", lambda base, _delta, _seed: base),
    Mutant("twice", "the update added twice", lambda base, delta, _seed: base + 2 * delta),
    Mutant("scaled by 1.1", "the update a tenth too strong", lambda base, delta, _seed: base + 1.1 * delta),
    Mutant("sign", "the update subtracted", lambda base, delta, _seed: base - delta),
    Mutant("foreign adapter", "another update of the same size", _foreign),
)


@dataclass
class Outcome:
    """What the parts made of one injected fault."""

    fault: str
    tried: int = 0
    weights: int = 0
    """Of the tensors tried, how many the weights part caught."""
    layers: int = 0
    modules: int = 0
    """Of the layers tried, how many the modules part caught."""
    outputs: bool | None = None
    """Whether the outputs part caught it in the whole model; None when it was not asked."""
    missed: list[str] = field(default_factory=list)

    @property
    def caught_by(self) -> list[str]:
        """Parts that caught the fault wherever it was tried."""
        parts = ["weights"] if 0 < self.tried == self.weights else []
        parts += ["modules"] if 0 < self.layers == self.modules else []
        return [*parts, "outputs"] if self.outputs else parts

    def as_json(self) -> dict[str, Any]:
        """For merge_report.json."""
        caught: dict[str, Any] = {"weights": self.weights, "modules": self.modules}
        if self.outputs is not None:
            caught["outputs"] = self.outputs
        entry = {"fault": self.fault, "tried": self.tried, "caught": caught, "caught_by": self.caught_by}
        return {**entry, "missed": self.missed} if self.missed else entry


def run_mutants(expected: Expectations, storage: torch.dtype, seed: int) -> list[Outcome]:
    """Each fault on the sampled tensors, through the weights and the modules part."""
    names = [name for name, update in expected.updates.items() if not isinstance(update, Replaced)]
    if not names:
        return []
    picked = [names[at] for at in sorted({0, len(names) // 2, len(names) - 1})][:SAMPLED]
    pairs = [(mutant, name) for mutant in MUTANTS for name in picked]
    with workers() as pool:
        found = list(pool.map(lambda pair: _caught(pair[0], pair[1], expected, storage, seed), pairs))
    outcomes = {mutant: Outcome(f"{mutant.name}: {mutant.makes}") for mutant in MUTANTS}
    for (mutant, name), (in_weights, in_modules) in zip(pairs, found, strict=True):
        outcome = outcomes[mutant]
        outcome.tried += 1
        outcome.weights += in_weights
        outcome.layers += in_modules is not None
        outcome.modules += bool(in_modules)
        if not in_weights:
            outcome.missed.append(name)
    return list(outcomes.values())


def _caught(
    mutant: Mutant, name: str, expected: Expectations, dtype: torch.dtype, seed: int
) -> tuple[bool, bool | None]:
    """Whether the weights part and the modules part catch `mutant` on one tensor; None: the latter was not asked."""
    update = expected.updates[name]
    part = _Head(update)
    faulty = torch.cat(
        [faulty_rows(mutant, part, start, stop, dtype, seed) for start, stop in blocks(part.shape)]
    )
    faulty = faulty.reshape(part.shape)
    in_weights = judge_update("mutant", faulty, part).agreement is Agreement.WRONG
    layer = expected.layers.get(name)
    if layer is None or part.shape != update.shape:
        return in_weights, None
    judged = judge_layer(name, layer, faulty, None, update, seed=seed, allow_cast=False)
    return in_weights, None if judged is None else not judged.ratio <= 1


def faulty_rows(
    mutant: Mutant, update: Update, start: int, stop: int, dtype: torch.dtype, seed: int
) -> Tensor:
    """Rows [start, stop) as the faulty merge would store them."""
    base = update.base_rows(start, stop, torch.float64)
    delta = update.target_rows(start, stop, torch.float64) - base
    return mutant.change(base, delta, seed + start).to(dtype)


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

    def points(self, rows: Tensor, columns: Tensor, dtype: torch.dtype) -> Points:
        return self._whole.points(rows, columns, dtype)

    def single(self, start: int, stop: int, scratch: Scratch) -> Single:
        return self._whole.single(start, stop, scratch)


def judge_mutants(outcomes: list[Outcome]) -> Iterator[Finding]:
    """A fault that slipped through the weights part leaves the answer open."""
    for outcome in outcomes:
        if outcome.weights != outcome.tried:
            text = (
                f"this injected fault went unseen in {', '.join(outcome.missed)}: the update is too small for this "
                "dtype to show it; a wider dtype would"
            )
            yield undecided("mutants", outcome.fault, text)
