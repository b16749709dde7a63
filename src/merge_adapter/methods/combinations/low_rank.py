"""PEFT's weighted combinations of LoRA adapters, as one adapter whose factors are made when they are read.

The rest of the merge sees a single LoRA: its config and its tensors are those that PEFT's `add_weighted_adapter`
would leave, and each module's pair of factors is computed when that module is merged, so that memory stays that
of a module. Sequential merges need none of this; there every adapter is planned by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any

from merge_adapter.errors import InputError, MethodError, ShapeError
from merge_adapter.methods.adapter_file import PREFIX, AdapterFile
from merge_adapter.methods.change import TensorSpec
from merge_adapter.methods.combinations.combined import Together
from merge_adapter.methods.combinations.vectors import CombinedVectors, combine_vectors
from merge_adapter.methods.lora.planner import Factors, scale_of, sort_tensors
from merge_adapter.methods.patterns import check_patterns
from merge_adapter.methods.reach import check_reached
from merge_adapter.types import Combination, CombinationType

if TYPE_CHECKING:
    from merge_adapter.methods.combinations.weights import CombinedWeights

_PRUNING = ("ties", "dare", "magnitude")
_OF_FACTORS = frozenset(
    {
        CombinationType.LINEAR,
        CombinationType.TIES,
        CombinationType.DARE_LINEAR,
        CombinationType.DARE_TIES,
        CombinationType.MAGNITUDE_PRUNE,
    }
)
"""Types that combine A with A and B with B, which must then be of one rank."""
_NOT_A_SUM = {
    "use_dora": "DoRA",
    "lora_bias": "lora_bias",
    "target_parameters": "target_parameters",
    "kasa_config": "KaSA",
    "use_bdlora": "BD-LoRA",
}
"""Keys of a LoRA's config for which PEFT's combinations lose a part of the adapter: key -> name."""
_COPY = ".base_layer."
_ONE_BY_ONE = "Leave out --combination: the adapters' updates are then added up, each with its weight."


@dataclass(frozen=True)
class Part:
    """One adapter's factors of one module."""

    number: int
    """Which of the adapters, counted from 0."""
    a: TensorSpec
    """`[r, in]`, or `[r, in, *kernel]` of a convolution."""
    b: TensorSpec
    """`[out, r]`, or `[out, r, 1, …]`."""
    weight: float
    """The adapter's."""
    scale: float
    """PEFT's scaling of the module."""

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True)
class CombinedModule:
    """A module that at least one of the adapters changes."""

    path: str
    parts: tuple[Part, ...]
    a: TensorSpec
    """The combined factors, of the rank of the whole."""
    b: TensorSpec
    transposed: bool
    """Whether PEFT holds the update of this module transposed: embeddings, and layers with fan_in_fan_out."""


@dataclass(frozen=True)
class CombinedFile(Together):
    """Several LoRA adapters as one. Answers like an AdapterFile."""

    combination: Combination
    modules: tuple[CombinedModule, ...]

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """The combined tensors, under repaired names."""
        return {spec.name: spec for module in self.modules for spec in (module.a, module.b)}

    @property
    def memory_bytes(self) -> int:
        """What making one module's factors takes at most: its updates in float64, and about four more for an SVD."""
        kind = self.combination.type
        whole = kind.endswith("svd") and kind is not CombinationType.SVD
        largest = 0
        for module in self.modules:
            factors = sum(part.a.elements + part.b.elements for part in module.parts)
            updates = (len(module.parts) + 4) * module.b.shape[0] * prod(module.a.shape[1:]) if whole else 0
            largest = max(largest, 8 * (updates + 3 * factors))
        return largest

    def open(self) -> CombinedWeights:
        """The combined tensors, computed as they are read."""
        from merge_adapter.methods.combinations.weights import CombinedWeights  # imports torch

        return CombinedWeights(self)


