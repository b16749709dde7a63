"""Every tensor of the merged model against what it must be, row block by row block.

The rule for one element: |M - T| <= half an ulp of T in the stored dtype + the error fp32 arithmetic may add, where T
is the oracle's exact value, in fp64. One further allowance has a name of its own, `update cast first`: what a merge may
err that rounds the update to 16 bit before it adds, as PEFT itself can.

16-bit tensors are screened in fp32 first (`screen`), which vouches for almost every element of a right merge; the rest
are judged one by one in fp64, so that counts and verdicts are those of fp64 throughout.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum

import torch
from torch import Tensor

from merge_adapter.verify.memory.mapped import release
from merge_adapter.verify.memory.scratch import own_scratch
from merge_adapter.verify.models.storage import same_bytes
from merge_adapter.verify.rounding import half_ulp, rounded
from merge_adapter.verify.weights.oracle import Points, Update, as_matrix
from merge_adapter.verify.weights.screen import SCREENED, Products, inner_products, screen

BLOCK_ELEMENTS = 1 << 20
"""Elements of one row block: 4 MB in fp32. With smaller ones threads wait for each other, for Python runs one at a
time: half a MB, which stays in a core's own cache, took twice as long."""

KEPT_ELEMENTS = 1 << 22
"""The same for tensors that must be the base's: comparing bytes takes no more memory than their pages."""

POINTS, PRODUCTS = 1 << 12, 1 << 18
"""Elements judged one by one at a time, and the products they may take: each a row and a column of the factors."""


MOST_TIES = 1 << 12
"""Elements that differ from the once-rounded oracle above which a tensor's are counted and not kept."""


class Agreement(StrEnum):
    """How a tensor relates to what it must be, best first."""

    EXACT = "exact"
    """Bit for bit the exact value rounded once (or, where nothing was to change, the base)."""
    ROUNDED = "rounded"
    """Within the tolerance of the dtype."""
    CAST_FIRST = "update cast first"
    """Within the named allowance for an update rounded to 16 bit before it was added."""
    BASE_CAST_FIRST = "base cast first"
    """Within these on a wider base that was rounded to the stored dtype before."""
    WRONG = "wrong"


@dataclass(frozen=True)
class Ties:
    """Where a tensor is not the once-rounded oracle, and what that is there."""

    positions: Tensor
    """(n,) int64, ascending, in the flat tensor."""
    values: Tensor
    """(n,) in the stored dtype."""


@dataclass(frozen=True)
class TensorEvidence:
    """What the weights part measured on one tensor."""

    name: str
    kind: str
    """`update`, `replaced` or `kept`."""
    dtype: str
    shape: tuple[int, ...]
    agreement: Agreement
    elements: int
    wrong: int = 0
    """Elements beyond the tolerance and the allowance."""
    cast_first: int = 0
    """Elements beyond the tolerance but within the allowance."""
    differing: int = 0
    """Elements that are not bit for bit the once-rounded oracle."""
    worst: float = 0.0
    """Largest error of an element that is not the once-rounded oracle, in units of its tolerance."""
    effect: float = 0.0
    """rho = |T - W| / |W|."""
    alpha: float | None = None
    """<M - W, D> / <D, D>: 1 for a full update, 0 for none, 2 for twice."""
    retained: float | None = None
    """The same for the once-rounded oracle: the part of the update the dtype can hold."""
    residual: float = 0.0
    """|M - T| / |T - W|: error over effect. 0 when there is no update."""
    stray: float = 0.0
    """|M - W - alpha D| / |M - W|: how much of the change is not along the update."""
    finite: bool = True
    oracle: str = ""
    diagnosis: str = ""
    ties: Ties | None = None
    """None where there are none, or too many to keep."""

    @property
    def share_differing(self) -> float:
        """Part of the elements that differ from the once-rounded oracle."""
        return self.differing / self.elements if self.elements else 0.0


