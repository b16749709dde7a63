"""LoRA's family in closed form: equal to PEFT's merge, and the merged model answers as base + adapter does."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from merge_adapter.methods.change import Kind
from merge_adapter.types import Strategy

LINEAR = ["q_proj", "v_proj", "down_proj", "up_proj"]
ALL = "all-linear"

CASES: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ALL},
    "rslora": {"target_modules": LINEAR, "use_rslora": True},
    "patterns": {
        "target_modules": LINEAR,
        "rank_pattern": {"q_proj": 6, r"layers\.1\.mlp.*": 2, "^model.layers.0.self_attn.v_proj": 3},
        "alpha_pattern": {"up_proj": 3, r"layers\.\d\.self_attn\.v_proj": 32},
    },
    "patterns with rslora": {
        "target_modules": LINEAR, "use_rslora": True, "rank_pattern": {"down_proj": 2}, "alpha_pattern": {"q_proj": 1},
    },
    "regex targets": {"target_modules": r".*layers\.1\..*(q|k)_proj"},
    "layers_to_transform": {"target_modules": LINEAR, "layers_to_transform": [1], "layers_pattern": "layers"},
    "lora_bias": {"target_modules": ["q_proj", "v_proj"], "lora_bias": True},
    "bias=all": {"target_modules": LINEAR, "bias": "all"},
    "bias=lora_only": {"target_modules": LINEAR, "bias": "lora_only"},
    "lora_bias and bias=lora_only": {"target_modules": ["k_proj"], "lora_bias": True, "bias": "lora_only"},
    "dora": {"target_modules": LINEAR, "use_dora": True},
    "dora with rslora": {"target_modules": LINEAR, "use_dora": True, "use_rslora": True},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "dora on the embedding": {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True},
    "lm_head": {"target_modules": ["lm_head"]},
    "modules_to_save": {"target_modules": LINEAR, "modules_to_save": ["lm_head", "embed_tokens"]},
    "modules_to_save, a norm": {"target_modules": LINEAR, "modules_to_save": ["input_layernorm"]},
    "trained tokens": {"target_modules": LINEAR, "trainable_token_indices": [7, 3, 40]},
    "trained tokens by name": {"target_modules": LINEAR, "trainable_token_indices": {"embed_tokens": [5, 1]}},
    "orthogonal": {"target_modules": LINEAR, "init_lora_weights": "orthogonal"},
    "gaussian": {"target_modules": LINEAR, "init_lora_weights": "gaussian"},
    "mica": {"target_modules": LINEAR, "init_lora_weights": "mica"},
    "velora": {"target_modules": LINEAR, "velora_config": {"num_groups": 4}},
}  # fmt: skip
GPT2_CASES: dict[str, dict[str, Any]] = {
    "conv1d": {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
    "conv1d, square": {"target_modules": ["attn.c_proj"], "fan_in_fan_out": True},
    "conv1d, lora_bias": {"target_modules": ["c_attn"], "fan_in_fan_out": True, "lora_bias": True},
    "conv1d, dora": {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "use_dora": True},
}
TIED_CASES: dict[str, dict[str, Any]] = {
    "embedding alone": {"target_modules": ["embed_tokens"]},
    "lm_head alone": {"target_modules": ["lm_head"]},
    "embedding and lm_head": {"target_modules": ["embed_tokens", "lm_head"]},
    "trained lm_head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "trained embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "both trained": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "dora on the embedding": {"target_modules": ["embed_tokens"], "use_dora": True},
    "nothing tied touched": {"target_modules": ["q_proj"]},
}
"""What parts the embedding from the head, on a base that ties them."""
STILL_TIED: dict[str, dict[str, Any]] = {
    "trained tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [2, 9]},
    "ensure_weight_tying": {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
    "ensure_weight_tying, trained": {
        "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True,
    },
}  # fmt: skip


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(20).reshape(2, 10) % 48
    with torch.no_grad():
        return model(input_ids=ids).logits


def deploy(bench: Any, output: Path, auto: str | None = None) -> Any:
    """Merge, put the edited config beside the weights, load the result with plain transformers."""
    import transformers

    plan = bench.plan()
    bench.merge(output)
    config = json.loads((bench.base / "config.json").read_text()) | dict(plan.config_changes)
    (output / "config.json").write_text(json.dumps(config))
    loaded, info = getattr(transformers, auto or bench.auto).from_pretrained(
        output, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return loaded.eval()


def assert_equal(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Equal names, and values equal to a few units in the last place of float32."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=2e-6, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("case", CASES)
def test_streamed_lora_equals_pefts_merge(bench: Callable[..., Any], tmp_path: Path, case: str) -> None:
    """Every tensor, on a base whose embeddings are not tied."""
    made = bench("LORA", changes={"tie_word_embeddings": False}, r=4, lora_alpha=8, **CASES[case])
    plan = made.plan()
    assert plan.strategy is Strategy.STREAM
    assert plan.consumed == plan.adapter_tensors
    found = made.merge(tmp_path / "merged")
    assert_equal(found, made.expected())
    stored = made.stored()
    changed = {name for change in plan.changes for name in change.tensors}
    assert changed, "the adapter has an effect"
    for name, value in found.items():
        assert torch.equal(value, stored[name]) == (name not in changed), name


@pytest.mark.parametrize("case", GPT2_CASES)
def test_transposed_layers_equal_pefts_merge(bench: Callable[..., Any], tmp_path: Path, case: str) -> None:
    """Conv1D holds `[in, out]`; DoRA's norms then run down the columns."""
    made = bench("LORA", model_type="gpt2", r=4, lora_alpha=8, **GPT2_CASES[case])
    found, expected = made.merge(tmp_path / "merged"), made.expected()
    assert_equal(
        found, {name: expected[f"transformer.{name.removeprefix('transformer.')}"] for name in found}
    )


