"""What went wrong with a tensor, in words. Words only: the verdict never depends on them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from merge_adapter.verify.rounding import half_ulp
from merge_adapter.verify.weights.judging import Agreement, TensorEvidence, blocks, blocks_of
from merge_adapter.verify.weights.oracle import Replaced, Update, as_matrix

NEAR = 0.04
"""How close (relative) an alpha-hat must come to a known mistake to be named after it."""

CLOSE = 0.05
"""Relative distance of first rows below which two tensors are taken for the same."""

ALONG = 0.35
"""Largest stray share for which a change still counts as a multiple of the update; rounding alone strays."""


Rows = Callable[[int], Tensor]
"""The first n rows of a tensor, (n, rest), fp32."""


@dataclass(frozen=True)
class Clues:
    """What is known of the adapter where a tensor went wrong."""

    rank: int | None = None
    rslora: bool = False
    dora: bool = False


def explain(
    evidence: TensorEvidence,
    merged: Tensor,
    update: Update | None,
    base: Tensor,
    clues: Clues,
    others: Mapping[str, Rows],
) -> TensorEvidence:
    """`evidence` with its diagnosis. `others` give the first rows of what tensors of the same shape should hold."""
    if evidence.agreement is not Agreement.WRONG:
        return evidence
    return replace(evidence, diagnosis=_diagnosis(evidence, merged, update, base, clues, others))


def _diagnosis(
    evidence: TensorEvidence,
    merged: Tensor,
    update: Update | None,
    base: Tensor,
    clues: Clues,
    others: Mapping[str, Rows],
) -> str:
    if not evidence.finite:
        bad = int((~torch.isfinite(merged)).sum())
        return f"{bad:,} of {evidence.elements:,} elements are not finite"
    if update is None and torch.equal(merged, base.to(merged.dtype)):
        return f"differs from the base in the sign of zeros alone ({_share(evidence)})"
    if merged.numel() > 1 and not bool(merged.any()):
        return "zeroed"
    place = _elsewhere(evidence.name, merged, update, base, others)
    if update is None:
        words = f"differs from the base outside the adapter's targets ({_share(evidence)})"
        return f"{words}; {place}" if place else words
    if place:
        return place
    if isinstance(update, Replaced):
        if torch.equal(merged, base.to(merged.dtype)) and not torch.equal(update.value, base):
            return "not merged: the base's tensor stands where the adapter brings its own"
        return f"differs from the tensor the adapter brings ({_share(evidence)})"
    return _multiple(evidence, merged, update, clues)


def _share(evidence: TensorEvidence) -> str:
    return f"{evidence.differing:,} of {evidence.elements:,} elements"


def _multiple(evidence: TensorEvidence, merged: Tensor, update: Update, clues: Clues) -> str:
    alpha = evidence.alpha if evidence.alpha is not None and math.isfinite(evidence.alpha) else 0.0
    local = _local(merged, update)
    if local:
        return local
    unmoved = (
        torch.equal(merged, update.base.to(merged.dtype)) if merged.shape == update.base.shape else False
    )
    if unmoved:
        return "not merged"
    if evidence.stray <= max(ALONG, _rounding_stray(evidence, merged)):
        if abs(alpha - 1) <= NEAR:
            return _coarse(evidence)
        named = _named(alpha, clues)
        return named or f"merged at {alpha:.3g} times the adapter's strength"
    if clues.dora and evidence.residual < 1:
        return (
            f"merged without DoRA's norm (alpha-hat {alpha:.2f}, error {evidence.residual:.2f} of the update)"
        )
    change = _norm(merged, update)
    if math.isinf(change):
        return "differs from the base, and the adapter's update is zero here: another base, or damaged"
    if change > 10:
        return f"differs from the base {change:.0f} times as much as the adapter's update: another base, or damaged"
    if abs(alpha) < 0.3:
        return f"another adapter: it moved by {change:.2g} of the update, hardly along it (alpha-hat {alpha:.2f})"
    if evidence.residual < 0.3 or abs(alpha - 1) <= NEAR:
        # errors without a direction, as large as they may be, are what a coarse grid leaves
        return _coarse(evidence)
    return f"merged only in part, or mixed with another update (alpha-hat {alpha:.2f})"


def _coarse(evidence: TensorEvidence) -> str:
    off = f"{evidence.residual:.2g} of the update"
    return f"merged, but off by {off}: coarser arithmetic or a coarser dtype on the way"


def _named(alpha: float, clues: Clues) -> str:
    root = math.sqrt(clues.rank) if clues.rank else 0.0
    known: list[tuple[float, str]] = [
        (0.0, "not merged"),
        (2.0, "merged twice"),
        (3.0, "merged three times"),
        (-1.0, "sign flipped: the update was subtracted"),
    ]
    if clues.rank and clues.rank > 1:
        slip = "rsLoRA ignored" if clues.rslora else "rsLoRA assumed"
        if clues.rslora:
            known.append((1 / root, f"scaled by 1/sqrt(r): {slip}"))
        else:
            known.append((root, f"scaled by sqrt(r): {slip}"))
        known.append((float(clues.rank), "scaled by r: alpha was not divided by the rank"))
    for value, words in known:
        if abs(alpha - value) <= NEAR * max(1.0, abs(value)):
            return words
    return ""


def _rounding_stray(evidence: TensorEvidence, merged: Tensor) -> float:
    """The stray share that rounding to the stored dtype alone leaves: of no meaning for updates near an ulp."""
    if evidence.effect <= 0 or not math.isfinite(evidence.effect):
        return 0.0
    unit = torch.finfo(merged.dtype).eps / 2 / math.sqrt(3)
    ratio = unit / (evidence.effect * max(abs(evidence.alpha or 0.0), 0.1))
    return min(0.9, ratio)


def _local(merged: Tensor, update: Update) -> str:
    """Errors that sit in few rows of a tensor are damage, not arithmetic."""
    if merged.ndim < 2 or update.rows < 8:
        return ""
    flat = update.matrix(merged)
    bad: list[int] = []
    for start, stop in blocks_of(update):
        target = update.target_rows(start, stop, torch.float64)
        allowed = half_ulp(target, merged.dtype) + update.product_error(start, stop)
        allowed = allowed + update.cast_error(start, stop, merged.dtype)
        beyond = ((flat[start:stop].double() - target).abs() > allowed).any(1)
        bad += (torch.nonzero(beyond).flatten() + start).tolist()
    if 0 < len(bad) <= update.rows // 4:
        span = f"row {bad[0]}" if len(bad) == 1 else f"rows {bad[0]} to {bad[-1]}"
        return f"wrong in {len(bad):,} of {update.rows:,} rows ({span}), right elsewhere"
    return ""


def _norm(merged: Tensor, update: Update) -> float:
    """|M - W| / |D|."""
    change = delta = 0.0
    flat = update.matrix(merged)
    for start, stop in blocks_of(update):
        base = update.base_rows(start, stop, torch.float64)
        change += float((flat[start:stop].double() - base).square().sum())
        delta += float((update.target_rows(start, stop, torch.float64) - base).square().sum())
    return math.sqrt(change / delta) if delta else math.inf


def _elsewhere(
    name: str, merged: Tensor, update: Update | None, base: Tensor, others: Mapping[str, Rows]
) -> str:
    """Another tensor's content, or its own turned round."""
    if merged.ndim < 2:
        return ""
    matrix = as_matrix if update is None else update.matrix
    head = matrix(merged)[:4].float()
    rows = head.shape[0]
    right = update.target_rows(0, rows, torch.float32) if update is not None else matrix(base)[:rows].float()
    if _distance(head, right) < CLOSE:
        return ""
    if merged.ndim == 2 and merged.shape[0] == merged.shape[1]:
        pieces = [_rows(update, base, start, stop)[:, :rows] for start, stop in blocks(merged.shape)]
        if _distance(head, torch.cat(pieces).T) < CLOSE:
            return "transposed"
    for other, content in others.items():
        if other != name and _distance(head, content(rows)) < CLOSE:
            return f"holds what belongs to {other}"
    return ""


def _rows(update: Update | None, base: Tensor, start: int, stop: int) -> Tensor:
    """Rows of what a tensor must be, fp32."""
    if update is not None:
        return update.target_rows(start, stop, torch.float32)
    return as_matrix(base)[start:stop].float()


def _distance(left: Tensor, right: Tensor) -> float:
    size = float(right.norm())
    return float((left - right).norm()) / size if size and left.shape == right.shape else math.inf


def summarise(found: Iterable[TensorEvidence]) -> tuple[str, ...]:
    """One line per diagnosis: the tensor named when there is one, counted when there are many."""
    grouped: dict[str, list[str]] = {}
    for evidence in found:
        if evidence.diagnosis:
            grouped.setdefault(evidence.diagnosis.split(" (")[0], []).append(evidence.name)
    lines = []
    for words, names in sorted(grouped.items(), key=lambda item: -len(item[1])):
        module = names[0].removesuffix(".weight")
        more = f" and {len(names) - 1:,} more" if len(names) > 1 else ""
        lines.append(f"{module}{more}: {words}")
    return tuple(lines)