def blocks(shape: torch.Size | tuple[int, ...], elements: int = BLOCK_ELEMENTS) -> list[tuple[int, int]]:
    """Row ranges [start, stop) that cover a tensor of `shape`, of about so many elements each."""
    rows = shape[0] if len(shape) else 1
    width = max(1, math.prod(shape) // max(1, rows))
    step = max(1, elements // width)
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def blocks_of(update: Update, elements: int = BLOCK_ELEMENTS) -> list[tuple[int, int]]:
    """The same for the rows of an update."""
    return blocks((update.rows, update.width), elements)


@dataclass
class _Sums:
    """Running sums over the blocks of one tensor, fp64."""

    wrong: int = 0
    cast_first: int = 0
    differing: int = 0
    ties: list[Ties] = field(default_factory=list)
    worst: float = 0.0
    finite: bool = True
    ww: float = 0.0
    dd: float = 0.0
    ed: float = 0.0
    ee: float = 0.0
    moved: float = 0.0
    """<M - O, D>, with O the once-rounded oracle."""

    def add(self, products: Products) -> None:
        self.ww += products.ww
        self.dd += products.dd
        self.ed += products.ed
        self.ee += products.ee

    def keep(self, positions: Tensor, merged: Tensor, once: Tensor) -> None:
        """Remember where, of elements counted just now, the two differ."""
        if self.differing <= MOST_TIES:
            differs = merged != once
            self.ties.append(Ties(positions[differs], once[differs]))


def judge_kept(name: str, merged: Tensor, base: Tensor) -> TensorEvidence:
    """A tensor the adapter does not touch: the base's bytes, or the base rounded once to a dtype asked for."""
    exact, finite, differing = True, True, 0
    if merged.numel():
        left, right = as_matrix(merged), as_matrix(base)
        for start, stop in blocks(merged.shape, KEPT_ELEMENTS):
            rows, wanted = left[start:stop], right[start:stop].to(merged.dtype)
            if not same_bytes(rows, wanted):
                exact = False
                differing += _different(rows, wanted)
                finite = finite and bool(torch.isfinite(rows).all())
            release(rows)
            release(right[start:stop])
    return TensorEvidence(
        name,
        "kept",
        _spelled(merged.dtype),
        tuple(merged.shape),
        Agreement.EXACT if exact else Agreement.WRONG,
        merged.numel(),
        wrong=differing,
        differing=differing,
        finite=finite,
    )


def _different(left: Tensor, right: Tensor) -> int:
    """How many elements are not of the same bytes: -0.0 is not 0.0 here."""
    pairs = (each.contiguous().view(torch.uint8).view(each.numel(), -1) for each in (left, right))
    return int(torch.ne(*pairs).any(1).sum())


def judge_update(
    name: str, merged: Tensor, update: Update, *, kind: str = "update", screened: bool = True
) -> TensorEvidence:
    """A tensor the adapter changes, against `update`. Shapes are equal; the caller has checked.

    `screened` False judges every element in fp64, to the same figures.
    """
    sums = _Sums()
    matrix = update.matrix(merged)
    suspects: list[Tensor] = []
    for start, stop in blocks_of(update):
        rows = matrix[start:stop]
        found = None
        if screened and rows.dtype in SCREENED:
            scratch = own_scratch()
            found = screen(rows, update.single(start, stop, scratch), scratch)
        if found is None:
            _judge_block(sums, rows, update, start, stop)
        else:
            sums.add(found.products)
            suspects.append(found.suspects + start * matrix.shape[1])
    if suspects:
        _judge_points(sums, matrix, update, torch.cat(suspects))
        if sums.wrong or not sums.finite:
            # what is wrong is explained by its figures: those of fp64, where nothing is lost when sums cancel
            return judge_update(name, merged, update, kind=kind, screened=False)
    return _evidence(name, kind, merged, sums, update.form)


def _evidence(name: str, kind: str, merged: Tensor, sums: _Sums, form: str) -> TensorEvidence:
    # M - W = D + E
    along = sums.dd + sums.ed
    change = max(0.0, sums.dd + 2 * sums.ed + sums.ee)
    alpha = along / sums.dd if sums.dd > 0 else None
    stray = max(0.0, change - (alpha or 0.0) ** 2 * sums.dd)
    agreement = Agreement.EXACT
    if sums.wrong or not sums.finite:
        agreement = Agreement.WRONG
    elif sums.cast_first:
        agreement = Agreement.CAST_FIRST
    elif sums.differing:
        agreement = Agreement.ROUNDED
    ties = None
    if 0 < sums.differing <= MOST_TIES:
        positions = torch.cat([some.positions for some in sums.ties])
        order = positions.argsort()
        ties = Ties(positions[order], torch.cat([some.values for some in sums.ties])[order])
    return TensorEvidence(
        name,
        kind,
        _spelled(merged.dtype),
        tuple(merged.shape),
        agreement,
        merged.numel(),
        wrong=sums.wrong,
        cast_first=sums.cast_first,
        differing=sums.differing,
        worst=sums.worst,
        effect=math.sqrt(sums.dd / sums.ww) if sums.ww > 0 else math.inf if sums.dd else 0.0,
        alpha=alpha,
        retained=(along - sums.moved) / sums.dd if sums.dd > 0 else None,
        residual=math.sqrt(sums.ee / sums.dd) if sums.dd > 0 else 0.0,
        stray=math.sqrt(stray / change) if change > 0 else 0.0,
        finite=sums.finite,
        oracle=form,
        ties=ties,
    )


def _judge_block(sums: _Sums, merged: Tensor, update: Update, start: int, stop: int) -> None:
    """Add one whole block in fp64."""
    base = update.base_rows(start, stop, torch.float64)
    target = update.target_rows(start, stop, torch.float64)
    once = rounded(target, merged.dtype)
    delta = target - base
    error = merged.double() - target
    sums.add(inner_products(base, delta, error))
    if same_bytes(once, merged) and bool(torch.isfinite(once).all()):
        return
    tolerance = half_ulp(target, merged.dtype) + update.product_error(start, stop)
    beyond = _count_errors(sums, merged, once, target, tolerance, delta)
    width = merged.shape[1]
    sums.keep(torch.arange(start * width, stop * width), merged.flatten(), once.flatten())
    if bool(beyond.any()):
        _count_beyond(sums, beyond, error, tolerance + update.cast_error(start, stop, merged.dtype))


def _judge_points(sums: _Sums, merged: Tensor, update: Update, positions: Tensor) -> None:
    """Add the counts of single elements of the matrix `merged`, at flat `positions`, in fp64."""
    step = min(POINTS, max(1, PRODUCTS // update.terms))
    for first in range(0, positions.numel(), step):
        chosen = positions[first : first + step]
        rows, columns = chosen // merged.shape[1], chosen % merged.shape[1]
        held = merged[rows, columns]
        once = rounded(update.exact(rows, columns), merged.dtype)
        # most are the exact value rounded once, if only just: of these there is no more to say
        telling = (held != once) | ~torch.isfinite(held)
        if not bool(telling.any()):
            continue
        chosen, rows, columns = chosen[telling], rows[telling], columns[telling]
        held, once = held[telling], once[telling]
        points: Points = update.points(rows, columns, merged.dtype)
        tolerance = half_ulp(points.target, merged.dtype) + points.product_error
        beyond = _count_errors(sums, held, once, points.target, tolerance, points.target - points.base)
        sums.keep(chosen, held, once)
        if bool(beyond.any()):
            _count_beyond(sums, beyond, held.double() - points.target, tolerance + points.cast_error)


def _count_errors(
    sums: _Sums, merged: Tensor, once: Tensor, target: Tensor, tolerance: Tensor, delta: Tensor
) -> Tensor:
    """Count differing and non-finite elements; returns which lie beyond their tolerance."""
    if bool((~torch.isfinite(merged) & torch.isfinite(target)).any()):
        sums.finite = False
    differing = merged != once
    sums.differing += int(differing.sum())
    # what is not finite in the oracle itself has no distance to anything
    same = (merged == target) | (merged.isnan() & target.isnan())
    error = (merged.double() - target).abs()
    moved = ((merged.double() - once.double()) * delta)[differing]
    sums.moved += float(moved.sum())
    ratio = (error / tolerance)[differing & ~same].nan_to_num(nan=math.inf, posinf=math.inf)
    sums.worst = max(sums.worst, float(ratio.max()) if ratio.numel() else 0.0)
    return ~((error <= tolerance) | same)


def _count_beyond(sums: _Sums, beyond: Tensor, error: Tensor, allowed: Tensor) -> None:
    wrong = beyond & ~(error.abs() <= allowed)
    sums.wrong += int(wrong.sum())
    sums.cast_first += int((beyond & ~wrong).sum())


def _spelled(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
