"""Heads, saved modules and LoRA's special forms, through PEFT's layers."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import gaps

LINEAR = ["q_proj", "v_proj", "down_proj"]


def outputs_agree(made: Any, output: Path, auto: str, plan: Any, **labels: Any) -> float:
    """Largest relative difference between the merged folder's outputs and those of base + adapter."""
    import transformers
    from peft import PeftModel

    config = json.loads((made.base / "config.json").read_text())
    (output / "config.json").write_text(json.dumps({**config, **plan.config_changes}))
    load = getattr(transformers, auto).from_pretrained
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # the base lacks the head, ties are about to part: the adapter's doing
        base = load(made.base, dtype=torch.float32, **labels)
        adapted = PeftModel.from_pretrained(base, made.adapter).eval()
        merged = load(output, dtype=torch.float32).eval()
    tokens = torch.arange(1, 9)[None]
    with torch.no_grad():
        expected, got = adapted(input_ids=tokens).logits, merged(input_ids=tokens).logits
    return float((got - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(
    ("peft_type", "config"),
    [
        ("IA3", {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
        ("BOFT", {"boft_block_size": 4, "boft_n_butterfly_factor": 1, "target_modules": LINEAR}),
        ("VERA", {"r": 4, "target_modules": LINEAR}),
        ("PSOFT", {"r": 4, "target_modules": LINEAR}),
    ],
)
def test_a_trained_head_joins_the_checkpoint(
    peft_type: str, config: dict[str, Any], bench: Callable[..., Any], tmp_path: Path
) -> None:
    """A sequence classifier on a language model: score is added, class and labels follow, outputs agree."""
    made = bench(
        peft_type, auto="AutoModelForSequenceClassification", labels=3, task_type="SEQ_CLS", **config
    )
    plan, merged = made.plan(), made.merge(tmp_path / "out")
    assert plan.consumed == plan.adapter_tensors
    assert merged["score.weight"].shape == (3, 16)
    assert plan.config_changes["architectures"] == ["LlamaForSequenceClassification"]
    assert len(plan.config_changes["id2label"]) == 3
    gap = outputs_agree(made, tmp_path / "out", "AutoModelForSequenceClassification", plan, num_labels=3)
    assert gap < 1e-4


def test_saved_modules_beside_another_method(bench: Callable[..., Any], tmp_path: Path) -> None:
    """modules_to_save replaces lm_head; the method's own targets are those PEFT chose, without it."""
    made = bench("LOHA", r=4, alpha=8, target_modules="all-linear", modules_to_save=["lm_head"])
    plan, merged, expected = made.plan(), made.merge(tmp_path / "out"), made.expected()
    assert plan.consumed == plan.adapter_tensors
    assert gaps(merged, expected) == {}
    assert not torch.equal(merged["lm_head.weight"], made.stored()["lm_head.weight"])


def test_saved_embeddings_part_from_a_tied_head(bench: Callable[..., Any], tmp_path: Path) -> None:
    made = bench(
        "IA3",
        changes={"tie_word_embeddings": True},
        target_modules=["k_proj"],
        feedforward_modules=[],
        modules_to_save=["embed_tokens"],
    )
    plan = made.plan()
    made.merge(tmp_path / "out")
    assert plan.config_changes["tie_word_embeddings"] is False
    assert outputs_agree(made, tmp_path / "out", "AutoModelForCausalLM", plan) < 1e-4


@pytest.mark.parametrize(
    "config",
    [
        {"r": 4, "bias": "lora_only"},
        {"r": 4, "bias": "all"},
        {"r": 4, "lora_bias": True},
        {"r": 4, "use_dora": True, "target_modules": ["q_proj", "embed_tokens"]},
        {"r": 4, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}, "use_rslora": True},
        {"r": 4, "trainable_token_indices": {"embed_tokens": [3, 5]}},
    ],
    ids=["bias lora_only", "bias all", "lora_bias", "dora", "patterns", "tokens"],
)
def test_lora_in_memory(config: dict[str, Any], bench: Callable[..., Any], tmp_path: Path) -> None:
    """The in-memory way covers LoRA's forms too."""
    from merge_adapter.types import Strategy

    config = {"target_modules": ["q_proj", "v_proj"], **config}
    made = bench("LORA", **config)
    plan = made.plan(Strategy.MEMORY)
    merged, expected = made.merge(tmp_path / "out", Strategy.MEMORY), made.expected()
    assert plan.strategy is Strategy.MEMORY
    assert plan.consumed == plan.adapter_tensors
    assert gaps(merged, expected) == {}


def test_kasa_is_initialised_from_each_weight(bench: Callable[..., Any], tmp_path: Path) -> None:
    from peft.tuners.lora.config import KasaConfig

    made = bench("LORA", r=4, target_modules=LINEAR, kasa_config=KasaConfig())
    merged, expected, stored = made.merge(tmp_path / "out"), made.expected(), made.stored()
    assert gaps(merged, expected) == {}
    assert sum(not torch.equal(merged[name], stored[name]) for name in merged) == 6


def test_block_diagonal_lora(bench: Callable[..., Any], tmp_path: Path) -> None:
    from peft.tuners.lora.config import BdLoraConfig

    blocks = BdLoraConfig(
        target_modules_bd_a=["down_proj"], target_modules_bd_b=["q_proj", "v_proj"], nblocks=2
    )
    made = bench("LORA", r=4, target_modules=LINEAR, use_bdlora=blocks)
    merged, expected, stored = made.merge(tmp_path / "out"), made.expected(), made.stored()
    assert gaps(merged, expected) == {}
    assert sum(not torch.equal(merged[name], stored[name]) for name in merged) == 6
