"""Every tensor of the merged model against what it must be, row block by row block.

The rule for one element: |M - T| <= half an ulp of T in the stored dtype + the error fp32 arithmetic may add, where T
is the oracle's exact value. One further allowance has a name of its own, `update cast first`: what a merge may err
that rounds the update to 16 bit before it adds, as PEFT itself can.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from merge_adapter.verify.oracle import Update, as_matrix
from merge_adapter.verify.rounding import half_ulp, rounded
from merge_adapter.verify.storage import same_bytes

BLOCK_ELEMENTS = 1 << 17
"""Elements of one row block: half a MB in fp32, so that a block stays in the processor's cache."""


class Agreement(StrEnum):
    """How a tensor relates to what it must be, best first."""

    EXACT = "exact"
    """Bit for bit the exact value rounded once (or, where nothing was to change, the base)."""
    ROUNDED = "rounded"
    """Within the tolerance of the dtype."""
    CAST_FIRST = "update cast first"
    """Within the named allowance for an update rounded to 16 bit before it was added."""
    WRONG = "wrong"


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
    """Largest error, in units of that element's tolerance."""
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

    @property
    def share_differing(self) -> float:
        """Part of the elements that differ from the once-rounded oracle."""
        return self.differing / self.elements if self.elements else 0.0


def blocks(shape: torch.Size | tuple[int, ...]) -> list[tuple[int, int]]:
    """Row ranges [start, stop) that cover a tensor of `shape`."""
    rows = shape[0] if len(shape) else 1
    width = max(1, math.prod(shape) // max(1, rows))
    step = max(1, BLOCK_ELEMENTS // width)
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


@dataclass
class _Sums:
    """Running sums over the blocks of one tensor, fp64."""

    wrong: int = 0
    cast_first: int = 0
    differing: int = 0
    worst: float = 0.0
    ww: float = 0.0
    dd: float = 0.0
    cd: float = 0.0
    cc: float = 0.0
    rd: float = 0.0
    ee: float = 0.0
    finite: bool = True


def judge_kept(name: str, merged: Tensor, base: Tensor) -> TensorEvidence:
    """A tensor the adapter does not touch: the base's bytes, or the base rounded once to a dtype asked for."""
    expected = base if merged.dtype == base.dtype else base.to(merged.dtype)
    exact = same_bytes(merged, expected)
    differing = 0
    finite = True
    if not exact:
        left, right = as_matrix(merged), as_matrix(expected)
        for start, stop in blocks(merged.shape):
            differing += int((left[start:stop] != right[start:stop]).sum())
            finite = finite and bool(torch.isfinite(left[start:stop]).all())
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


def judge_update(name: str, merged: Tensor, update: Update, *, kind: str = "update") -> TensorEvidence:
    """A tensor the adapter changes, against `update`. Shapes are equal; the caller has checked."""
    sums = _Sums()
    matrix = as_matrix(merged)
    for start, stop in blocks(update.shape):
        _judge_block(sums, matrix[start:stop], update, start, stop)
    alpha = sums.cd / sums.dd if sums.dd > 0 else None
    stray = max(0.0, sums.cc - (alpha or 0.0) ** 2 * sums.dd)
    agreement = Agreement.EXACT
    if sums.wrong or not sums.finite:
        agreement = Agreement.WRONG
    elif sums.cast_first:
        agreement = Agreement.CAST_FIRST
    elif sums.differing:
        agreement = Agreement.ROUNDED
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
        retained=sums.rd / sums.dd if sums.dd > 0 else None,
        residual=math.sqrt(sums.ee / sums.dd) if sums.dd > 0 else 0.0,
        stray=math.sqrt(stray / sums.cc) if sums.cc > 0 else 0.0,
        finite=sums.finite,
        oracle=update.form,
    )


def _judge_block(sums: _Sums, merged: Tensor, update: Update, start: int, stop: int) -> None:
    """Add one block. 16-bit tensors are first compared in fp32, whose product error their own rounding hides;
    only blocks with a difference, and fp32 tensors, are judged in fp64."""
    storage = merged.dtype
    fast = storage in (torch.bfloat16, torch.float16)
    work = torch.float32 if fast else torch.float64
    base = update.base_rows(start, stop, work)
    target = update.target_rows(start, stop, work)
    once = rounded(target, storage)
    if same_bytes(once, merged):
        once = merged
    else:
        if fast:
            target64 = update.target_rows(start, stop, torch.float64)
            once = rounded(target64, storage)
        else:
            target64 = target
        _count_errors(sums, merged, once, target64, update, start, stop)
    change = merged.to(work) - base
    delta = target - base
    kept = change if once is merged else once.to(work) - base
    error = merged.to(work) - target
    sums.ww += _dot(base, base)
    sums.dd += _dot(delta, delta)
    sums.cd += _dot(change, delta)
    sums.cc += _dot(change, change)
    sums.rd += _dot(kept, delta)
    sums.ee += _dot(error, error)


def _count_errors(
    sums: _Sums, merged: Tensor, once: Tensor, target: Tensor, update: Update, start: int, stop: int
) -> None:
    finite = torch.isfinite(merged)
    if not bool(finite.all()):
        sums.finite = False
    sums.differing += int((merged != once).sum())
    error = (merged.double() - target).abs()
    tolerance = half_ulp(target, merged.dtype) + update.product_error(start, stop)
    beyond = ~(error <= tolerance)  # a NaN is beyond
    if bool(beyond.any()):
        allowed = tolerance + update.cast_error(start, stop, merged.dtype)
        wrong = beyond & ~(error <= allowed)
        sums.wrong += int(wrong.sum())
        sums.cast_first += int((beyond & ~wrong).sum())
    worst = float((error / tolerance).nan_to_num(nan=math.inf).max())
    sums.worst = max(sums.worst, worst)


def _dot(left: Tensor, right: Tensor) -> float:
    return float(torch.dot(left.flatten(), right.flatten()))


def _spelled(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
