"""Trained tensors that take the place of the base's, or join them: modules_to_save, bias=, saved embeddings."""

from __future__ import annotations

from collections.abc import Mapping

from merge_adapter.methods.change import Context, Kind, TensorSpec
from merge_adapter.methods.edits import Edit

_FROZEN = ".original_module."
_BASE = ".base_layer."


def replacement_edits(context: Context, parameters: Mapping[str, TensorSpec]) -> list[Edit]:
    """Edits for tensors that are parameters of the model: path in the adapter -> tensor.

    Frozen copies that PEFT keeps beside a trained module are used up by it.
    """
    frozen: dict[str, list[str]] = {}
    trained: dict[str, TensorSpec] = {}
    for path, spec in parameters.items():
        if _FROZEN in path:
            frozen.setdefault(path.replace(_FROZEN, "."), []).append(spec.name)
        else:
            trained[path.replace(_BASE, ".")] = spec
    edits = []
    for parameter, spec in trained.items():
        edits.append(
            Edit(
                parameter,
                (spec.name, *frozen.pop(parameter, ())),
                Kind.REPLACE,
                shape=spec.shape,
                follows_ties=not _trained(context, parameter),
            )
        )
    # A frozen copy without its trained module has no place; as an edit of itself it is found out.
    edits.extend(Edit(name, tuple(tensors), Kind.REPLACE, shape=(-1,)) for name, tensors in frozen.items())
    return edits


def _trained(context: Context, parameter: str) -> bool:
    """Whether the adapter was told to train this module; if not, it was saved because it was resized."""
    module = parameter.rpartition(".")[0]
    wanted = context.config.get("modules_to_save") or ()
    return any(
        module == name or module.endswith(f".{name}") or f".{name}." in f".{module}." for name in wanted
    )
