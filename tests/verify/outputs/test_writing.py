"""Greedy text that begins where another's ends."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from merge_adapter.types import Verdict
from merge_adapter.verify import VerifySettings
from merge_adapter.verify.models.kinds import Kind
from merge_adapter.verify.models.loading import load_model
from merge_adapter.verify.outputs.answers import continued, greedy, taught
from merge_adapter.verify.outputs.greedy import judge_written
from merge_adapter.verify.outputs.reading import Written
from merge_adapter.verify.outputs.separate import Merged
from merge_adapter.verify.probes.batch import Batch

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(lm_base: Path) -> object:
    return load_model(lm_base, Kind.CAUSAL, dtype=torch.float32).model


@pytest.fixture
def prompts() -> Batch:
    """Two, the second padded on the left."""
    ids = torch.tensor([[20, 21, 22, 23], [0, 0, 24, 25]])
    return Batch(ids, torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]]))


@pytest.mark.parametrize("wrong", [0, 3, 7])
def test_a_model_writes_on_from_where_it_departs(model: object, prompts: Batch, wrong: int) -> None:
    """Another's text that differs from some place on: what comes out is what the model writes by itself."""
    own, _ = greedy(model, prompts, 8, CPU)
    other = own.clone()
    other[1, wrong:] = (other[1, wrong:] + 1) % 2048
    choices = taught(model, prompts, other, CPU)
    assert torch.equal(continued(model, prompts, other, choices, CPU), own)


def test_equal_text_is_not_written_again(prompts: Batch) -> None:
    """No model is asked."""
    text = torch.arange(6).reshape(2, 3)
    assert torch.equal(continued(None, prompts, text, text, CPU), text)


@pytest.mark.parametrize("positions", [6, 20])
def test_text_fits_a_model_with_few_positions(
    positions: int,
    sources_of: Callable[..., Any],
    reported: Callable[..., Any],
    silence: Callable[[], Any],
    tmp_path: Path,
) -> None:
    """Prompt and continuation share them: neither runs past the end."""
    import peft
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=200, n_positions=positions, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    with silence():
        base = transformers.GPT2LMHeadModel(config)
        base.save_pretrained(tmp_path / "base")
        lora = peft.LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["c_attn"], fan_in_fan_out=True)
        model = peft.get_peft_model(base, lora)
        for name, value in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(value, std=0.3)
        model.save_pretrained(tmp_path / "adapter")
        model.merge_and_unload().save_pretrained(tmp_path / "merged")
    sources = sources_of(tmp_path / "adapter", tmp_path / "base")
    result = reported(tmp_path / "merged", sources, VerifySettings(isolated=False))
    assert result.verdict is Verdict.PASS, result.reasons
    greedy = result.evidence["greedy"]
    assert greedy["tokens"] == (positions - 2) // 2
    assert greedy["equal"] == greedy["of"] == 4


@pytest.mark.parametrize(("parts", "equal", "tokens"), [(5, 1, 4), (3, 0, 3), (1, 0, 1), (None, 1, 4)])
def test_what_comes_after_the_end_of_text_is_not_compared(
    parts: int | None, equal: int, tokens: int, lm_base: Path, prompts: Batch
) -> None:
    """A person sees the text up to there: texts that look the same are the same, and no warning says otherwise."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(lm_base)
    text = torch.tensor([[30, 31, 32, tokenizer.eos_token_id, 33, 34, 35, 36]])
    choices = text.clone()
    if parts is not None:
        choices[0, parts:] += 7
    own = Merged(choices=choices, written=choices)
    findings, found = judge_written(Written(prompts.part(0, 1), text, torch.ones(1, 8)), 0.1, own, tokenizer)
    assert found["equal"] == equal
    [row] = found["texts"]
    assert row["equal_tokens"] == tokens
    assert (row["reference"] == row["merged"]) is bool(equal)
    assert len(findings) == ("gap" in row) == 1 - equal
