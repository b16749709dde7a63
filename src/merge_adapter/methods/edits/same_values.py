"""Whether edits of two tied parameters say the same, by the values in the adapter's file."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from merge_adapter.methods.change import Weights
from merge_adapter.methods.edits.placing import Edit
from merge_adapter.methods.lora.arithmetic import LowRank, NewRows


def equal_edits(weights: Weights, left: Sequence[Edit], right: Sequence[Edit]) -> bool:
    """Whether both change their parameter in the same way, bit for bit; False where that cannot be told.

    PEFT ties the factors of an embedding `[r, tokens]` to the transposed ones of the head `[tokens, r]`.
    """
    return len(left) == len(right) and all(
        _equal(weights, one, other) for one, other in zip(left, right, strict=True)
    )


def _equal(weights: Weights, left: Edit, right: Edit) -> bool:
    one, other = left.arithmetic, right.arithmetic
    if one is None and other is None:
        frozen = left.follows_ties and right.follows_ties  # the base's, which were one tensor in training
        return frozen or _equal_tensors(weights, left.consumes[0], right.consumes[0])
    if isinstance(one, NewRows) and isinstance(other, NewRows):
        return one.rows == other.rows and _equal_tensors(weights, one.source, other.source)
    if not isinstance(one, LowRank) or not isinstance(other, LowRank):
        return False
    if one.scale != other.scale or one.magnitude or other.magnitude:  # DoRA's norms run along other axes
        return False
    turned = one.transposed != other.transposed
    return _equal_tensors(weights, one.left, other.left, turned=turned) and _equal_tensors(
        weights, one.right, other.right, turned=turned
    )


def _equal_tensors(weights: Weights, left: str, right: str, *, turned: bool = False) -> bool:
    one, other = weights.read(left), weights.read(right)
    return torch.equal(one, other.T if turned else other)
