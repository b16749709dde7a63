"""What an adapter_config.json may say, and what is refused by name."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from merge_adapter.checkpoint.folder import Folder
from merge_adapter.errors import BaseModelError, MalformedError, MethodError, ShapeError
from merge_adapter.methods.config import LORA_KEYS, check_config
from merge_adapter.types import Adapter

GOOD = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none"}


def adapter(tmp_path: Path, **config: Any) -> Adapter:
    return Adapter(Folder(tmp_path), {**GOOD, **config}, "LORA")


def edited(bench: Callable[..., Any], **config: Any) -> Any:
    """A really saved adapter whose config was changed by hand."""
    made = bench("LORA", r=4, lora_alpha=8, target_modules=["q_proj"])
    path = made.adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return made


def test_known_keys_are_those_of_the_installed_peft() -> None:
    """A field that PEFT adds fails here until someone decides what it means for the arithmetic."""
    from peft import LoraConfig

    assert {entry.name for entry in dataclasses.fields(LoraConfig)} == LORA_KEYS


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("loftq_config", {"loftq_bits": 4}), ("megatron_core", "megatron.core"), ("save_embedding_layers", True),
        ("a_switch_that_is_off", False), ("a_list_that_is_empty", []), ("a_value_that_is_null", None),
    ],
)  # fmt: skip
def test_harmless_keys_are_dropped(tmp_path: Path, key: str, value: object) -> None:
    """Keys of other versions that are off, or that only steer training, do not stand in the way."""
    checked, notes = check_config(adapter(tmp_path, **{key: value}))
    assert {name: checked.config[name] for name in GOOD} == GOOD
    assert bool(notes) == (key not in LORA_KEYS)
    assert all(key in note for note in notes)


def test_an_unknown_key_that_is_on_is_refused_by_name(bench: Callable[..., Any]) -> None:
    """PEFT would drop it with a warning, whatever it does to the weights."""
    with pytest.raises(MethodError, match=r"use_quantum_lora=True"):
        edited(bench, use_quantum_lora=True).plan()


@pytest.mark.parametrize(
    ("value", "named"),
    [("pissa", "PiSSA"), ("pissa_niter_16", "PiSSA"), ("olora", "OLoRA"), ("corda", "CorDA"), ("loftq", "LoftQ"),
     ("lora_ga", "LoRA-GA")],
)  # fmt: skip
def test_adapters_of_a_changed_base_are_refused(bench: Callable[..., Any], value: str, named: str) -> None:
    """Merged onto the plain base they would be wrong in silence; the hint says both ways out."""
    with pytest.raises(BaseModelError, match=named) as caught:
        edited(bench, init_lora_weights=value).plan()
    assert "path_initial_model_for_weight_conversion" in caught.value.hint
    assert "--base-model" in caught.value.hint


@pytest.mark.filterwarnings(
    "ignore:PiSSA changes the base weights:UserWarning"
)  # PEFT's advice on converting
def test_a_pissa_adapter_saved_converted_is_merged(bench: Callable[..., Any], tmp_path: Path) -> None:
    """PEFT marks the conversion by setting `init_lora_weights` to true and doubling the rank."""
    import peft

    made = bench("LORA", r=4, lora_alpha=4, target_modules=["q_proj"])
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj"], init_lora_weights="pissa")
    trained = peft.get_peft_model(made.load_base(), config)
    trained.peft_config["default"].init_lora_weights = True
    trained.save_pretrained(tmp_path / "start")
    trained.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if "lora_" in name:
                parameter.add_(
                    torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)) * 0.05
                )
    expected = {
        name: (module.get_base_layer().weight + module.get_delta_weight("default")).detach().clone()
        for name, module in trained.base_model.model.named_modules()
        if name.endswith("q_proj")
    }
    trained.save_pretrained(made.adapter, path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    saved = json.loads((made.adapter / "adapter_config.json").read_text())
    assert (saved["init_lora_weights"], saved["r"]) == (True, 8)
    found = made.merge(tmp_path / "merged")
    assert expected
    for name, value in expected.items():
        torch.testing.assert_close(found[f"{name}.weight"], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("key", "value"),
    [("r", "many"), ("r", 0), ("r", 4.0), ("r", math.nan), ("r", math.inf), ("lora_alpha", None),
     ("lora_alpha", math.nan), ("lora_alpha", math.inf), ("lora_alpha", 10**400), ("target_modules", 3),
     ("target_modules", [3]), ("exclude_modules", {}), ("rank_pattern", [1]), ("alpha_pattern", {"q_proj": "big"}),
     ("modules_to_save", "lm_head"), ("use_rslora", "yes"), ("bias", "some")],
)  # fmt: skip
def test_values_of_the_wrong_kind_are_malformed(tmp_path: Path, key: str, value: object) -> None:
    """The message names the key and shows the value."""
    with pytest.raises(MalformedError, match=f"expected {key} to be"):
        check_config(adapter(tmp_path, **{key: value}))


@pytest.mark.parametrize("peft_type", ["LORA", "LOHA"])
def test_a_pattern_that_is_null_says_nothing(peft_type: str, bench: Callable[..., Any]) -> None:
    """Some tools write null where PEFT writes {} and wants no other."""
    made = bench(peft_type, target_modules=["q_proj"], r=4)
    file = made.adapter / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "rank_pattern": None, "alpha_pattern": None}))
    checked, _ = check_config(made.sources.adapter)
    assert not {"rank_pattern", "alpha_pattern"} & set(checked.config)


@pytest.mark.parametrize(
    ("key", "value"),
    [("rank_pattern", {"([": 8}), ("alpha_pattern", {"*": 8}), ("target_modules", "(q_proj"), ("exclude_modules", "[")],
)  # fmt: skip
def test_a_pattern_that_is_none_is_malformed(tmp_path: Path, key: str, value: object) -> None:
    """It would end in an error of the regular expression library, far from where it stands."""
    with pytest.raises(MalformedError, match=f"{key} names the pattern .*no regular expression"):
        check_config(adapter(tmp_path, **{key: value}))


def test_factors_in_whole_numbers_are_refused(bench: Callable[..., Any]) -> None:
    """Cast to integers, the factors of a LoRA are all but zero."""
    made = bench("LORA", r=4, target_modules=["q_proj"])
    file = made.adapter / "adapter_model.safetensors"
    save_file({name: value.to(torch.int8) for name, value in load_file(file).items()}, file)
    with pytest.raises(ShapeError, match="expected floating-point factors, got I8"):
        made.plan()


def test_a_rank_that_is_not_the_weights_is_refused(bench: Callable[..., Any]) -> None:
    """The scale comes from the rank: with another config it would be wrong without a trace."""
    with pytest.raises(ShapeError, match=r"expected rank 16 by adapter_config\.json, got rank 4"):
        edited(bench, r=16).plan()


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("alora_invocation_tokens", [1], "aLoRA"),
        ("arrow_config", {"top_k": 2}, "Arrow"),
        ("use_qalora", True, "QALoRA"),
    ],
)
def test_variants_without_a_merge_are_refused(
    bench: Callable[..., Any], key: str, value: object, named: str
) -> None:
    """PEFT raises on them when it merges."""
    with pytest.raises(MethodError, match=named):
        edited(bench, **{key: value}).plan()
