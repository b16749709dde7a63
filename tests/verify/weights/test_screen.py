"""Screening in fp32 changes what a judgement costs, never what it says."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict

import pytest
import torch
from torch import Tensor

from merge_adapter.verify.memory.scratch import Scratch
from merge_adapter.verify.rounding import rounded
from merge_adapter.verify.weights.computed import Computed, Merges
from merge_adapter.verify.weights.judging import Agreement, TensorEvidence, judge_update
from merge_adapter.verify.weights.low_rank import Dora, LowRank, LowRankStack
from merge_adapter.verify.weights.oracle import Replaced, Update
from merge_adapter.verify.weights.screen import screen

SIXTEEN = [torch.bfloat16, torch.float16]

FIGURES = 1e-5
"""Relative: what sums in fp32 over a block may lose of figures that the report shows with four digits."""

COUNTED = ("agreement", "elements", "wrong", "cast_first", "differing", "finite", "oracle")


def low_rank(dtype: torch.dtype, rows: int = 130, columns: int = 1031, scale: float = 0.01) -> LowRank:
    """More than one block, a number of elements that four does not divide, and a scale that is no power of two."""
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(rows, columns, generator=generator).to(dtype)
    left = torch.randn(rows, 5, generator=generator, dtype=torch.float64) * scale * 0.7
    return LowRank(base, left, torch.randn(5, columns, generator=generator).double())


def stack(dtype: torch.dtype) -> LowRankStack:
    """Thirteen matrices of ten rows: blocks end in the middle of one."""
    plain = low_rank(dtype)
    generator = torch.Generator().manual_seed(4)
    right = torch.randn(13, 5, 1031, generator=generator).double()
    return LowRankStack(plain.base.view(13, 10, 1031), plain.left, right)


def dora(dtype: torch.dtype, *, by_row: bool) -> Dora:
    plain = low_rank(dtype)
    norms = plain.base.double().norm(dim=1 if by_row else 0)
    return Dora(plain.base, plain.left, plain.right, magnitude=norms * 1.01, by_row=by_row)


def computed(dtype: torch.dtype) -> Computed:
    plain = low_rank(dtype)
    target = plain.target_rows(0, 130, torch.float64)
    native = plain.base + (target - plain.base.double()).to(dtype)
    return Computed(plain.base, lambda _: Merges(target, native, target.float()))


def replaced(dtype: torch.dtype) -> Replaced:
    plain = low_rank(dtype)
    return Replaced(plain.base, plain.target_rows(0, 130, torch.float64).float())


UPDATES: dict[str, Callable[[torch.dtype], Update]] = {
    "LoRA": low_rank,
    "LoRA, update below an ulp": lambda dtype: low_rank(dtype, scale=1e-4),
    "LoRA, update larger than the base": lambda dtype: low_rank(dtype, scale=3.0),
    "LoRA, a stack": stack,
    "DoRA": lambda dtype: dora(dtype, by_row=True),
    "DoRA, transposed": lambda dtype: dora(dtype, by_row=False),
    "PEFT's layer": computed,
    "stored whole": replaced,
}


def exact(update: Update) -> Tensor:
    return update.target_rows(0, update.rows, torch.float64)


def before(update: Update) -> Tensor:
    return update.matrix(update.base)


def once(update: Update) -> Tensor:
    return rounded(exact(update), update.base.dtype)


def added_in_fp32(update: Update) -> Tensor:
    delta = exact(update) - before(update).double()
    return (before(update).float() + delta.float()).to(update.base.dtype)


def cast_first(update: Update) -> Tensor:
    return before(update) + (exact(update) - before(update).double()).to(update.base.dtype)


def spoiled(*changes: tuple[int, int, float]) -> Callable[[Update], Tensor]:
    def make(update: Update) -> Tensor:
        merged = once(update)
        for row, column, value in changes:
            merged[row, column] = value
        return merged

    return make


def off_by_one(update: Update) -> Tensor:
    merged = once(update)
    merged.view(torch.int16)[7, 11] += 1
    merged.view(torch.int16)[129, 1030] -= 1
    return merged


MERGES: dict[str, Callable[[Update], Tensor]] = {
    "rounded once": once,
    "added in fp32": added_in_fp32,
    "update cast first": cast_first,
    "one unit of the last place": off_by_one,
    "not merged": lambda update: before(update).clone(),
    "twice": lambda update: (2 * exact(update) - before(update).double()).to(update.base.dtype),
    "a tenth too strong": lambda update: (1.1 * exact(update) - 0.1 * before(update).double()).to(
        update.base.dtype
    ),
    "zeroed": lambda update: torch.zeros_like(before(update)),
    "NaN": spoiled((3, 3, math.nan)),
    "infinity": spoiled((0, 0, math.inf), (129, 1030, -math.inf)),
    "one zero": spoiled((64, 500, 0.0)),
}


def agree(fast: TensorEvidence, plain: TensorEvidence) -> None:
    left, right = asdict(fast), asdict(plain)
    for name in COUNTED:
        assert left[name] == right[name], name
    for name in ("worst", "effect", "alpha", "retained", "residual"):
        assert left[name] == pytest.approx(right[name], rel=FIGURES, abs=FIGURES, nan_ok=True), name
    # a square root of what is left when two sums cancel
    assert left["stray"] == pytest.approx(right["stray"], abs=math.sqrt(FIGURES), nan_ok=True)


@pytest.mark.parametrize("dtype", SIXTEEN)
@pytest.mark.parametrize("kind", UPDATES)
@pytest.mark.parametrize("merge", MERGES)
def test_screened_and_plain_fp64_agree(merge: str, kind: str, dtype: torch.dtype) -> None:
    """Agreement, counts and figures, for right merges, PEFT's rounding and every sort of damage."""
    update = UPDATES[kind](dtype)
    merged = MERGES[merge](update)
    agree(judge_update("w", merged, update), judge_update("w", merged, update, screened=False))


