"""The oracle in a model's place: read from the merged tensor where that is known to be it, made where it is not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from merge_adapter.verify.outputs.placed import Known, dithered, once_rounded, place_oracle
from merge_adapter.verify.rounding import half_ulp, near_half_ulp, rounded
from merge_adapter.verify.weights.expectations import Expectations
from merge_adapter.verify.weights.judging import MOST_TIES, Agreement, judge_update
from merge_adapter.verify.weights.low_rank import Dora, LowRank
from merge_adapter.verify.weights.oracle import Update

CPU = torch.device("cpu")


def low_rank(dtype: torch.dtype, rows: int = 300) -> LowRank:
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(rows, 1031, generator=generator).to(dtype)
    left = torch.randn(rows, 5, generator=generator, dtype=torch.float64) * 0.007
    return LowRank(base, left, torch.randn(5, 1031, generator=generator).double())


def oracle(update: Update, dtype: torch.dtype) -> Tensor:
    return rounded(update.target_rows(0, update.shape[0], torch.float64), dtype)


def moved(tensor: Tensor, positions: list[int]) -> Tensor:
    """The same with some elements one step further from zero."""
    found = tensor.clone()
    bits = found.view(-1).view(torch.int16)
    bits[positions] += 1
    return found


def placed(update: Update, known: dict[str, Known]) -> Tensor:
    """What the model reads."""
    layer = nn.Linear(*reversed(update.shape), bias=False)
    expected = Expectations(updates={"weight": update})
    place_oracle(layer, expected, {"weight": update.base.dtype}, CPU, once_rounded, known)
    with torch.no_grad():
        return layer.weight * 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_merged_tensor_with_its_ties_put_right_is_the_oracle(dtype: torch.dtype) -> None:
    """Elements that the weights part found on the other side of a tie are those of the oracle again."""
    update = low_rank(dtype)
    once = oracle(update, dtype)
    positions = [0, 1030, 1031, 150_000, once.numel() - 1]
    merged = moved(once, positions)
    evidence = judge_update("weight", merged, update)
    assert evidence.ties is not None
    assert evidence.ties.positions.tolist() == positions
    assert torch.equal(placed(update, {"weight": Known(merged, evidence.ties)}), once.float())


def test_a_right_tensor_has_no_ties_and_one_with_many_keeps_none() -> None:
    """A merge that rounds its update first differs in every fiftieth element: those are counted."""
    update = low_rank(torch.bfloat16)
    once = oracle(update, torch.bfloat16)
    right = judge_update("weight", once, update)
    assert right.agreement is Agreement.EXACT
    assert right.ties is None
    many = moved(once, list(range(0, once.numel(), once.numel() // (2 * MOST_TIES))))
    evidence = judge_update("weight", many, update)
    assert evidence.differing > MOST_TIES
    assert evidence.ties is None


def test_what_is_not_known_is_made() -> None:
    """The same, but for elements that fp32 arithmetic puts on the other side of a tie."""
    update = low_rank(torch.bfloat16)
    made, once = placed(update, {}), oracle(update, torch.bfloat16).float()
    assert float((made != once).float().mean()) < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_the_ceiling_permits_is_what_the_weights_part_does(dtype: torch.dtype) -> None:
    """The fast form for LoRA against the plain one, in fp64."""
    update = low_rank(dtype)
    target, tolerance = update.loose_rows(7, 90, dtype)
    exact, allowed = Update.loose_rows(update, 7, 90, dtype)
    assert torch.allclose(target.double(), exact, rtol=1e-5, atol=1e-6)
    # near a power of two the two may see an element on different sides of it
    close = torch.isclose(tolerance.double(), allowed, rtol=1e-4, atol=0)
    assert float(close.float().mean()) > 0.9999


def test_half_an_ulp_by_the_exponent_s_bits_is_half_an_ulp() -> None:
    """Subnormal numbers and zero included."""
    values = torch.cat((torch.randn(1000), torch.tensor([0.0, 1.0, -2.0, 1e-39, 65504.0, 2.0**-20])))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        found, expected = near_half_ulp(values, dtype).double(), half_ulp(values, dtype)
        # half of the smallest fp32 number is none
        assert torch.allclose(found, expected, rtol=0, atol=2.0**-149)


@pytest.mark.parametrize("kind", ["LoRA", "DoRA"])
def test_the_ceiling_stays_within_what_the_weights_part_permits(kind: str) -> None:
    """And reaches far: its error is that of elements spread evenly over the tolerance. The same at every read."""
    update = low_rank(torch.bfloat16)
    if kind == "DoRA":
        norms = update.base.double().norm(dim=1)
        update = Dora(update.base, update.left, update.right, magnitude=norms * 1.01)
    how = dithered(3)
    rows = torch.cat([how(update, "weight", start, start + 100, torch.bfloat16) for start in (0, 100, 200)])
    again = torch.cat([how(update, "weight", start, start + 100, torch.bfloat16) for start in (0, 100, 200)])
    assert torch.equal(rows, again)
    target, tolerance = Update.loose_rows(update, 0, 300, torch.bfloat16)
    error = (rows.double() - target).abs()
    # rounding comes on top of what was added
    assert bool((error <= tolerance * 1.001 + half_ulp(target, torch.bfloat16) * 2).all())
    assert float((error / tolerance).mean()) > 0.4
    assert not torch.equal(rows, dithered(4)(update, "weight", 0, 300, torch.bfloat16))
