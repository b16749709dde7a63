"""`layer_replication`: a LoRA trained on a base whose layers were stacked anew, some of them more than once.

In PEFT the replicas share the base's tensors, so that its own merge adds every replica's update to all of them. The
model it trained is plain nevertheless: more layers, some of equal weights, each with its own update. So the base is
shown in that form, every replica with tensors of its own, and merged as any other.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from merge_adapter.checkpoint.base import BaseFiles
from merge_adapter.checkpoint.header import Header, StoredTensor
from merge_adapter.checkpoint.layout import Layout
from merge_adapter.checkpoint.quantization import quantization_of
from merge_adapter.errors import BaseModelError, MalformedError, MethodError
from merge_adapter.methods.change import TensorSpec
from merge_adapter.types import MergeSettings, Resolved, Strategy

if TYPE_CHECKING:
    from merge_adapter.checkpoint.reader import StoredWeights

_UNMERGED = "Keep the adapter and load it with PEFT beside its base."
_COUNT = "num_hidden_layers"
_MOST = 4096
"""Layers of a stack; the deepest models have a few hundred."""


def layer_sources(config: Mapping[str, Any]) -> tuple[int, ...]:
    """For each layer of the trained model the layer of the base that it repeats; () where none is replicated.

    Raises MalformedError for a map that is none.
    """
    given = config.get("layer_replication")
    if not given:
        return ()
    pairs = [pair for pair in given if _is_range(pair)] if isinstance(given, list) else []
    if (
        not isinstance(given, list)
        or len(pairs) != len(given)
        or sum(end - start for start, end in pairs) > _MOST
    ):
        raise MalformedError(
            f"adapter_config.json: expected layer_replication to list pairs [first, end], got {given!r:.200}.",
            hint="Restore the config that PEFT saved with the adapter.",
        )
    return tuple(layer for start, end in pairs for layer in range(start, end))


def with_replicas(files: BaseFiles, sources: Resolved, settings: MergeSettings) -> BaseFiles:
    """The base with its layers stacked as the adapter says; the base itself where it says nothing.

    Raises MethodError and BaseModelError where that cannot be done rightly.
    """
    stacks = [layer_sources(adapter.config) for adapter in sources.adapters if adapter.method == "LORA"]
    if not any(stacks):
        return files
    if len(sources.adapters) > 1 or settings.strategy is Strategy.MEMORY:
        raise MethodError(
            "An adapter with layer_replication is merged by itself, and by streaming only.",
            hint="Merge it alone, without --strategy memory; others can be merged into the result with --base-model.",
        )
    if quantization_of(sources.base.config) is not None:
        raise BaseModelError(
            "The layers of a base that is stored quantised cannot be replicated.",
            hint="Name the 16-bit original with --base-model.",
        )
    (stack,) = stacks
    count = sources.base.config.get(_COUNT)
    if not isinstance(count, int):
        raise BaseModelError(
            f"The base's config.json states no {_COUNT}, so that its layers cannot be replicated.",
            hint=_UNMERGED,
        )
    shown = _renamed(files, sources, settings, stack)
    layout = _layout(files.layout, shown)

    def open_replicated() -> StoredWeights:
        from merge_adapter.checkpoint.reader import StoredWeights  # imports torch

        return StoredWeights(sources.base.repository, files.layout, rename=shown)

    note = f"layer_replication: the merged model has {len(stack)} layers, made from the {count} of the base."
    return replace(
        files,
        layout=layout,
        specs=layout.specs,
        open=open_replicated,
        notes=(*files.notes, note),
        config_changes={**files.config_changes, _COUNT: len(stack)},
    )


def _renamed(
    files: BaseFiles, sources: Resolved, settings: MergeSettings, stack: tuple[int, ...]
) -> dict[str, str]:
    """Tensor of the stacked model -> tensor on disk."""
    from merge_adapter.names.architecture import Architecture, build
    from merge_adapter.names.conversion import converted_names

    repository = sources.base.repository
    code = [path for path in repository.files if path.endswith(".py")] if settings.trust_remote_code else []
    folder = repository.folder(["config.json", *code])
    trust, config = settings.trust_remote_code, sources.adapter.config
    before = build(folder, config, (), trust_remote_code=trust)
    after = build(folder, config, (), trust_remote_code=trust, config_changes={_COUNT: len(stack)})
    if not isinstance(before, Architecture) or not isinstance(after, Architecture):
        raise BaseModelError(
            f"The base cannot be built with {len(stack)} layers, so that its layers cannot be replicated.",
            hint=_UNMERGED,
        )
    path = _layers_path(before.model)
    _check_layers(before.model, after.model, path, stack)
    names = converted_names(before.model, files.specs)
    place = re.compile(rf"(?P<head>{re.escape(path)})\.(?P<layer>\d+)\.(?P<rest>.+)")
    replicas: dict[int, list[int]] = {}
    for new, old in enumerate(stack):
        replicas.setdefault(old, []).append(new)
    shown: dict[str, str] = {}
    layered = {}
    for parameter in before.model.state_dict():
        match = place.fullmatch(parameter)
        stored = names.renamed.get(parameter)
        if match is None:
            continue
        ending = f"{match['layer']}.{match['rest']}"
        if stored is None or not stored.endswith(f".{ending}"):
            raise BaseModelError(
                f"{parameter} is on disk in another form, so that its layer cannot be replicated.",
                hint=_UNMERGED,
            )
        layered[stored] = (stored.removesuffix(ending), int(match["layer"]), match["rest"])
    for name in files.specs:
        if name not in layered:
            shown[name] = name
            continue
        head, layer, rest = layered[name]
        shown.update((f"{head}{new}.{rest}", name) for new in replicas.get(layer, ()))
    return shown


def _layers_path(model: Any) -> str:
    """Where PEFT's `replicate_layers` finds the layers. Raises MethodError where it finds none."""
    path: list[str] = []
    while hasattr(model, "model"):
        model = model.model
        path.append("model")
    if hasattr(model, "bert"):
        model = model.bert
        path.append("bert")
    for inner in ("layers", "encoder.layer", "h"):
        found = model
        for part in inner.split("."):
            found = getattr(found, part, None)
        if found is not None:
            return ".".join((*path, inner))
    raise MethodError(f"PEFT cannot replicate the layers of a {type(model).__name__}.", hint=_UNMERGED)


