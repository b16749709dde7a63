"""Trained tensors that take the place of the base's, or join them: modules_to_save, bias=, saved embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from merge_adapter.methods.change import Context, Kind, TensorSpec
from merge_adapter.methods.edits.placing import Edit, no_target

_FROZEN = ".original_module."
_WRAPPED = ".modules_to_save."
_BASES = (".token_adapter.base_layer.", ".base_layer.")
"""Where PEFT's wrappers keep the frozen original: that of trained tokens, and that of a layer."""


def replacement_edits(context: Context, parameters: Mapping[str, TensorSpec]) -> list[Edit]:
    """Edits for tensors that are parameters of the model: path in the adapter -> tensor.

    PEFT may save a trained module's tensor twice, under its own name and inside its wrapper, and the frozen
    original beside it. The first stands for all; which of the two it reads is the one PEFT reads on loading.
    """
    others: dict[str, list[str]] = {}
    trained: dict[str, TensorSpec] = {}
    for path, spec in parameters.items():
        parameter = path
        for inside in (*_BASES, _WRAPPED, _FROZEN):
            parameter = parameter.replace(inside, ".")
        twin = _WRAPPED in path and path.replace(_WRAPPED, ".") in parameters
        if twin or _FROZEN in path or parameter in trained:
            others.setdefault(parameter, []).append(spec.name)
        else:
            trained[parameter] = spec
    edits = [
        Edit(
            parameter,
            (spec.name, *others.pop(parameter, ())),
            Kind.REPLACE,
            shape=spec.shape,
            # what nobody was told to train was saved because it was resized
            follows_ties=not is_saved(context.config, parameter.rpartition(".")[0]),
        )
        for parameter, spec in trained.items()
    ]
    if others:
        raise no_target({name: tuple(tensors) for name, tensors in others.items()})
    return edits


def is_saved(config: Mapping[str, Any], module: str) -> bool:
    """Whether the adapter was told to train this module whole, or one around it.

    PEFT's rule for `modules_to_save` asks how a path ends, and not where its parts do: `head` takes in `lm_head`.
    """
    parts = module.split(".")
    around = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
    return any(path.endswith(name) for path in around for name in config.get("modules_to_save") or ())
