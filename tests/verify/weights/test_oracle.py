"""The oracle, against numbers worked out by hand and against PEFT's layers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from merge_adapter.types import Verdict
from merge_adapter.verify.memory.scratch import Scratch
from merge_adapter.verify.weights.diagnosis import Clues, explain
from merge_adapter.verify.weights.judging import Agreement, judge_kept, judge_update
from merge_adapter.verify.weights.low_rank import Dora, LowRank
from merge_adapter.verify.weights.recipe import recipe


def test_scale_is_alpha_over_r_or_over_its_root() -> None:
    """Plain and rsLoRA."""
    assert recipe({"r": 16, "lora_alpha": 8}, "q_proj").scale == 0.5
    assert recipe({"r": 16, "lora_alpha": 8, "use_rslora": True}, "q_proj").scale == 2


def test_patterns_match_whole_names_or_their_ends() -> None:
    """`q_proj` matches `a.q_proj` but not `aq_proj`; the first pattern that matches wins."""
    config = {"r": 8, "lora_alpha": 8, "rank_pattern": {"q_proj": 2, r"layers\.0\..*": 4}}
    assert recipe(config, "layers.0.q_proj").rank == 2
    assert recipe(config, "layers.0.v_proj").rank == 4
    assert recipe(config, "layers.1.aq_proj").rank == 8


def test_low_rank_by_hand() -> None:
    """W + left @ right, on paper."""
    update = LowRank(torch.zeros(2, 2), torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, 4.0]]))
    assert update.target_rows(0, 2, torch.float64).tolist() == [[3, 4], [6, 8]]
    assert update.target_rows(1, 2, torch.float64).tolist() == [[6, 8]]


@pytest.mark.parametrize("by_row", [True, False])
def test_dora_gives_each_output_the_norm_of_its_magnitude(by_row: bool) -> None:
    """Rows for a linear layer, columns for one stored transposed."""
    base = torch.tensor([[3.0, 4.0], [6.0, 8.0]])
    if not by_row:
        base = base.T.contiguous()
    update = Dora(
        base, torch.zeros(2, 1), torch.zeros(1, 2), magnitude=torch.tensor([1.0, 2.0]), by_row=by_row
    )
    norms = update.target_rows(0, 2, torch.float64).norm(dim=1 if by_row else 0)
    assert norms.tolist() == pytest.approx([1, 2])


@pytest.fixture
def update() -> LowRank:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(64, 96, generator=generator).bfloat16()
    left = torch.randn(64, 4, generator=generator, dtype=torch.float64) * 0.01
    return LowRank(base, left, torch.randn(4, 96, generator=generator, dtype=torch.float64))


def merged(update: LowRank, factor: float = 1.0) -> torch.Tensor:
    base = update.base.double()
    return base + factor * (update.target_rows(0, 64, torch.float64) - base)


def test_alpha_hat_is_the_share_of_the_update_that_was_merged(update: LowRank) -> None:
    """1 for all, 0 for none, 2 for twice, -1 for the wrong sign."""
    for factor in (1, 0, 2, -1):
        evidence = judge_update("w", merged(update, factor).bfloat16(), update)
        assert evidence.alpha == pytest.approx(factor, abs=0.02)
        assert (evidence.agreement is Agreement.EXACT) == (factor == 1)


def test_a_delta_cast_to_bf16_first_has_its_own_name(update: LowRank) -> None:
    """Neither exact nor wrong: what PEFT's merge does where it casts before it adds."""
    delta = (update.target_rows(0, 64, torch.float64) - update.base.double()).bfloat16()
    evidence = judge_update("w", update.base + delta, update)
    assert evidence.agreement is Agreement.CAST_FIRST
    assert evidence.wrong == 0 < evidence.cast_first


def test_one_unit_in_the_last_place_of_one_element_is_seen(update: LowRank) -> None:
    """The tolerance has no slack for a whole ulp."""
    made = merged(update).bfloat16()
    made.view(torch.int16)[5, 7] += 1
    evidence = judge_update("w", made, update)
    assert evidence.agreement is Agreement.WRONG
    assert evidence.wrong == 1