def check_combination(combination: Combination, adapters: int) -> None:
    """Raise InputError for settings of a combination that have no sense, or no effect."""
    kind = combination.type
    prunes = any(word in kind for word in _PRUNING)
    if kind is not CombinationType.SEQUENTIAL and adapters < 2:
        raise InputError(
            f"--combination {kind} was given with a single adapter",
            hint="Name the others: --adapter OWNER/NAME, once for each.",
        )
    if prunes and combination.density is None:
        raise InputError(
            f"--combination {kind} needs to know how many values to keep",
            hint="Give --density, above 0 and at most 1; 0.5 is common.",
        )
    if combination.density is not None and not prunes:
        raise InputError(f"--density has no effect with --combination {kind}", hint="Leave it out.")
    if combination.density is not None and not 0 < combination.density <= 1:
        raise InputError(
            f"the density {combination.density} is not above 0 and at most 1", hint="Give 0.5, for example."
        )
    if combination.svd_rank is not None and not kind.endswith("svd"):
        raise InputError(f"--svd-rank has no effect with --combination {kind}", hint="Leave it out.")


def combine(files: Sequence[AdapterFile], combination: Combination) -> CombinedFile | CombinedVectors:
    """The adapters as the one that PEFT's `add_weighted_adapter` makes of them. Reads headers alone.

    Raises MethodError for what PEFT has no rule for, ShapeError for adapters that do not fit each other.
    """
    if all(file.adapter.method == "IA3" for file in files):
        return combine_vectors(files, combination)
    found = [_factors(file) for file in files]
    paths = tuple(dict.fromkeys(path for one in found for path in one))
    parts = {path: _parts(path, found, files) for path in paths}
    rank = _rank(parts, combination)
    modules = tuple(
        _module(path, parts[path], rank, files[parts[path][0].number].adapter.config) for path in paths
    )
    return CombinedFile(
        adapter=replace(files[0].adapter, config=_config(files, paths, rank), weight=1.0),
        files=tuple(files),
        combination=combination,
        modules=modules,
    )


def without_copies(file: AdapterFile, base: Mapping[str, TensorSpec]) -> AdapterFile:
    """The file without the frozen copies of base tensors that PEFT saves beside an adapted embedding.

    One adapter's copy may stand for the base; of several, each with its own, none can. A copy of another shape belongs
    to a vocabulary that was resized, and is kept.
    """
    sizes: dict[str, set[tuple[int, ...]]] = {}
    for spec in base.values():
        sizes.setdefault(_ending(spec.name), set()).add(spec.shape)
    copies = {
        name
        for name, spec in file.specs.items()
        if _COPY in name and spec.shape in sizes.get(_ending(name.replace(_COPY, ".")), ())
    }
    if not copies:
        return file
    kept = {name: stored for name, stored in file.stored.items() if name not in copies}
    note = f"{len(copies)} frozen copies of base tensors that an adapter carries were not used."
    return replace(file, stored=kept, notes=(*file.notes, note))


def _ending(name: str) -> str:
    """The module's own name and the parameter's; what stands before differs between checkpoints."""
    return ".".join(name.split(".")[-2:])


def _factors(file: AdapterFile) -> Mapping[str, Factors]:
    """The adapter's modules. Raises MethodError or AccountingError where something of it would be lost."""
    adapter = file.adapter
    if adapter.method != "LORA":
        raise MethodError(
            f"{adapter.repository.origin} is of the method {adapter.method}; PEFT combines LoRA adapters"
            " with each other and IA3 adapters with each other.",
            hint=_ONE_BY_ONE,
        )
    for key, name in _NOT_A_SUM.items():
        if adapter.config.get(key):
            raise MethodError(
                f"{adapter.repository.origin} uses {name} ({key} in adapter_config.json), which PEFT's combinations"
                " would lose.",
                hint=_ONE_BY_ONE,
            )
    check_patterns(adapter.config, [name.removeprefix(PREFIX) for name in file.specs])
    found = sort_tensors(file.specs)
    if found.rest:
        shown = ", ".join(list(found.rest)[:6]) + (", …" if len(found.rest) > 6 else "")
        raise MethodError(
            f"{adapter.repository.origin} also holds {len(found.rest)} tensors that were trained whole, for which"
            f" PEFT's combinations have no rule: {shown}.",
            hint=_ONE_BY_ONE,
        )
    check_reached(adapter.config, {factors.module: factors.names for factors in found.factors})
    return {factors.module: factors for factors in found.factors}


