"""Known faults injected into the gate itself: a gate that does not catch them has shown nothing.

Nothing is written; the faults are made in memory. Every run tries them on a few of the tensors the adapter changes,
through the weights and the modules part; on request there are more kinds of them, and each is also made in the whole
model and put to the outputs part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from merge_adapter.verify.findings import Finding, undecided, warning
from merge_adapter.verify.memory.scratch import Scratch
from merge_adapter.verify.memory.threads import workers
from merge_adapter.verify.weights.expectations import Expectations
from merge_adapter.verify.weights.judging import Agreement, blocks, blocks_of, judge_update
from merge_adapter.verify.weights.layers import changed_rows, judge_layer
from merge_adapter.verify.weights.low_rank import LowRank
from merge_adapter.verify.weights.oracle import Points, Replaced, Single, Update

SAMPLED = 3
"""Tensors a fault is tried on: of those that change, the first, the middle and the last that it can be made in."""

LARGEST = 1 << 20
"""Elements of a tensor above which a mutant is made on the first rows that change, and not put to the modules part."""

PIECE = 1 << 17
"""Elements in which a fault is made and looked for at a time: the first of them tells."""

ADAPTERS = 8
"""Adapters, of several merged at once, each of which is left out in turn."""


@dataclass(frozen=True)
class Piece:
    """Rows of one tensor, to be spoiled."""

    update: Update
    start: int
    stop: int
    base: Tensor
    """The base's rows, fp64."""
    delta: Tensor
    """What the adapter adds to them, fp64."""
    seed: int


@dataclass(frozen=True)
class Mutant:
    """One kind of fault."""

    name: str
    makes: str
    """In words."""
    change: Callable[[Piece], Tensor]
    """Rows of the faulty merge before they are rounded, fp64."""
    fits: Callable[[Update], bool] = lambda _update: True
    """Whether the fault can be made in a tensor."""
    decides: bool = True
    """Whether a gate that is blind to it has shown nothing; other faults are made on request, to be looked at."""

    def __str__(self) -> str:
        return f"{self.name}: {self.makes}"


def _foreign(piece: Piece) -> Tensor:
    generator = torch.Generator().manual_seed(piece.seed)
    order = torch.randperm(piece.delta.numel(), generator=generator)
    return piece.base + piece.delta.flatten()[order].reshape(piece.delta.shape)


def _row_lost(piece: Piece) -> Tensor:
    rows = piece.base + piece.delta
    at = int(piece.delta.square().sum(1).argmax()) if piece.start == 0 else None
    if at is not None:
        rows[at] = piece.base[at]
    return rows


def _element_off(piece: Piece) -> Tensor:
    rows = piece.base + piece.delta
    if piece.start == 0:
        rows[0, 0] += rows.abs().max()
    return rows


def _coarse(piece: Piece) -> Tensor:
    """Six significant bits; bf16 has eight."""
    mantissa, exponent = torch.frexp(piece.base + piece.delta)
    return torch.ldexp((mantissa * 64).round() / 64, exponent)


DROPPED = "dropped layer: the layers of one block left unmerged"
"""The fault that only exists in a whole model."""

MUTANTS = (
    Mutant("no-op", "the base itself", lambda piece: piece.base),
    Mutant("twice", "the update added twice", lambda piece: piece.base + 2 * piece.delta),
    Mutant("scaled by 1.1", "the update a tenth too strong", lambda piece: piece.base + 1.1 * piece.delta),
    Mutant("sign", "the update subtracted", lambda piece: piece.base - piece.delta),
    Mutant("foreign adapter", "another update of the same size", _foreign),
)
"""Those of every run."""

SHOWN = (
    Mutant("scaled by 0.9", "the update a tenth too weak", lambda piece: piece.base + 0.9 * piece.delta),
    Mutant("scaled by 4", "rsLoRA mistaken at rank 16", lambda piece: piece.base + 4 * piece.delta),
    Mutant("zeroed", "a tensor of zeros", lambda piece: torch.zeros_like(piece.base)),
    Mutant("not a number", "no element is finite", lambda piece: torch.full_like(piece.base, torch.nan)),
    Mutant("row", "the row that changes most left unmerged", _row_lost),
    Mutant("element", "a single element wrong", _element_off),
    Mutant("coarse", "six significant bits on the way", _coarse),
)
"""Those made on request beside them; where one of them goes unseen, that is told and changes no verdict."""