@pytest.mark.parametrize("case", TIED_CASES)
def test_tied_embeddings_part_when_only_one_changes(
    bench: Callable[..., Any], tmp_path: Path, case: str
) -> None:
    """The merged model answers as base + adapter, which changed one of two tied weights in training."""
    changes = {"tie_word_embeddings": True}
    made = bench("LORA", changes=changes, r=4, lora_alpha=8, **TIED_CASES[case])
    merged = deploy(made, tmp_path / "merged")
    parts = case != "nothing tied touched"
    assert merged.config.tie_word_embeddings is not parts
    torch.testing.assert_close(logits(merged), logits(made.adapted()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", STILL_TIED)
def test_tied_embeddings_stay_tied_when_both_change_alike(
    bench: Callable[..., Any], tmp_path: Path, case: str
) -> None:
    """Trained tokens and tied adapters act on both; the checkpoint keeps its one tensor."""
    changes = {"tie_word_embeddings": True}
    made = bench("LORA", changes=changes, r=4, lora_alpha=8, **STILL_TIED[case])
    merged = deploy(made, tmp_path / "merged")
    assert merged.config.tie_word_embeddings
    torch.testing.assert_close(logits(merged), logits(made.adapted()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_are_rounded_once(bench: Callable[..., Any], tmp_path: Path, dtype: torch.dtype) -> None:
    """The sum equals the exact one, rounded; float32's own error may decide a tie in one element of a thousand."""
    from safetensors.torch import load_file

    made = bench("LORA", dtype=dtype, r=4, lora_alpha=8, target_modules=LINEAR)
    found, stored = made.merge(tmp_path / "merged"), made.stored()
    factors = load_file(made.adapter / "adapter_model.safetensors")
    differ = total = 0
    for name in (name for name in stored if name.split(".")[-2] in LINEAR and name.endswith("weight")):
        module = f"base_model.model.{name.removesuffix('.weight')}"
        a, b = (factors[f"{module}.lora_{part}.weight"].double() for part in "AB")
        exact = stored[name].double() + (b @ a) * 2
        differ += int((found[name] != exact.to(dtype)).sum())
        total += exact.numel()
    assert total > 1000
    assert differ <= total / 1000


def test_dora_is_multiplicative_and_lora_additive(bench: Callable[..., Any]) -> None:
    """The plan says which is which."""
    plain = bench("LORA", r=4, target_modules=["q_proj"]).plan()
    assert {change.kind for change in plain.changes} == {Kind.ADDITIVE}


def test_dora_kind(bench: Callable[..., Any]) -> None:
    """DoRA rescales rows of W, so it is no sum."""
    dora = bench("LORA", r=4, target_modules=["q_proj"], use_dora=True).plan()
    assert {change.kind for change in dora.changes} == {Kind.MULTIPLICATIVE}


def test_hand_computed_weights(bench: Callable[..., Any], tmp_path: Path) -> None:
    """W + alpha / sqrt(r) * B A, computed here without PEFT."""
    from safetensors.torch import load_file

    made = bench("LORA", r=4, lora_alpha=8, use_rslora=True, target_modules=["q_proj"])
    found, stored = made.merge(tmp_path / "merged"), made.stored()
    factors = load_file(made.adapter / "adapter_model.safetensors")
    name = "model.layers.1.self_attn.q_proj"
    a, b = (factors[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    expected = stored[f"{name}.weight"] + 8 / math.sqrt(4) * (b @ a)
    torch.testing.assert_close(found[f"{name}.weight"], expected, rtol=1e-6, atol=1e-7)
