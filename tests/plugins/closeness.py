"""How far tensors may be apart that were computed in the same way, on any processor.

The same sum comes out otherwise in its last bit where the vector units are wider, where a library has another
kernel, and by how memory is aligned. Exactly equal is only what was copied.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

FLOAT32_GAP = 2.0**-18
"""Of the largest value of a tensor: 64 times half a unit in the last place. Observed: up to 4. The updates that
tests make are at least a thousandth."""
FLIPPED = 2.0**-8
"""Share of the elements of a 16-bit tensor that may be rounded to the neighbour: those next to the middle between two
values (a gap in float32 turns one of 65,000). A second rounding would turn one of four."""
_UNIT = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
"""The distance to the neighbour, at most, as a share of the value."""


def gaps(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """The tensors of `found` that are further apart from those of `expected` than that, with the largest difference."""
    apart = {}
    for name, value in found.items():
        wanted = expected[name]
        assert (value.dtype, value.shape) == (wanted.dtype, wanted.shape), name
        if not torch.equal(value, wanted) and not _as_good_as_equal(value, wanted):
            apart[name] = float((value.double() - wanted.double()).abs().max())
    return apart


def _as_good_as_equal(value: torch.Tensor, wanted: torch.Tensor) -> bool:
    off = (value.double() - wanted.double()).abs()
    largest = float(wanted.double().abs().max())
    if value.dtype is torch.float32:
        return bool(off.max() <= largest * FLOAT32_GAP)
    if value.dtype not in _UNIT:
        return False
    neighbour = wanted.double().abs() * _UNIT[value.dtype] + largest * FLOAT32_GAP
    return bool((off <= neighbour).all()) and int((off > 0).sum()) <= max(2, value.numel() * FLIPPED)
