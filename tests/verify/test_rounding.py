"""The tolerance is the dtype's own: half an ulp, and one rounding."""

from __future__ import annotations

import pytest
import torch

from merge_adapter.verify.rounding import half_ulp, is_narrower, rounded

SIXTEEN = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", [*SIXTEEN, torch.float32])
def test_half_an_ulp_is_half_the_distance_to_the_next_number(dtype: torch.dtype) -> None:
    """Against torch's own nextafter, for zero, normal and subnormal values."""
    values = torch.tensor([0.0, 1.0, 1.5, 3.0, 0.1, 6e-8, 1e-4, 1000.0]).to(dtype)
    gap = torch.nextafter(values, torch.full_like(values, float("inf"))).double() - values.double()
    assert torch.equal(half_ulp(values.double(), dtype), gap / 2)


@pytest.mark.parametrize("dtype", SIXTEEN)
def test_rounding_from_fp64_happens_once(dtype: torch.dtype) -> None:
    """A value just above a tie goes up, though its fp32 form is the tie and would go to even."""
    bits = 8 if dtype == torch.bfloat16 else 11
    step = 2.0 ** (1 - bits)
    exact = torch.tensor([1 + step / 2 + 2.0**-40, -(1 + step / 2 + 2.0**-40)], dtype=torch.float64)
    assert exact.to(dtype).tolist() == [1, -1]
    assert rounded(exact, dtype).tolist() == [1 + step, -(1 + step)]


@pytest.mark.parametrize("dtype", SIXTEEN)
def test_rounding_never_errs_by_more_than_half_an_ulp(dtype: torch.dtype) -> None:
    """Over random values of many magnitudes."""
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(20000, generator=generator, dtype=torch.float64)
    exact = exact * 10 ** torch.randint(-6, 4, (20000,), generator=generator).double()
    error = (rounded(exact, dtype).double() - exact).abs()
    assert bool((error <= half_ulp(exact, dtype)).all())


def test_narrower_means_that_some_value_would_be_lost() -> None:
    """bf16 and fp16 each lose something of the other; fp32 loses nothing of either."""
    assert is_narrower(torch.bfloat16, torch.float32)
    assert is_narrower(torch.bfloat16, torch.float16)
    assert is_narrower(torch.float16, torch.bfloat16)
    assert not is_narrower(torch.float32, torch.bfloat16)
    assert not is_narrower(torch.float16, torch.float16)
