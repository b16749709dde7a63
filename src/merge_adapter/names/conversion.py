"""The general path: transformers' own loading rules, run on names and shapes.

`convert_and_load_state_dict_in_model` of transformers renames each key of a checkpoint, collects those that
make up one parameter, and converts them (stack experts, split a fused projection, permute for RoPE).
`converted_names` runs the same rules on meta tensors and keeps the result as groups: the disk tensors and
the parameters that turn into each other only together. Back to disk goes `revert_weight_conversion`, one
group at a time; base-model prefixes, which it does not restore, are restored from the forward map. A group is
tried there and back on shapes before it is first given out, on values where its operations are not transformers'
own; one that fails goes one way only.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from merge_adapter.methods.change import Group, ModuleKind, TensorSpec
from merge_adapter.names.one_way import OneWay, OneWayError

Tensors = Mapping[str, torch.Tensor]
_OWN_OPERATIONS = "transformers.core_model_loading"
"""Where the operations live that only move values, each with an exact reverse."""


@dataclass(frozen=True)
class ConvertedGroup:
    """Disk tensors and parameters that one conversion of transformers connects."""

    model: Any = field(repr=False)
    parameters: tuple[TensorSpec, ...]
    tensors: tuple[TensorSpec, ...]
    """On disk, in the order in which transformers converts them."""
    first: str
    """The parameter under which transformers files the conversion."""
    converter: Any = field(repr=False)
    """transformers' WeightConverter, unused so far."""
    patterns: tuple[str, ...] = field(repr=False)
    """For each disk tensor the converter's source pattern that it matched."""

    def load(self, tensors: Tensors) -> dict[str, torch.Tensor]:
        converter = deepcopy(self.converter)
        for spec, pattern in zip(self.tensors, self.patterns, strict=True):
            converter.add_tensor(self.first, spec.name, pattern, _Ready(tensors[spec.name]))
        made = converter.convert(self.first, model=self.model, config=self.model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def revert(self, parameters: Tensors) -> dict[str, torch.Tensor]:
        made = _revert(self.model, parameters)
        names = _names_on_disk(self.model, made, [spec.name for spec in self.tensors])
        return {names[name]: value for name, value in made.items()}


@dataclass(frozen=True)
class ConvertedNames:
    """A name map through transformers' conversions."""

    model: Any = field(repr=False)
    """The model on the meta device, the conversions that this checkpoint uses attached to it."""
    renamed: Mapping[str, str] = field(repr=False)
    """Parameter -> the one disk tensor that it is, value for value."""
    groups: dict[str, ConvertedGroup] = field(repr=False)
    """Parameter -> its group, tried or not; ask `group`."""
    shared: Mapping[str, tuple[str, ...]] = field(repr=False)
    """Parameter -> the others of the same storage."""
    unused: tuple[str, ...]
    """Tensors on disk that no parameter takes."""
    failures: dict[str, OneWay]
    """Parameter -> the conversion that makes it and cannot be undone, as far as has been tried."""
    tried: set[str] = field(default_factory=set, repr=False)
    """First parameters of the groups that were tried."""

    @property
    def architecture(self) -> str | None:
        return type(self.model).__name__

    def direct(self, parameter: str) -> str | None:
        for name in (parameter, *self.shared.get(parameter, ())):
            if name in self.renamed:
                return self.renamed[name]
        return None

    def group(self, parameter: str) -> Group | None:
        for name in (parameter, *self.shared.get(parameter, ())):
            group = self.groups.get(name)
            if group is not None and self._works(group):
                return group
        return None

    def tied(self, parameter: str) -> tuple[str, ...]:
        return self.shared.get(parameter, ())

    def ties(self) -> Iterable[tuple[str, ...]]:
        return dict.fromkeys(tuple(sorted((name, *others))) for name, others in self.shared.items())

    def tied_for_good(self, parameter: str) -> tuple[str, ...]:
        return self._untied.get(parameter, ())

    @cached_property
    def _untied(self) -> Mapping[str, tuple[str, ...]]:
        """What is still shared in this class once its config says that nothing is tied."""
        config = deepcopy(self.model.config)
        for part in (config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", ()))):
            if part is not None:
                part.tie_word_embeddings = False
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")  # constructors warn about choices that only matter for running
            return _shared(type(self.model)._from_config(config, dtype=torch.float32))

    def declared_ties(self, parameter: str) -> tuple[str, ...]:
        return self._declared.get(parameter, ())

    @cached_property
    def _declared(self) -> Mapping[str, tuple[str, ...]]:
        return _shared(self.model)

    def disk_name(self, parameter: str) -> str:
        """Where its module has tensors on disk, beside them; otherwise as transformers would save it."""
        module, _, leaf = parameter.rpartition(".")
        for name, tensor in self.renamed.items():
            if name.rpartition(".")[0] == module and tensor.rpartition(".")[2] == name.rpartition(".")[2]:
                return f"{tensor.rpartition('.')[0]}.{leaf}".removeprefix(".")
        names = list(_revert(self.model, {parameter: torch.empty(1, device="meta")}))
        return names[0] if len(names) == 1 else parameter

    def kind(self, module: str) -> ModuleKind:
        from transformers.pytorch_utils import Conv1D

        found = self.module(module)
        if isinstance(found, torch.nn.Linear):
            return ModuleKind.LINEAR
        if isinstance(found, Conv1D):
            return ModuleKind.CONV1D
        if isinstance(found, torch.nn.Embedding):
            return ModuleKind.EMBEDDING
        if isinstance(found, torch.nn.Conv1d | torch.nn.Conv2d | torch.nn.Conv3d):
            return ModuleKind.CONV
        return ModuleKind.OTHER

    def exists(self, module: str) -> bool | None:
        return self.module(module) is not None

    def modules(self) -> Iterable[str]:
        for name, module in self.model.named_modules():
            if next(iter(module.parameters(recurse=False)), None) is not None:
                yield name

    def _works(self, group: ConvertedGroup) -> bool:
        """Try a group there and back on meta tensors, once."""
        if group.first not in self.tried:
            self.tried.add(group.first)
            made = _try_group(group, self.model.state_dict())
            if isinstance(made, OneWay):
                self.failures.update((spec.name, made) for spec in made.parameters)
        return group.first not in self.failures

    def check_two_ways(self, parameter: str) -> None:
        """Raise OneWayError, with all that cannot be undone, when this parameter is among it."""
        self.group(parameter)
        name = next(
            (one for one in (parameter, *self.shared.get(parameter, ())) if one in self.failures), None
        )
        if name is None:
            return
        for group in self.groups.values():
            self._works(group)
        found = {id(one): one for one in self.failures.values()}
        raise OneWayError(name, self.model, tuple(found.values()))

    def module(self, path: str) -> torch.nn.Module | None:
        """The module on the meta device."""
        try:
            return self.model.get_submodule(path)  # type: ignore[no-any-return]
        except AttributeError:
            return None


def converted_names(model: Any, tensors: Mapping[str, TensorSpec]) -> ConvertedNames:
    """Map a checkpoint with these tensors onto a meta model; attaches the conversions in use to the model."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    conversions = get_model_conversion_mapping(model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    state = model.state_dict()
    prefix = model.base_model_prefix

    collected: dict[str, dict[str, str | None]] = {}
    unused = []
    for tensor in sorted(tensors, key=dot_natural_key):
        name, pattern = rename_source_key(tensor, renamings, converters, prefix, state)
        if name not in state and tensor in state:
            name, pattern = rename_source_key(tensor, [], [], prefix, state)
        if name in state:
            collected.setdefault(name, {})[tensor] = pattern
        else:
            unused.append(tensor)
    model._weight_conversions = [entry for entry in conversions if entry.was_used() and _reversible(entry)]

    renamed: dict[str, str] = {}
    groups: dict[str, ConvertedGroup] = {}
    failures: dict[str, OneWay] = {}
    for first, sources in collected.items():
        patterns = tuple(pattern for pattern in sources.values() if pattern is not None)
        if not patterns and len(sources) == 1:
            renamed[first] = next(iter(sources))
        elif len(patterns) != len(sources):
            whole = TensorSpec(first, tensors[next(iter(sources))].dtype, tuple(state[first].shape))
            reason = f"{first} is made from several tensors: {', '.join(list(sources)[:4])}"
            failures[first] = OneWay((whole,), tuple(sources), reason)
        else:
            specs = tuple(tensors[name] for name in sources)
            whole = TensorSpec(first, specs[0].dtype, tuple(state[first].shape))
            group = ConvertedGroup(model, (whole,), specs, first, by_pattern[patterns[0]], patterns)
            # One conversion into several parameters tells their names only when it is run.
            made = _try_group(group, state) if len(group.converter.target_patterns) > 1 else group
            if isinstance(made, OneWay):
                failures.update((spec.name, made) for spec in made.parameters)
            else:
                groups.update((spec.name, made) for spec in made.parameters)
    return ConvertedNames(model, renamed, groups, _shared(model), tuple(unused), failures)


def _try_group(group: ConvertedGroup, state: Tensors) -> ConvertedGroup | OneWay:
    """The group with the parameters it makes, after tensors went there and back; or why it goes one way only."""
    names, reason = [group.first], ""
    try:
        stored = {spec.name: _trial(group, spec) for spec in group.tensors}
        made = group.load(stored)
        names = sorted(made)
        _check_shapes(made, {name: tuple(state[name].shape) for name in made})
        back = group.revert(made)
        _check_shapes(back, {spec.name: spec.shape for spec in group.tensors})
        _check_values(back, stored)
    except Exception as error:  # noqa: BLE001 - any operation of transformers may fail; the plan then says why
        reason = f"{group.first} does not convert there and back: {type(error).__name__}: {error}"
    dtype = group.tensors[0].dtype
    parameters = tuple(TensorSpec(name, dtype, tuple(state[name].shape)) for name in names if name in state)
    if reason:
        return OneWay(parameters, tuple(spec.name for spec in group.tensors), reason)
    return replace(group, parameters=parameters)


def _trial(group: ConvertedGroup, spec: TensorSpec) -> torch.Tensor:
    """A tensor to try a conversion on: values only where the operation is not known to do nothing but move them."""
    if all(type(operation).__module__ == _OWN_OPERATIONS for operation in group.converter.operations):
        return torch.empty(spec.shape, device="meta")
    return torch.randn(spec.shape, generator=torch.Generator().manual_seed(0))


def _reversible(conversion: Any) -> bool:
    """Whether transformers has a reverse of it; one without would stop the way back of all others."""
    try:
        conversion.reverse_transform()
    except Exception:  # noqa: BLE001 - an operation without a reverse raises what it likes
        return False
    return True


def _names_on_disk(model: Any, made: Iterable[str], expected: list[str]) -> dict[str, str]:
    """Reverted names -> names on disk; they differ at most by the base-model prefix."""
    names: dict[str, str] = {}
    prefix = f"{model.base_model_prefix}."
    for name in made:
        forms = (name, prefix + name, name.removeprefix(prefix))
        known = next((form for form in forms if form in expected and form not in names.values()), None)
        if known is None:
            raise ValueError(f"reverting makes {name}, which is no tensor of the group")
        names[name] = known
    if len(names) != len(expected):
        raise ValueError(f"reverting makes {len(names)} tensors of {len(expected)}")
    return names


def _revert(model: Any, parameters: Tensors) -> dict[str, torch.Tensor]:
    from transformers.core_model_loading import revert_weight_conversion

    return dict(revert_weight_conversion(model, dict(parameters)))


class _Ready:
    """A tensor as transformers collects it while loading: something to call."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __call__(self) -> torch.Tensor:
        return self.tensor

    def __deepcopy__(self, memo: object) -> _Ready:
        return self


def _check_shapes(made: Tensors, expected: Mapping[str, tuple[int, ...]]) -> None:
    for name, tensor in made.items():
        if tuple(tensor.shape) != tuple(expected[name]):
            raise ValueError(f"{name} comes out as {list(tensor.shape)}, expected {list(expected[name])}")


def _check_values(made: Tensors, expected: Tensors) -> None:
    for name, tensor in made.items():
        if not tensor.is_meta and not torch.equal(tensor, expected[name]):
            raise ValueError(f"{name} comes back with other values")


def _shared(model: Any) -> dict[str, tuple[str, ...]]:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {
        name: tuple(other for other in same if other != name)
        for same in names.values()
        if len(same) > 1
        for name in same
    }