def test_retained_share_says_what_bf16_loses(update: LowRank) -> None:
    """An update a thousandth of its weight survives only in part."""
    small = LowRank(update.base, update.left * 0.02, update.right)
    evidence = judge_update("w", small.target_rows(0, 64, torch.float64).bfloat16(), small)
    assert evidence.agreement is Agreement.EXACT
    assert evidence.retained is not None
    assert evidence.retained < 0.9
    assert evidence.effect < 2e-3


def test_kept_tensors_are_compared_as_bytes() -> None:
    """NaN equals the same NaN, and -0 is not 0."""
    strange = torch.tensor([math.nan, -0.0, 1.0])
    assert judge_kept("w", strange.clone(), strange).agreement is Agreement.EXACT
    assert judge_kept("w", torch.tensor([math.nan, 0.0, 1.0]), strange).agreement is Agreement.WRONG


METHODS: dict[str, Callable[[Any], Any]] = {
    "LoHa": lambda p: p.LoHaConfig(
        r=4, alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"
    ),
    "LoKr": lambda p: p.LoKrConfig(
        r=4, alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"
    ),
    "IA3": lambda p: p.IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
    ),
    "OFT": lambda p: p.OFTConfig(oft_block_size=8, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "VeRA": lambda p: p.VeraConfig(r=8, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "tokens": lambda p: p.LoraConfig(
        r=4,
        target_modules=["q_proj"],
        trainable_token_indices={"embed_tokens": [3, 5]},
        task_type="CAUSAL_LM",
    ),
}


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("name", METHODS)
def test_other_methods_are_judged_by_peft_s_own_layer(
    name: str, dtype: str, random_merge: Callable[..., Any]
) -> None:
    """A right merge raises no alarm, and the base in its place is a fault."""
    import peft

    right = random_merge(METHODS[name](peft), dtype)
    result = right.judge()
    assert result.verdict is not Verdict.FAIL, result.reasons
    assert result.evidence["weights"]["verdict"] == "pass"
    assert result.evidence["weights"]["updated"] > 0
    base = right.sources.base.repository.origin.folder
    wrong = right.judge(base)
    assert wrong.verdict is Verdict.FAIL
    assert any("not merged" in reason for reason in wrong.reasons), wrong.reasons


@pytest.mark.parametrize("dora", [False, True])
def test_a_base_that_was_rounded_first_is_rounded_as_it_is_read(dora: bool) -> None:
    """The same figures as those of a base that is stored so, and no second base in memory."""
    torch.manual_seed(0)
    base, left, right = torch.randn(40, 24), torch.randn(40, 2), torch.randn(2, 24)
    size = torch.rand(40)

    def update(weight: Tensor) -> LowRank:
        return Dora(weight, left, right, magnitude=size) if dora else LowRank(weight, left, right)

    lazily, stored = update(base).on_rounded_base(torch.bfloat16), update(base.bfloat16())
    assert lazily.base is base
    at = torch.tensor([3, 39]), torch.tensor([0, 23])
    assert torch.equal(lazily.base_rows(0, 40, torch.float64), stored.base_rows(0, 40, torch.float64))
    assert torch.equal(lazily.target_rows(3, 9, torch.float64), stored.target_rows(3, 9, torch.float64))
    assert torch.equal(lazily.exact(*at), stored.exact(*at))
    points = [vars(each.points(*at, torch.bfloat16)) for each in (lazily, stored)]
    assert all(torch.equal(points[0][name], points[1][name]) for name in points[0])
    one, other = (each.single(0, 40, Scratch()) for each in (lazily, stored))
    assert torch.equal(one.target, other.target)
    assert (one.bound, one.largest) == (other.bound, other.largest)


def test_a_zero_of_the_other_sign_is_counted_and_named() -> None:
    """Bytes are compared, so it is told from zeros that were numbers before."""
    base = torch.tensor([0.0, 0.0, 1.0])
    merged = torch.tensor([0.0, -0.0, 1.0])
    for right, wrong, share in ((base, merged, "1 of 3"), (torch.zeros(3), -torch.zeros(3), "3 of 3")):
        found = explain(judge_kept("w", wrong, right), wrong, None, right, Clues(), {})
        assert found.agreement is Agreement.WRONG
        assert found.diagnosis == f"differs from the base in the sign of zeros alone ({share} elements)"
    assert explain(judge_kept("w", 0 * base, base), 0 * base, None, base, Clues(), {}).diagnosis == "zeroed"
