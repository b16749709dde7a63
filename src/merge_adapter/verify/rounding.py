"""How far a correct value may lie from the exact one: the only place of the gate where dtypes have numbers."""

from __future__ import annotations

import torch
from torch import Tensor

UNIT32 = 2.0**-24
"""Largest relative error of one rounding to fp32."""

_PRECISION = {
    torch.bfloat16: (8, -126),
    torch.float16: (11, -14),
    torch.float32: (24, -126),
    torch.float64: (53, -1022),
}
"""Significant bits, and the exponent of the smallest normal number."""


def unit(dtype: torch.dtype) -> float:
    """Largest relative error of one rounding to `dtype`."""
    return 2.0 ** -_PRECISION[dtype][0]


def half_ulp(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Half the spacing of `dtype` around each element: the largest error of one rounding to nearest. fp64."""
    bits, smallest = _PRECISION[dtype]
    # frexp gives a mantissa in [0.5, 1), so the exponent in the usual sense is one less
    exponent = torch.frexp(exact.double()).exponent.sub_(1).clamp_(min=smallest)
    # it calls zero's exponent 0; around zero numbers lie as close as among the smallest
    exponent.masked_fill_(exact == 0, smallest)
    return torch.ldexp(torch.ones(exponent.shape, dtype=torch.float64), exponent - bits)


def near_half_ulp(near: Tensor, dtype: torch.dtype) -> Tensor:
    """The same for fp32 values, in fp32 and fast: the power of two below each is its exponent's bits alone."""
    bits, smallest = _PRECISION[dtype]
    powers = (near.view(torch.int32) & 0x7F800000).view(torch.float32)
    return powers.clamp_(min=2.0**smallest).mul_(2.0**-bits)


def rounded(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Each element rounded once to `dtype`; from fp64 through a conversion that rounds to odd first.

    torch converts fp64 to 16 bit by way of fp32, which rounds twice. Making the fp32 step round to odd (its last bit
    set whenever it was inexact) makes the second rounding see the truth.
    """
    if dtype in (torch.float32, torch.float64) or exact.dtype != torch.float64:
        return exact.to(dtype)
    single = exact.float()
    error = exact - single.double()
    bits = single.view(torch.int32)
    inexact = (error != 0) & (bits & 1 == 0) & torch.isfinite(single)
    # step toward the exact value, which makes the last bit odd
    outward = torch.where((error > 0) == (exact > 0), 1, -1).to(torch.int32)
    return torch.where(inexact, bits + outward, bits).view(torch.float32).to(dtype)


def is_narrower(dtype: torch.dtype, than: torch.dtype) -> bool:
    """True when `dtype` cannot hold every value of `than`."""
    if dtype == than:
        return False
    keeps = {
        torch.float64: {torch.float32, torch.float16, torch.bfloat16},
        torch.float32: {torch.float16, torch.bfloat16},
    }
    return than not in keeps.get(dtype, set())
