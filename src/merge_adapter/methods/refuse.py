"""Adapters that cannot be merged, told from their config before anything heavy is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from merge_adapter.errors import MethodError
from merge_adapter.methods.table import METHODS, Method, Way, find_method, what_to_do
from merge_adapter.types import SoftPrompt

_VARIANTS: Mapping[str, tuple[str, str]] = {
    "alora_invocation_tokens": ("aLoRA", "it acts only after its invocation tokens, which a fixed weight cannot"),
    "arrow_config": ("Arrow", "it routes every token through several LoRAs"),
    "use_qalora": ("QALoRA", "it pools the inputs of a quantised layer, and PEFT defines no merge for it"),
}  # fmt: skip
"""LoRA config keys that, when set, leave no correct merge: name and reason."""

_FOREIGN: tuple[tuple[str, str], ...] = (
    ("adapter_layers", "LLaMA-Adapter"),
    ("adapter_len", "LLaMA-Adapter"),
    ("model_class", "AdapterHub (adapters, adapter-transformers)"),
    ("config_id", "AdapterHub (adapters, adapter-transformers)"),
    ("non_linearity", "AdapterHub (adapters, adapter-transformers)"),
    ("reduction_factor", "AdapterHub (adapters, adapter-transformers)"),
)
"""Config keys of other libraries' adapters, looked up when `peft_type` is absent."""

_UNMERGED = "Keep the adapter and load it with PEFT beside its base."


SOFT_PROMPTS = ("PROMPT_TUNING", "P_TUNING")
"""Methods whose prompt can become tokens: learned embeddings in front of the input and nothing else."""


def check_method(config: Mapping[str, Any], *, soft_prompt: SoftPrompt = SoftPrompt.REFUSE) -> Method:
    """The table's entry for an adapter_config.json. Raises MethodError with the reason when it has no merge."""
    given = config.get("peft_type")
    if not isinstance(given, str) or not given:
        raise MethodError(
            f"adapter_config.json names no peft_type: {_library(config)}.",
            hint="Only adapters saved by PEFT can be merged; use the adapter with the library that made it.",
        )
    method = find_method(given.upper())
    if method is None:
        known = ", ".join(entry.peft_type for entry in METHODS if entry.way is not Way.NONE)
        raise MethodError(
            f"The method {given[:60]!r} is not one that can be merged. Those that can: {known}.",
            hint="Check peft_type in adapter_config.json; for a newer method of PEFT, update merge-adapter.",
        )
    if method.peft_type in SOFT_PROMPTS and soft_prompt is SoftPrompt.TOKENS:
        return method
    if method.way is Way.NONE:
        raise MethodError(f"{method.title} adapters cannot be merged. {method.note}", hint=what_to_do(method))
    if method.peft_type == "LORA":
        _check_variants(config)
    return method


def _check_variants(config: Mapping[str, Any]) -> None:
    for key, (name, reason) in _VARIANTS.items():
        if config.get(key):
            raise MethodError(
                f"This LoRA uses {name} ({key} in adapter_config.json), which cannot be merged: {reason}.",
                hint=_UNMERGED,
            )


def _library(config: Mapping[str, Any]) -> str:
    nested = config.get("config")
    keys = {*config, *(nested if isinstance(nested, Mapping) else ())}
    for key, library in _FOREIGN:
        if key in keys:
            return (
                f"its keys are those of {library}, whose adapters are layers added to the model and have no"
                " merge into plain weights"
            )
    return "it is not an adapter of PEFT, or its config was cut"