def left_out(expected: Expectations) -> tuple[Mutant, ...]:
    """One fault for each of several adapters that add up: its part of the update is missing."""
    count = max((len(_ranks(update)) for update in expected.updates.values()), default=0)
    return tuple(
        Mutant(
            f"adapter {at + 1} left out",
            f"the update of the other {count - 1} alone",
            partial(_without, at),
            partial(_carries, at),
        )
        for at in range(min(count, ADAPTERS))
    )


def _ranks(update: Update) -> tuple[int, ...]:
    return update.ranks if isinstance(update, LowRank) else ()


def _carries(at: int, update: Update) -> bool:
    """Whether adapter number `at` adds something of its own to this tensor."""
    if len(_ranks(update)) <= at or not isinstance(update, LowRank):
        return False
    part = update.part(at)
    return bool(part.left.any() and part.right.any())


def _without(at: int, piece: Piece) -> Tensor:
    update = piece.update
    if not isinstance(update, LowRank) or not _carries(at, update):
        return piece.base + piece.delta
    return piece.base + piece.delta - update.part(at).delta_rows(piece.start, piece.stop, torch.float64)


def swapped(expected: Expectations) -> Mutant:
    """Each tensor holds what belongs to the next one of its shape."""
    partners: dict[int, Update] = {}
    shapes: dict[tuple[int, ...], list[Update]] = {}
    for update in expected.updates.values():
        if not isinstance(update, Replaced):
            shapes.setdefault(tuple(update.shape), []).append(update)
    for alike in shapes.values():
        if len(alike) > 1:
            partners |= {id(one): other for one, other in zip(alike, (*alike[1:], alike[0]), strict=True)}

    def change(piece: Piece) -> Tensor:
        partner = partners.get(id(piece.update))
        if partner is None:
            return piece.base + piece.delta
        return partner.target_rows(piece.start, piece.stop, torch.float64)

    return Mutant(
        "swapped", "two layers changed places", change, lambda update: id(update) in partners, decides=False
    )


def mutants_of(expected: Expectations, *, full: bool) -> tuple[Mutant, ...]:
    """The faults to inject: those of every run, and with `full` all there are."""
    always = (*MUTANTS, *left_out(expected))
    shown = tuple(replace(mutant, decides=False) for mutant in SHOWN)
    return (*always, *shown, swapped(expected)) if full else always


@dataclass
class Outcome:
    """What the parts made of one injected fault."""

    fault: str
    mutant: Mutant | None = None
    """How it is made; None for one that is made elsewhere."""
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


def run_mutants(
    expected: Expectations, storage: Mapping[str, torch.dtype], seed: int, *, full: bool = False
) -> list[Outcome]:
    """Each fault on the sampled tensors, through the weights and the modules part. `full`: every fault there is.

    `storage`: in which dtype a merged model holds each of them.
    """
    updates = {name: update for name, update in expected.updates.items() if not isinstance(update, Replaced)}

    @cache
    def changed(name: str) -> int | None:
        return _first_changed(updates[name])

    pairs = [
        (mutant, name)
        for mutant in mutants_of(expected, full=full)
        for name in _picked(mutant, updates, changed)
    ]

    def caught(pair: tuple[Mutant, str]) -> tuple[bool, bool | None]:
        mutant, name = pair
        return _caught(mutant, name, expected, storage[name], seed, first=changed(name) or 0)

    with workers() as pool:
        found = list(pool.map(caught, pairs))
    for name in {name for _, name in pairs}:
        updates[name].forget()
    outcomes = {mutant: Outcome(str(mutant), mutant) for mutant, _ in pairs}
    for (mutant, name), (in_weights, in_modules) in zip(pairs, found, strict=True):
        outcome = outcomes[mutant]
        outcome.tried += 1
        outcome.weights += in_weights
        outcome.layers += in_modules is not None
        outcome.modules += bool(in_modules)
        if not in_weights:
            outcome.missed.append(name)
    return list(outcomes.values())


