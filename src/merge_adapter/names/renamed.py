"""Adapters whose modules had other paths when they were trained: renamed as checkpoints are on loading.

Models for pictures and text, above all, were put together anew in transformers 5 (`language_model.model.layers` is
`model.language_model.layers` since). transformers renames checkpoints of before, and PEFT adapters, by one list.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from merge_adapter.names.architecture import Architecture, build
from merge_adapter.types import BaseModel


def renamed_modules(
    base: BaseModel, adapter_config: Mapping[str, Any], modules: Collection[str], *, trust_remote_code: bool
) -> Mapping[str, str]:
    """Path of a module in the adapter -> its path in the model now; empty unless one class has all of them."""
    code = [path for path in base.repository.files if path.endswith(".py")] if trust_remote_code else []
    folder = base.repository.folder(["config.json", *code])
    for chosen in (adapter_config, {}):  # the class that the adapter asks for, and the base's own
        made = build(folder, chosen, (), trust_remote_code=trust_remote_code)
        if isinstance(made, Architecture) and (paths := _renamed(made.model, modules)):
            return paths
    return {}


def _renamed(model: Any, modules: Collection[str]) -> dict[str, str]:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    renamings = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightRenaming)]
    state, prefix = model.state_dict(), model.base_model_prefix
    weights = {path: rename_source_key(f"{path}.weight", renamings, [], prefix, state)[0] for path in modules}
    if not all(name in state for name in weights.values()):
        return {}
    return {path: name.removesuffix(".weight") for path, name in weights.items()}
