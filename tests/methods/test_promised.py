"""What adapter_config.json says was trained, and the file lacks, is named; it is never taken for the base's own."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from merge_adapter.errors import AccountingError
from merge_adapter.types import Strategy

LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"]}
CASES: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "a magnitude of DoRA": (
        "LORA", {**LORA, "use_dora": True}, r"layers\.1\.self_attn\.v_proj\.lora_magnitude_vector",
        r"layers\.1\.self_attn\.v_proj.*lora_magnitude_vector",
    ),
    "a bias of lora_bias": (
        "LORA", {**LORA, "lora_bias": True}, r"layers\.0\.self_attn\.q_proj\.lora_B\.bias",
        r"layers\.0\.self_attn\.q_proj.*lora_B.*bias",
    ),
    "a trained head": ("LORA", {**LORA, "modules_to_save": ["lm_head"]}, "lm_head", "modules_to_save.*lm_head"),
    "one of two norms": (
        "LORA", {**LORA, "modules_to_save": ["norm"]}, r"layers\.1\.input_layernorm",
        r"modules_to_save.*layers\.1\.input_layernorm",
    ),
    "trained tokens": ("LORA", {**LORA, "trainable_token_indices": [3, 4]}, "token_adapter", "trainable_token"),
    "a head beside another method": (
        "LOHA", {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "lm_head",
        "modules_to_save.*lm_head",
    ),
}  # fmt: skip


@pytest.mark.parametrize("strategy", [Strategy.AUTO, Strategy.MEMORY])
@pytest.mark.parametrize(("peft_type", "config", "lost", "said"), CASES.values(), ids=CASES)
def test_what_is_lost_is_named(
    peft_type: str,
    config: dict[str, Any],
    lost: str,
    said: str,
    strategy: Strategy,
    bench: Callable[..., Any],
) -> None:
    made = bench(peft_type, **config)
    made.plan(strategy)
    file = made.adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    kept = {name: tensor for name, tensor in tensors.items() if not re.search(lost, name)}
    assert len(kept) < len(tensors)
    save_file(kept, file, metadata={"format": "pt"})
    with pytest.raises(AccountingError, match=said) as caught:
        made.plan(strategy)
    assert caught.value.hint