def _picked(mutant: Mutant, updates: Mapping[str, Update], changed: Callable[[str], int | None]) -> list[str]:
    """The first, the middle and the last tensor that the fault fits, or those nearest to them that change.

    Where nothing is added, as to experts that no text reached, nothing can be left out.
    """
    names = [name for name, update in updates.items() if mutant.fits(update)]
    found = []
    for at in sorted({0, len(names) // 2, len(names) - 1}) if names else ():
        near = sorted(range(len(names)), key=lambda place: abs(place - at))
        found.append(next((names[place] for place in near if changed(names[place]) is not None), names[at]))
    return list(dict.fromkeys(found))


def _first_changed(update: Update) -> int | None:
    """The first row of the first block that the update changes; None when it changes nothing."""
    for start, stop in blocks_of(update, PIECE):
        if bool(changed_rows(update, start, stop).any()):
            return start
    update.forget()
    return None


def _caught(
    mutant: Mutant, name: str, expected: Expectations, dtype: torch.dtype, seed: int, *, first: int
) -> tuple[bool, bool | None]:
    """Whether the weights part and the modules part catch `mutant` on one tensor; None: the latter was not asked.

    `first`: the row from which on the update changes something.
    """
    update, layer = expected.updates[name], expected.layers.get(name)
    head = max(1, min(update.rows, LARGEST // max(1, update.width)))
    first = min(first, update.rows - head)
    runs = [(first + start, first + stop) for start, stop in blocks((head, update.width), PIECE)]
    made = (faulty_rows(mutant, update, start, stop, dtype, seed) for start, stop in runs)
    # one wrong row is a wrong tensor: what comes after it need not be made
    seen: list[Tensor] = []
    in_weights = False
    for (start, stop), rows in zip(runs, made, strict=False):
        seen.append(rows)
        in_weights = judge_update("mutant", rows, _Rows(update, start, stop)).agreement is Agreement.WRONG
        if in_weights:
            break
    if layer is None or head < update.rows:
        return in_weights, None
    faulty = torch.cat([*seen, *made]).reshape(update.shape)
    judged = judge_layer(name, layer, faulty, None, update, seed=seed, allow_cast=False)
    return in_weights, None if judged is None else not judged.ratio <= 1


def faulty_rows(
    mutant: Mutant, update: Update, start: int, stop: int, dtype: torch.dtype, seed: int
) -> Tensor:
    """Rows [start, stop) as the faulty merge would store them; a tensor that the fault does not fit is right."""
    base = update.base_rows(start, stop, torch.float64)
    delta = update.target_rows(start, stop, torch.float64) - base
    return mutant.change(Piece(update, start, stop, base, delta, seed + start)).to(dtype)


class _Rows(Update):
    """Some rows of an update, as one of its own: a matrix."""

    def __init__(self, whole: Update, start: int, stop: int) -> None:
        self._whole = whole
        self._start = start
        self.base = whole.matrix(whole.base)[start:stop]
        self.form = whole.form

    def base_rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        return self._whole.base_rows(self._start + start, self._start + stop, dtype)

    def target_rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        return self._whole.target_rows(self._start + start, self._start + stop, dtype)

    def product_error(self, start: int, stop: int) -> Tensor:
        return self._whole.product_error(self._start + start, self._start + stop)

    def cast_error(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        return self._whole.cast_error(self._start + start, self._start + stop, dtype)

    def exact(self, rows: Tensor, columns: Tensor) -> Tensor:
        return self._whole.exact(self._start + rows, columns)

    def points(self, rows: Tensor, columns: Tensor, dtype: torch.dtype) -> Points:
        return self._whole.points(self._start + rows, columns, dtype)

    def single(self, start: int, stop: int, scratch: Scratch) -> Single:
        return self._whole.single(self._start + start, self._start + stop, scratch)


def judge_mutants(outcomes: list[Outcome]) -> Iterator[Finding]:
    """A fault that slipped through the weights part leaves the answer open, but for those made to be looked at."""
    for outcome in outcomes:
        if outcome.weights == outcome.tried:
            continue
        unseen = f"this injected fault went unseen in {', '.join(outcome.missed)}"
        if outcome.mutant is not None and not outcome.mutant.decides:
            yield warning("mutants", outcome.fault, unseen)
        else:
            text = f"{unseen}: the update is too small for this dtype to show it; a wider dtype would"
            yield undecided("mutants", outcome.fault, text)