@pytest.mark.parametrize("dtype", SIXTEEN)
def test_values_next_to_a_tie_are_judged_by_the_exact_one(dtype: torch.dtype) -> None:
    """Sums that fp32 takes for a tie, though they lie a trifle above or below it, either way round."""
    half = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-11
    trifles = torch.tensor([0.0, 2.0**-40, -(2.0**-40), 2.0**-26, -(2.0**-26), -half, -half + 2.0**-50, half])
    right = (half + trifles.double())[None]
    base = (
        torch.tensor([[1.0], [-1.0], [1.0 + 2 * half], [-1.0 - 2 * half]]).expand(4, 8).contiguous().to(dtype)
    )
    update = LowRank(base, torch.tensor([[1.0], [-1.0], [1.0], [-1.0]], dtype=torch.float64), right)
    best = judge_update("w", once(update), update)
    assert best.agreement is Agreement.EXACT
    naive = (base.float() + (update.left @ update.right).float()).to(dtype)
    fast = judge_update("w", naive, update)
    # fp32 sees neither 2^-40 nor 2^-26 beside 1: in each row two sums go to even, against the exact value
    assert fast.agreement is Agreement.ROUNDED
    assert fast.differing == 8
    agree(fast, judge_update("w", naive, update, screened=False))


@pytest.mark.parametrize("dtype", SIXTEEN)
def test_nothing_that_differs_escapes_the_screen(dtype: torch.dtype) -> None:
    """Each element that is not the once-rounded oracle is among the suspects, whatever fp32 made of it."""
    for kind in UPDATES:
        update = UPDATES[kind](dtype)
        merged = once(update)
        chosen = torch.randperm(merged.numel(), generator=torch.Generator().manual_seed(2))[:500]
        flat = merged.flatten().view(torch.int16)
        flat[chosen] += 1
        scratch = Scratch()
        found = screen(merged, update.single(0, 130, scratch), scratch)
        assert found is not None
        assert set(chosen.tolist()) <= set(found.suspects.tolist())


def test_the_error_bound_of_a_block_holds() -> None:
    """fp32 against fp64, for factors of very different sizes."""
    generator = torch.Generator().manual_seed(3)
    for size in (1e-6, 1e-2, 1.0, 1e3):
        for kind in ("LoRA", "LoRA, a stack", "DoRA", "DoRA, transposed", "PEFT's layer", "stored whole"):
            update = UPDATES[kind](torch.bfloat16)
            if isinstance(update, LowRank):
                update.left = update.left * torch.rand(130, 5, generator=generator).double() * size
                update.__dict__.pop("factor", None)
            single = update.single(0, 130, Scratch())
            error = (single.target.double() - exact(update)).abs().max()
            assert 0 < float(error) <= single.bound or kind == "stored whole"


def test_an_overflow_of_the_stored_dtype_is_a_fault() -> None:
    """A sum beyond fp16's range: the infinity that rounding gives is not a weight."""
    base = torch.full((8, 8), 60000.0).half()
    update = LowRank(base, torch.full((8, 1), 100.0).double(), torch.full((1, 8), 100.0).double())
    merged = once(update)
    assert bool(merged.isinf().all())
    for screened in (True, False):
        evidence = judge_update("w", merged, update, screened=screened)
        assert evidence.agreement is Agreement.WRONG
        assert not evidence.finite
