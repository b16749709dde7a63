"""Faults that the gate injects into itself: made as they say, caught, and told where they are not."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from merge_adapter.types import Verdict
from merge_adapter.verify import VerifySettings
from merge_adapter.verify.findings import Weight
from merge_adapter.verify.weights.expectations import Expectations
from merge_adapter.verify.weights.low_rank import LowRank
from merge_adapter.verify.weights.mutants import (
    LARGEST,
    MUTANTS,
    SHOWN,
    faulty_rows,
    judge_mutants,
    left_out,
    run_mutants,
    swapped,
)


def update(*ranks: int, seed: int = 0, strength: float = 0.05) -> LowRank:
    """A weight of (24, 16) with the updates of adapters of these ranks on it."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    total = sum(ranks)
    return LowRank(drawn(24, 16).float(), strength * drawn(24, total), drawn(total, 16), ranks=ranks)


def test_a_left_out_adapter_is_the_merge_without_it() -> None:
    """Each of three, by its own columns of the factors; a tensor that it leaves alone is no place for the fault."""
    one = update(2, 0, 3)
    expected = Expectations(updates={"a": one})
    mutants = left_out(expected)
    assert [mutant.fits(one) for mutant in mutants] == [True, False, True]
    rest = one.base.double() + one.left[:, 2:] @ one.right[2:]
    found = faulty_rows(mutants[0], one, 0, 24, torch.float64, 0)
    torch.testing.assert_close(found, rest, rtol=1e-12, atol=1e-12)
    names = [outcome.fault for outcome in run_mutants(expected, {"a": torch.float32}, 0)]
    assert names[len(MUTANTS) :] == [
        "adapter 1 left out: the update of the other 2 alone",
        "adapter 3 left out: the update of the other 2 alone",
    ]


def test_a_single_adapter_cannot_be_one_of_several() -> None:
    assert left_out(Expectations(updates={"a": update()})) == ()


def test_layers_change_places_with_the_next_of_their_shape() -> None:
    first, second = update(2, seed=1), update(2, seed=2)
    expected = Expectations(updates={"a": first, "b": second})
    mutant = swapped(expected)
    found = faulty_rows(mutant, first, 3, 9, torch.float64, 0)
    assert torch.equal(found, second.target_rows(3, 9, torch.float64))
    assert not swapped(Expectations(updates={"a": first})).fits(first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_every_fault_is_caught_in_every_dtype(dtype: torch.dtype) -> None:
    """By the weights part, on its own."""
    expected = Expectations(updates={f"layer.{at}": update(2, 2, seed=at, strength=0.3) for at in range(4)})
    for one in expected.updates.values():
        one.base = one.base.to(dtype)
    outcomes = run_mutants(expected, dict.fromkeys(expected.updates, dtype), 0, full=True)
    assert len(outcomes) == len(MUTANTS) + len(SHOWN) + 2 + 1
    for outcome in outcomes:
        assert outcome.weights == outcome.tried == 3, outcome
    assert not list(judge_mutants(outcomes))


def test_faults_are_made_where_the_adapter_changes_something() -> None:
    """A tower that was shown no pictures, experts that were never chosen: nothing of theirs could be merged wrongly."""
    strengths = {"vision.0": 0.0, "a": 0.3, "vision.1": 0.0, "b": 0.3, "vision.2": 0.0}
    expected = Expectations(
        updates={
            name: update(2, seed=at, strength=strength)
            for at, (name, strength) in enumerate(strengths.items())
        }
    )
    outcomes = run_mutants(expected, dict.fromkeys(strengths, torch.float32), 0)
    assert {outcome.tried for outcome in outcomes} == {2}
    assert not list(judge_mutants(outcomes))


def test_a_fault_that_goes_unseen_is_told() -> None:
    """Too small for the dtype: those of every run leave the answer open, the others are pointed out."""
    expected = Expectations(updates={"a": update(2, strength=1e-7)})
    expected.updates["a"].base = expected.updates["a"].base.bfloat16()
    found = {
        f.subject.split(":")[0]: f.weight
        for f in judge_mutants(run_mutants(expected, {"a": torch.bfloat16}, 0, full=True))
    }
    assert found["no-op"] is Weight.UNDECIDED
    assert found["scaled by 0.9"] is Weight.WARNING
    assert "element" not in found


def test_two_adapters_merged_at_once_are_each_left_out(
    good: Callable[[str], Any], sources_of: Any, reported: Any, silence: Any, tmp_path: Path
) -> None:
    """PEFT's merge of both passes; a gate that would miss one of them would say so."""
    import peft
    import transformers

    right = good("lm-bf16")
    base = right.sources.base.repository.origin.folder
    with silence():
        for at in range(2):
            torch.manual_seed(at)
            config = peft.LoraConfig(r=2 + at, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
            one = peft.get_peft_model(
                transformers.AutoModelForCausalLM.from_pretrained(base, dtype="auto"), config
            )
            for name, value in one.named_parameters():
                if "lora_B" in name:
                    value.data.normal_(std=0.1)
            one.save_pretrained(tmp_path / f"adapter{at}")
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        for at in range(2):
            model = peft.PeftModel.from_pretrained(model, tmp_path / f"adapter{at}").merge_and_unload()
        model.to(torch.bfloat16).save_pretrained(tmp_path / "merged")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (base / name).exists():
            shutil.copy(base / name, tmp_path / "merged" / name)
    sources = sources_of(tmp_path / "adapter0", base, tmp_path / "adapter1")
    settings = VerifySettings(isolated=False, probe_tokens=128, greedy_tokens=0, full_mutants=True)
    result = reported(tmp_path / "merged", sources, settings)
    assert result.verdict is Verdict.PASS, result.reasons
    mutants = {entry["fault"].split(":")[0]: entry for entry in result.evidence["mutants"]}
    for name in ("adapter 1 left out", "adapter 2 left out"):
        assert {"weights", "outputs"} <= set(mutants[name]["caught_by"]), mutants[name]


def test_a_fault_is_made_where_the_update_does_something() -> None:
    """Not in tensors whose update is zero, and of a large one not in rows that nothing is added to."""
    large = replace(update(2), ranks=())
    idle = replace(large, left=torch.zeros_like(large.left))
    rows = LARGEST // large.width + 600
    left = torch.zeros(rows, 2, dtype=torch.float64)
    left[-1] = 1  # a token that was added to the vocabulary
    tokens = LowRank(torch.ones(rows, large.width), left, large.right)
    updates = {"idle": idle, "large": large, "idle too": idle, "tokens": tokens, "idle as well": idle}
    outcomes = run_mutants(Expectations(updates=dict(updates)), dict.fromkeys(updates, torch.float32), 0)
    assert all(outcome.weights == outcome.tried == 2 for outcome in outcomes)
    assert list(judge_mutants(outcomes)) == []
    alone = run_mutants(Expectations(updates={"idle": idle}), {"idle": torch.float32}, 0)
    assert [finding.weight for finding in judge_mutants(alone)] == [Weight.UNDECIDED] * len(alone)