def _parts(
    path: str, found: Sequence[Mapping[str, Factors]], files: Sequence[AdapterFile]
) -> tuple[Part, ...]:
    parts = []
    for number, modules in enumerate(found):
        if path not in modules:
            continue
        held = modules[path]
        names = ("lora_embedding_A", "lora_embedding_B") if held.embedding else ("lora_A", "lora_B")
        if any(name not in held.parts for name in names) or len(held.parts) != len(names):
            raise MethodError(
                f"{path}: {files[number].adapter.repository.origin} holds {', '.join(held.parts)}, where PEFT"
                f" combines {' and '.join(names)}.",
                hint=_ONE_BY_ONE,
            )
        a, b = (held.parts[name] for name in names)
        adapter = files[number].adapter
        parts.append(Part(number, a, b, adapter.weight, scale_of(adapter.config, path, a.shape[0])))
    first = parts[0]
    for part in parts[1:]:
        if part.a.name != first.a.name or (part.a.shape[1:], part.b.shape[0]) != (
            first.a.shape[1:],
            first.b.shape[0],
        ):
            raise ShapeError(
                f"{path}: adapter {first.number + 1} has factors {list(first.a.shape)} and {list(first.b.shape)},"
                f" adapter {part.number + 1} has {list(part.a.shape)} and {list(part.b.shape)}.",
                hint="They were trained on different bases and cannot be combined.",
            )
    return tuple(parts)


def _rank(parts: Mapping[str, tuple[Part, ...]], combination: Combination) -> int:
    """The rank of the whole: that of the module which needs most. Raises MethodError."""
    kind = combination.type
    if kind is CombinationType.CAT:
        return max(sum(part.rank for part in held) for held in parts.values())
    if kind in _OF_FACTORS:
        for path, held in parts.items():
            if len({part.rank for part in held}) > 1:
                ranks = ", ".join(f"adapter {part.number + 1} has {part.rank}" for part in held)
                raise MethodError(
                    f"{path}: --combination {kind} adds factors element by element, so they must be of one rank;"
                    f" {ranks}.",
                    hint="Use --combination cat or svd, or none: sums of updates need no common rank.",
                )
    largest = max(part.rank for held in parts.values() for part in held)
    return combination.svd_rank or largest if kind.endswith("svd") else largest


def _module(path: str, parts: tuple[Part, ...], rank: int, config: Mapping[str, Any]) -> CombinedModule:
    first = parts[0]
    return CombinedModule(
        path,
        parts,
        TensorSpec(first.a.name, "F32", (rank, *first.a.shape[1:])),
        TensorSpec(first.b.name, "F32", (first.b.shape[0], rank, *first.b.shape[2:])),
        transposed="lora_embedding" in first.a.name or bool(config.get("fan_in_fan_out")),
    )


def _config(files: Sequence[AdapterFile], paths: tuple[str, ...], rank: int) -> dict[str, Any]:
    """The first adapter's, as PEFT has it, of scale 1 and with the targets of all."""
    configs = [file.adapter.config for file in files]
    targets = [config.get("target_modules") for config in configs]
    merged = {
        **configs[0],
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
    }
    keys = ("layers_to_transform", "layers_pattern", "exclude_modules")
    if all(isinstance(target, list) for target in targets) and all(
        config.get(key) == configs[0].get(key) for config in configs for key in keys
    ):
        merged["target_modules"] = sorted({name for target in targets if target for name in target})
    else:  # each module by its full path says the same without patterns
        merged |= {"target_modules": list(paths), **dict.fromkeys(keys)}
    return merged
