"""adapter_config.json, checked before anything is planned: keys and values.

Configs come from many versions of PEFT and of tools around it. PEFT drops keys it does not know, with a
warning; here a key that is switched on and unknown is refused by name, for it may change the arithmetic.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from merge_adapter.errors import MalformedError, MethodError
from merge_adapter.methods.patterns import check_lengths
from merge_adapter.types import Adapter

LORA_KEYS = frozenset(
    {
        "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
        "inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out",
        "bias", "use_rslora", "modules_to_save", "init_lora_weights", "layers_to_transform", "layers_pattern",
        "rank_pattern", "alpha_pattern", "megatron_config", "megatron_core", "trainable_token_indices",
        "loftq_config", "eva_config", "corda_config", "lora_ga_config", "use_dora", "velora_config",
        "alora_invocation_tokens", "use_qalora", "qalora_group_size", "monteclora_config", "layer_replication",
        "runtime_config", "lora_bias", "target_parameters", "use_bdlora", "arrow_config", "kasa_config",
        "ensure_weight_tying",
    }
)  # fmt: skip
"""Every field of PEFT's LoraConfig; a test compares."""

HARMLESS = frozenset(
    {
        "auto_mapping", "base_model_class", "corda_config", "eva_config", "exclude_modules", "inference_mode",
        "layers_pattern", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core",
        "parent_library", "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type",
        "base_model_name_or_path", "save_embedding_layers", "unsloth_fixed", "unsloth_version", "_name_or_path",
        "transformers_version", "transformers_weights", "ephemeral_gpu_offload", "lora_plus_lr_ratio",
    }
)  # fmt: skip
"""Keys that steer training, loading or bookkeeping, and never the merged weights."""


def check_config(adapter: Adapter) -> tuple[Adapter, tuple[str, ...]]:
    """The adapter with a config that holds known keys only, and notes on what was dropped.

    Raises MethodError for an unknown key that is switched on, MalformedError for values of the wrong kind.
    """
    known = LORA_KEYS if adapter.method == "LORA" else _keys_of(adapter.method)
    unknown = {key: value for key, value in adapter.config.items() if key not in known}
    active = sorted(key for key, value in unknown.items() if value and key not in HARMLESS)
    if active:
        raise MethodError(
            f"adapter_config.json sets {', '.join(f'{key}={adapter.config[key]!r:.60}' for key in active)}, which"
            " the installed PEFT does not know and which may change the arithmetic.",
            hint="Update PEFT and merge-adapter, or remove the key if the training did not use it.",
        )
    config = {
        key: value
        for key, value in adapter.config.items()
        if key in known and not (value is None and key.endswith("_pattern"))  # what PEFT writes as {}
    }
    notes = []
    if unknown:
        notes.append(
            f"Keys of adapter_config.json that this PEFT does not know were dropped: {_list(unknown)}."
        )
    check_lengths(config)
    for key in ("target_modules", "exclude_modules", "feedforward_modules"):
        value = config.get(key)
        if isinstance(value, str):
            _check_pattern(key, value)
        elif value is not None and not _are_names(value):
            raise _wrong(key, "a pattern or a list of names", value)
    if adapter.method == "LORA":
        _check_lora_values(config)
    return replace(adapter, config=config), tuple(notes)


def _keys_of(method: str) -> frozenset[str]:
    """The config fields of a method other than LoRA; empty stays empty for methods PEFT does not have."""
    import dataclasses

    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    if method not in PeftType.__members__:
        return frozenset()
    made = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType[method]]
    return frozenset(entry.name for entry in dataclasses.fields(made))


def _check_lora_values(config: Mapping[str, Any]) -> None:
    """The values that the arithmetic reads."""
    for key in ("r", "lora_alpha"):
        value = config.get(key, 8)
        if not _is_number(value) or (key == "r" and (type(value) is not int or value < 1)):
            raise _wrong(key, "a positive whole number" if key == "r" else "a number", value)
    for key in ("rank_pattern", "alpha_pattern"):
        value = config.get(key, {})
        if not isinstance(value, Mapping) or not all(_is_number(item) for item in value.values()):
            raise _wrong(key, "a mapping from module patterns to numbers", value)
        for pattern in value:
            _check_pattern(key, pattern)
    for key in ("modules_to_save", "target_parameters"):
        value = config.get(key) or []
        if not _are_names(value):
            raise _wrong(key, "a list of names", value)
    layers = config.get("layers_pattern") or []
    if not isinstance(layers, str) and not _are_names(layers):
        raise _wrong("layers_pattern", "a pattern or a list of patterns", layers)
    for key in ("modules_to_save", "layers_pattern"):
        value = config.get(key) or []
        for pattern in [value] if isinstance(value, str) else value:
            _check_pattern(key, pattern)
    for key in ("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out", "ensure_weight_tying"):
        if config.get(key) not in (None, True, False):
            raise _wrong(key, "true or false", config[key])
    if config.get("bias", "none") not in ("none", "all", "lora_only"):
        raise _wrong("bias", "none, all or lora_only", config["bias"])


def _check_pattern(key: str, pattern: object) -> None:
    try:
        re.compile(str(pattern))
    except (re.error, RecursionError, OverflowError) as error:
        raise MalformedError(
            f"adapter_config.json: {key} names the pattern {pattern!r:.200}, which is no regular expression: {error}.",
            hint="Restore the config that PEFT saved with the adapter.",
        ) from error


def _is_number(value: object) -> bool:
    """Whether arithmetic can take it: Python's JSON also knows NaN, infinity and integers of any length."""
    most = sys.float_info.max
    return isinstance(value, int | float) and not isinstance(value, bool) and -most <= value <= most


def _are_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _wrong(key: str, expected: str, got: object) -> MalformedError:
    return MalformedError(
        f"adapter_config.json: expected {key} to be {expected}, got {got!r:.200}.",
        hint="Restore the config that PEFT saved with the adapter.",
    )


def _list(keys: Mapping[str, Any]) -> str:
    return ", ".join(sorted(keys))
