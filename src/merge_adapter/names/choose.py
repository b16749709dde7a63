"""Which name map a merge uses: the fast one where it is safe, else the general one, else none with a reason."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from merge_adapter.errors import PolicyError
from merge_adapter.methods.change import NameMap, TensorSpec
from merge_adapter.methods.edits.resizing import label_heads
from merge_adapter.methods.lora.replication import layer_sources
from merge_adapter.methods.task import headed_class, is_labelled
from merge_adapter.names.direct import DirectNames, direct_names
from merge_adapter.types import BaseModel

PEFT_PREFIX = "base_model.model."
_MARKS = ("modules_to_save", "token_adapter", "base_layer", "original_module")
"""Path components that PEFT puts between a module and a tensor of its own."""


@dataclass(frozen=True)
class NoNames:
    """No name map could be made; only the loaded model knows, or nothing does."""

    reason: str
    absent: tuple[str, ...] = ()
    """Modules of the adapter that the base's class does not have."""


def name_map(
    base: BaseModel,
    adapter_config: Mapping[str, Any],
    adapter: Mapping[str, TensorSpec],
    tensors: Mapping[str, TensorSpec],
    *,
    tuner_prefixes: Collection[str],
    trust_remote_code: bool = False,
) -> NameMap | NoNames:
    """The name map of a base checkpoint as one adapter sees it.

    `adapter`: the adapter's tensors under PEFT's names, without adapter name; `tensors`: those of the base;
    `tuner_prefixes`: how the method's own tensors begin, such as `lora_`. Raises PolicyError when the base
    needs code of its own and `trust_remote_code` is False.
    """
    modules, parameters = split_targets(adapter, tuner_prefixes)
    plain = not adapter_config.get("layer_replication")
    plain = (
        plain and not adapter_config.get("target_parameters") and not _other_head(base.config, adapter_config)
    )
    if plain and not any("lora_embedding" in name for name in adapter):
        fast = direct_names(base.config, tensors, modules=modules, parameters=parameters)
        if isinstance(fast, DirectNames):
            return fast
    return general_names(
        base, adapter_config, adapter, tensors, modules=modules, trust_remote_code=trust_remote_code
    )


def general_names(
    base: BaseModel,
    adapter_config: Mapping[str, Any],
    adapter: Mapping[str, TensorSpec],
    tensors: Mapping[str, TensorSpec],
    *,
    modules: Collection[str],
    trust_remote_code: bool,
) -> NameMap | NoNames:
    """The map through transformers' loading rules; imports transformers and builds a meta model."""
    from merge_adapter.names.architecture import Architecture, build
    from merge_adapter.names.conversion import converted_names
    from merge_adapter.names.stored_ties import without_stored_apart

    if (custom := _needs_code(base.config)) and not trust_remote_code:
        raise PolicyError(
            f"The base {base.repository.origin} has model type {custom!r}, which transformers does not know, and"
            " brings its own modeling code.",
            hint="Read that code; if you trust it, run again with --trust-remote-code.",
        )
    code = [path for path in base.repository.files if path.endswith(".py")] if trust_remote_code else []
    folder = base.repository.folder(["config.json", *code])
    made = build(
        folder,
        adapter_config,
        modules,
        trust_remote_code=trust_remote_code,
        config_changes=_head_changes(adapter_config, adapter),
    )
    if isinstance(made, Architecture):
        return without_stored_apart(converted_names(made.model, tensors), base.repository)
    return NoNames(made.reason, made.absent)


def split_targets(
    adapter: Mapping[str, TensorSpec], tuner_prefixes: Collection[str]
) -> tuple[frozenset[str], frozenset[str]]:
    """`(modules, parameters)`: paths of modules that tuner tensors belong to; names of replaced parameters."""
    modules, parameters = set(), set()
    for name in adapter:
        parts = name.removeprefix(PEFT_PREFIX).split(".")
        own = next((i for i, part in enumerate(parts) if part.startswith(tuple(tuner_prefixes))), None)
        if name.startswith(PEFT_PREFIX) and own is not None:
            modules.add(".".join(part for part in parts[:own] if part not in _MARKS))
        elif name.startswith(PEFT_PREFIX):
            parameters.add(".".join(part for part in parts if part not in _MARKS))
    return frozenset(modules - {""}), frozenset(parameters)


def _other_head(config: Mapping[str, Any], adapter_config: Mapping[str, Any]) -> bool:
    """Whether the adapter was trained on a class with a head that the base's own class does not have."""
    wanted = headed_class(adapter_config)
    return not any(wanted in str(name) for name in config.get("architectures") or ("",))


def _needs_code(config: Mapping[str, Any]) -> str:
    """The model type when only the repository's own code knows it, else ""."""
    from transformers import CONFIG_MAPPING

    model_type = config.get("model_type")
    if "auto_map" in config and (not isinstance(model_type, str) or model_type not in CONFIG_MAPPING):
        return str(model_type)
    return ""


def _head_changes(adapter_config: Mapping[str, Any], adapter: Mapping[str, TensorSpec]) -> Mapping[str, Any]:
    """Config attributes that the adapter fixes: the number of layers it was trained on, of labels its head has."""
    stack = layer_sources(adapter_config)
    layers = {"num_hidden_layers": len(stack)} if stack else {}
    heads = label_heads(adapter) if is_labelled(adapter_config) else {}
    labels = {"num_labels": next(iter(heads.values())).shape[0]} if heads else {}
    return {**layers, **labels}