def _check_layers(before: Any, after: Any, path: str, stack: tuple[int, ...]) -> None:
    """Raise BaseModelError unless each new layer is built as the one it repeats: same modules, shapes and settings."""
    old, new = before.get_submodule(path), after.get_submodule(path)
    if max(stack) >= len(old):
        raise BaseModelError(
            f"layer_replication repeats layer {max(stack)}, the base has {len(old)}.",
            hint="The adapter was trained on another base; name that one with --base-model.",
        )
    for number, source in enumerate(stack):
        if len(new) != len(stack) or _form(new[number]) != _form(old[source]):
            raise BaseModelError(
                f"Layer {number} of a {type(after).__name__} with {len(stack)} layers is not built as layer {source} of"
                " the base, which it repeats: no config.json describes the trained model.",
                hint=_UNMERGED,
            )


def _form(layer: Any) -> list[Any]:
    """What a layer is, but for the values of its weights and its own number."""
    form: list[Any] = []
    for name, module in layer.named_modules():
        settings = {
            key: value
            for key, value in vars(module).items()
            if isinstance(value, bool | int | float | str | None) and key not in ("layer_idx", "layer_id")
        }
        shapes = {key: tuple(value.shape) for key, value in module._parameters.items() if value is not None}
        form.append((name, type(module), settings, shapes))
    return form


def _layout(stored: Layout, shown: Mapping[str, str]) -> Layout:
    """The files with each layer's tensors where those that it repeats are."""
    names: dict[str, list[str]] = {}
    for new, old in shown.items():
        names.setdefault(old, []).append(new)
    files = []
    for file in stored.files:
        tensors = tuple(
            StoredTensor(TensorSpec(name, spec.dtype, spec.shape), 0)
            for spec in file.specs
            for name in names.get(spec.name, ())
        )
        if tuple(tensor.spec for tensor in tensors) == file.specs:
            files.append(file)
        else:
            files.append(replace(file, header=Header(tensors, file.header.metadata, 0), derived=True))
    return replace(stored, files=tuple(files))


def _is_range(pair: object) -> bool:
    return (
        isinstance(pair, list)
        and len(pair) == 2
        and all(type(n) is int for n in pair)
        and 0 <= pair[0] < pair[1]
    )
