"""A row block judged in fp32: which of its elements fp32 cannot vouch for.

Rounding is monotone. If the oracle's fp32 value less its error bound and plus its error bound both round to the bits
that are stored, so does the exact value between them, and the element is right without anyone having computed it
exactly. What is left, a few elements in a hundred thousand of a right merge, is named for a judgement in fp64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from merge_adapter.verify.memory.scratch import Scratch
from merge_adapter.verify.rounding import UNIT32
from merge_adapter.verify.weights.oracle import Single

MOST = 8
"""A block with more than one suspect in this many elements is cheaper judged whole."""

SCREENED = (torch.bfloat16, torch.float16)
"""Stored dtypes that are coarse enough for fp32 to vouch for most elements."""


@dataclass(frozen=True)
class Products:
    """Inner products over one block, of the base W, the update D and the error E = M - T."""

    ww: float
    dd: float
    ed: float
    ee: float


@dataclass(frozen=True)
class Screened:
    """What fp32 could tell of a block."""

    products: Products
    suspects: Tensor
    """Flat positions within the block that fp64 must judge, int64."""


def screen(merged: Tensor, single: Single, scratch: Scratch) -> Screened | None:
    """Screen `merged` (rows, rest), 16 bit; None when the block must be judged whole. Overwrites `single.target`."""
    suspects = _suspects(merged, single, scratch)
    if suspects.numel() * MOST > merged.numel():
        return None
    error = scratch.floats("error", merged.shape).copy_(merged).sub_(single.target)
    products = inner_products(single.base, single.delta, error)
    # infinities and NaNs, also those that the exact value rounds to, are no matter of tolerances
    return Screened(products, suspects) if math.isfinite(products.ee + products.dd) else None


def inner_products(base: Tensor, delta: Tensor, error: Tensor) -> Products:
    """Over whole blocks of one dtype."""
    return Products(_dot(base, base), _dot(delta, delta), _dot(error, delta), _dot(error, error))


def _dot(left: Tensor, right: Tensor) -> float:
    return float(torch.dot(left.flatten(), right.flatten()))


def _suspects(merged: Tensor, single: Single, scratch: Scratch) -> Tensor:
    """Positions where the bits stored are not those of both ends of the interval that holds the exact value."""
    # moving the ends rounds too, by a unit of what they have grown to
    reach = single.bound + 2 * UNIT32 * (single.largest + single.bound)
    stored = merged.reshape(-1).view(torch.int16)
    size = stored.numel()
    # padded, so that four elements can be looked at in one
    marks = scratch.take("marks", torch.Size((-(-size // 4) * 4,)), torch.int16)
    marks[size:] = 0
    moved = scratch.floats("error", merged.shape)
    narrow = scratch.take("narrow", merged.shape, merged.dtype)
    bits = narrow.view(-1).view(torch.int16)
    torch.add(single.target, -reach, out=moved)
    torch.bitwise_xor(_bits(narrow, moved, bits), stored, out=marks[:size])
    torch.add(single.target, reach, out=moved)
    marks[:size].bitwise_or_(_bits(narrow, moved, bits).bitwise_xor_(stored))
    found = torch.nonzero(marks.view(torch.int64)).flatten()
    near = (found[:, None] * 4 + torch.arange(4)).flatten()
    return near[marks[near] != 0]


def _bits(narrow: Tensor, wide: Tensor, bits: Tensor) -> Tensor:
    """Round `wide` into `narrow` and return `bits`, its integer view."""
    narrow.copy_(wide)
    return bits
