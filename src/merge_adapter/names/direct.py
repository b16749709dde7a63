"""The fast path: architectures whose names in memory are their names on disk. Needs json and nothing else.

For most language models transformers loads every tensor under the name it has on disk. `model_types.json`
lists them for one version of transformers (see `survey`). The path is taken only when every module and parameter
that the adapter names exists on disk under exactly its own name, and none of them can be tied to another or hold its
weight in an unusual way; prefixes that are added or stripped, new heads, embeddings and renamed tensors all fail
that test, and the general path answers.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from typing import Any

from merge_adapter.methods.change import Group, ModuleKind, TensorSpec


@dataclass(frozen=True)
class DirectNames:
    """A name map for which memory and disk agree."""

    tensors: Mapping[str, TensorSpec]
    """Every tensor of the checkpoint."""

    @property
    def architecture(self) -> str | None:
        return None

    def direct(self, parameter: str) -> str | None:
        return parameter if parameter in self.tensors else None

    def group(self, parameter: str) -> Group | None:  # noqa: ARG002
        return None

    def check_two_ways(self, parameter: str) -> None:
        pass

    def tied(self, parameter: str) -> tuple[str, ...]:  # noqa: ARG002
        return ()

    def ties(self) -> Iterable[tuple[str, ...]]:
        return ()

    def tied_for_good(self, parameter: str) -> tuple[str, ...]:  # noqa: ARG002
        return ()

    def declared_ties(self, parameter: str) -> tuple[str, ...]:  # noqa: ARG002
        return ()

    def disk_name(self, parameter: str) -> str:
        return parameter

    def kind(self, module: str) -> ModuleKind:
        """By the shape of its weight; embeddings and transposed layers never reach this path."""
        weight = self.tensors.get(f"{module}.weight")
        if weight is None or len(weight.shape) < 2:
            return ModuleKind.OTHER
        return ModuleKind.LINEAR if len(weight.shape) == 2 else ModuleKind.CONV

    def exists(self, module: str) -> bool | None:
        return True if module in self._owners else None

    def modules(self) -> Iterable[str]:
        return tuple(self._owners)

    def module(self, path: str) -> Any | None:  # noqa: ARG002
        return None

    @property
    def unused(self) -> tuple[str, ...]:
        return ()

    @cached_property
    def _owners(self) -> dict[str, None]:
        return dict.fromkeys(name.rpartition(".")[0] for name in self.tensors)


@dataclass(frozen=True)
class NotDirect:
    """The fast path cannot be taken; the general one can still answer."""

    reason: str


def direct_names(
    config: Mapping[str, Any],
    tensors: Mapping[str, TensorSpec],
    *,
    modules: Collection[str],
    parameters: Collection[str] = (),
) -> DirectNames | NotDirect:
    """The fast path for a base with this config.json and these tensors on disk.

    `modules`: paths of the modules that the adapter changes through their `weight`; `parameters`: names of
    those that it replaces.
    """
    blocked = _blocked(config)
    if blocked:
        return NotDirect(blocked)
    wanted = {*parameters, *(f"{module}.weight" for module in modules)}
    absent = sorted(wanted - set(tensors))
    if absent:
        return NotDirect(f"the checkpoint has no tensor {absent[0]} ({len(absent)} of {len(wanted)} absent)")
    rows = set(_values(config, "vocab_size"))
    for name in sorted(wanted):
        shape = tensors[name].shape
        if len(shape) > 2:
            return NotDirect(f"{name} may be of a convolution, and only its module tells which")
        if len(shape) == 2 and shape[0] in rows:
            return NotDirect(f"{name} has one row per token and may be an embedding, or tied to one")
    return DirectNames(tensors)


def _blocked(config: Mapping[str, Any]) -> str:
    """Why this architecture's names may differ in memory, or ""."""
    if not isinstance(config.get("model_type"), str):
        return "config.json names no model_type"
    known = _known()
    try:
        installed = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        installed = "none"
    if installed != known["transformers"]:
        return f"transformers {installed} is installed, the list was made with {known['transformers']}"
    direct = frozenset(known["direct"])
    other = sorted({name for name in _values(config, "model_type") if name not in direct})
    if other:
        return f"transformers may rename or convert tensors of {', '.join(map(str, other))}"
    if "quantization_config" in config:
        return "the base is stored quantised"
    return ""


def _values(config: Mapping[str, Any], key: str) -> list[Any]:
    """The values of `key` in a config.json and in every configuration inside it."""
    found = [config[key]] if key in config else []
    for value in config.values():
        if isinstance(value, Mapping):
            found.extend(_values(value, key))
    return [value for value in found if isinstance(value, str | int)]


@functools.cache
def _known() -> Mapping[str, Any]:
    text = files("merge_adapter.names").joinpath("model_types.json").read_text(encoding="utf-8")
    return dict(json.loads(text))
