"""Adapters that do not belong to their config or base are refused with the tensor's name, never merged in part."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from merge_adapter.errors import AccountingError, MethodError, ShapeError, UnmergeableError

MODULE = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture
def loha(bench: Callable[..., Any]) -> Any:
    return bench("LOHA", r=4, alpha=8, target_modules=["q_proj", "v_proj"])


def rewrite(made: Any, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    file = made.adapter / "adapter_model.safetensors"
    tensors = dict(load_file(file))
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def reconfigure(made: Any, **values: Any) -> None:
    file = made.adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_a_lost_tensor_is_named(loha: Any) -> None:
    """PEFT would leave the factor at its random start, silently."""
    rewrite(loha, lambda tensors: tensors.pop(f"{MODULE}.hada_w1_a"))
    with pytest.raises(AccountingError, match=r"q_proj\.hada_w1_a") as caught:
        loha.plan()
    assert caught.value.tensors == (f"{MODULE}.hada_w1_a",)


def test_a_tensor_without_a_module_is_named(loha: Any) -> None:
    """PEFT would drop it, silently."""
    extra = "base_model.model.model.layers.0.self_attn.k_proj.hada_w1_a"
    rewrite(loha, lambda tensors: tensors.update({extra: torch.ones(4, 4)}))
    with pytest.raises(AccountingError, match="k_proj") as caught:
        loha.plan()
    assert extra in caught.value.tensors


def test_a_module_that_the_base_lacks_is_named(loha: Any) -> None:
    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(MODULE)]:
            tensors[name.replace("layers.0", "layers.7")] = tensors.pop(name)

    rewrite(loha, rename)
    with pytest.raises(UnmergeableError, match=r"layers\.7\.self_attn\.q_proj"):
        loha.plan()


def test_a_wrong_rank_is_a_shape_error(loha: Any) -> None:
    reconfigure(loha, r=3)
    with pytest.raises(ShapeError, match="hada_w"):
        loha.plan()


def test_a_config_that_peft_does_not_accept(loha: Any) -> None:
    """PEFT's own reason is passed on."""
    reconfigure(loha, layers_to_transform="all", layers_pattern=5)
    with pytest.raises(MethodError) as caught:
        loha.plan()
    assert caught.value.hint


def test_unknown_config_keys_are_left_to_the_config_check(loha: Any) -> None:
    """Keys of other PEFT versions do not stop PEFT's layers from being built."""
    reconfigure(loha, megatron_core="megatron.core")
    assert loha.plan().consumed == 16


def test_a_config_that_would_allocate_without_bound(loha: Any) -> None:
    reconfigure(loha, r=10**9)
    with pytest.raises(ShapeError, match="1000000000"):
        loha.plan()


def test_a_config_cannot_import_or_read_files(bench: Callable[..., Any]) -> None:
    """Keys that make PEFT import a module by name or read a cache are of training and stay unused."""
    from merge_adapter.types import Strategy

    made = bench("LORA", r=4, target_modules=["q_proj"])
    reconfigure(made, megatron_core="os", megatron_config={"x": 1})
    assert made.plan(Strategy.MEMORY).consumed == 4
