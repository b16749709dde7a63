"""Running PEFT's layers on real weights, module by module."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch

from merge_adapter.errors import BaseModelError, MethodError, ShapeError
from merge_adapter.methods.change import Group, TensorSpec, Weights
from merge_adapter.methods.peft_layers.ghost import ghostly, place, restore, skeleton
from merge_adapter.methods.peft_layers.model import AdaptedModel, Assigned, Layer, adapt, quiet, read_all
from merge_adapter.methods.table import Way

if TYPE_CHECKING:
    from torch import Tensor

    from merge_adapter.names.conversion import ConvertedNames


@dataclass(frozen=True)
class Source:
    """Where a parameter lies on disk: one tensor, or a group of them."""

    tensor: TensorSpec | None
    group: Group | None

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        if self.tensor is not None:
            return (self.tensor,)
        return tuple(self.group.tensors) if self.group is not None else ()

    @property
    def tensors(self) -> tuple[str, ...]:
        return tuple(spec.name for spec in self.specs)


@dataclass(frozen=True)
class Output:
    """A parameter that a layer changes."""

    parameter: str
    source: Source


@dataclass
class Session:
    """What the changes of one adapter share: PEFT's model, loaded once, used by one thread at a time."""

    names: ConvertedNames = field(repr=False)
    adapted: AdaptedModel = field(repr=False)
    assigned: Assigned = field(repr=False)
    config: Mapping[str, Any]
    way: Way
    weight: float = 1.0
    lock: Lock = field(default_factory=Lock, repr=False)
    _layers: dict[str, Layer] = field(default_factory=dict, repr=False)

    def merge(
        self, paths: tuple[str, ...], values: dict[str, Tensor], base: Weights, adapter: Weights
    ) -> None:
        """Replace `values` (parameter -> float32) of these modules by their merged values."""
        if self.way is Way.ALONE:
            for path in paths:
                _merge_layer(self._alone(path, values, adapter), values)
        elif self.way is Way.MEMORY:
            for layer in self._whole(values, base, adapter):
                _merge_layer(layer, values)
        else:
            self._load(adapter)
            for path in paths:
                self._merge_ghost(self._layers[path], values)

    def _load(self, adapter: Weights) -> None:
        if not self._layers:
            self.adapted.load(read_all(adapter, self._own_names()))
            self._layers = {layer.path: layer for layer in self.adapted.layers()}

    def _own_names(self) -> list[str]:
        return [
            *self.assigned.shared,
            *(name for names in self.assigned.of_module.values() for name in names),
        ]

    def _merge_ghost(self, layer: Layer, values: dict[str, Tensor]) -> None:
        """Lend a layer its real values for the merge; the ghosts return afterwards."""
        real = {
            name: values[f"{layer.path}.{name}"].clone()
            for name, parameter in layer.base._parameters.items()
            if parameter is not None and f"{layer.path}.{name}" in values
        }
        before = place(layer.base, real)
        try:
            _merge_layer(layer, values)
        finally:
            if layer.layers[0].get_base_layer() is not layer.base:
                layer.layers[0].unmerge()
            restore(layer.base, before)
            for part in layer.layers:
                part.merged_adapters = []

    def _alone(self, path: str, values: Mapping[str, Tensor], adapter: Weights) -> Layer:
        """PEFT's layer for one module, initialised from its real weight."""
        if not self._layers:
            self._layers = {layer.path: layer for layer in self.adapted.layers()}
        original = self._layers[path].base
        module = copy.copy(original)
        module._parameters = dict(original._parameters)
        real = {name: values[f"{path}.{name}"] for name in module._parameters if f"{path}.{name}" in values}
        place(module, {name: value.clone() for name, value in real.items()})
        adapted = adapt(skeleton(path, module), self.config, only=path, weight=self.weight)
        adapted.load(read_all(adapter, (*self.assigned.shared, *self.assigned.of_module.get(path, ()))))
        return adapted.layers()[0]

    def _whole(self, values: Mapping[str, Tensor], base: Weights, adapter: Weights) -> tuple[Layer, ...]:
        """PEFT's layers on a model that holds every weight."""
        model = ghostly(self.names.model)
        done: set[int] = set()
        for path, module in model.named_modules():
            for name, parameter in list(module._parameters.items()):
                full = f"{path}.{name}" if path else name
                if parameter is None:
                    continue
                if full in values:  # its own, whatever it is tied to: each layer must see the base's values
                    module._parameters[name] = torch.nn.Parameter(values[full].clone(), requires_grad=False)
                elif id(parameter) not in done and (value := self._read(full, base)) is not None:
                    parameter.data = value
                    done.add(id(parameter))
        adapted = adapt(model, self.config, weight=self.weight)
        adapted.load(read_all(adapter, self._own_names()))
        return adapted.layers()

    def _read(self, parameter: str, base: Weights) -> Tensor | None:
        tensor = self.names.direct(parameter)
        if tensor is not None:
            return base.read(tensor).float()
        group = self.names.group(parameter)
        if group is not None:
            return group.load({spec.name: base.read(spec.name) for spec in group.tensors})[parameter].float()
        return None


def _merge_layer(layer: Layer, values: dict[str, Tensor]) -> None:
    """PEFT's merge of one module that holds real values; replaces those in `values`."""
    try:
        with torch.no_grad(), quiet():
            for part in layer.layers:
                part.merge()
    except (ValueError, RuntimeError, NotImplementedError, TypeError, AttributeError) as error:
        raise MethodError(
            f"{layer.path}: PEFT cannot merge this adapter: {error}",
            hint="Keep the adapter and load it with PEFT beside its base.",
        ) from error
    inside = layer.layers[0].get_base_layer()  # LN tuning puts its own module there
    for name, parameter in inside._parameters.items():
        if parameter is not None and f"{layer.path}.{name}" in values:
            values[f"{layer.path}.{name}"] = parameter.data


@dataclass(frozen=True)
class MergeTogether:
    """The arithmetic of one ModuleChange: some adapted modules and the disk tensors they are made from."""

    session: Session = field(repr=False)
    paths: tuple[str, ...]
    outputs: tuple[Output, ...]
    own: Mapping[str, TensorSpec]
    """Parameter -> the tensor it gets for itself, apart from the one it was tied to."""

    @property
    def parameters(self) -> tuple[str, ...]:
        """All parameters of the modules that may come from the adapter instead of the base."""
        return tuple(output.parameter for output in self.outputs)

    @property
    def writes(self) -> tuple[TensorSpec, ...]:
        written: dict[str, TensorSpec] = {}
        for output in self.outputs:
            specs = (self.own[output.parameter],) if output.parameter in self.own else output.source.specs
            written.update((spec.name, spec) for spec in specs)
        return tuple(written.values())

    def run(self, base: Weights, adapter: Weights) -> Iterator[tuple[str, Tensor]]:
        """Each tensor of `writes`, float32, not yet rounded."""
        with self.session.lock:
            groups: dict[int, Group] = {}
            values: dict[str, Tensor] = {}
            for output in self.outputs:
                self._load(output, base, values, groups)
            for parameter in self.parameters:
                if names := self.session.assigned.parameters.get(parameter):
                    values[parameter] = adapter.read(names[0]).float()
            written = set(values)
            self._read_rest(base, values)
            rest = {name: value for name, value in values.items() if name not in written}
            self.session.merge(self.paths, values, base, adapter)
            for name, value in rest.items():
                if not torch.equal(values[name], value):
                    raise MethodError(
                        f"{name} was changed by a method that is not known to change it.",
                        hint="Use --strategy memory, and report this.",
                    )
        yield from self._written(values, groups)

    def _load(
        self, output: Output, base: Weights, values: dict[str, Tensor], groups: dict[int, Group]
    ) -> None:
        source = output.source
        if source.tensor is not None:
            values[output.parameter] = base.read(source.tensor.name).float()
        elif source.group is not None and id(source.group) not in groups:
            groups[id(source.group)] = source.group
            values.update(load_group(source.group, base))

    def _read_rest(self, base: Weights, values: dict[str, Tensor]) -> None:
        """Parameters of the modules that the method reads but does not change, such as biases."""
        for path in self.paths:
            module = self.session.names.model.get_submodule(path)
            for name, parameter in module._parameters.items():
                full = f"{path}.{name}"
                if parameter is None or full in values:
                    continue
                value = self.session._read(full, base)
                if value is not None:
                    values[full] = value
        for path in self.paths:
            module = self.session.names.model.get_submodule(path)
            for name, parameter in module._parameters.items():
                if parameter is not None and f"{path}.{name}" in values:
                    _check_shape(f"{path}.{name}", parameter.shape, values[f"{path}.{name}"].shape)

    def _written(
        self, values: Mapping[str, Tensor], groups: Mapping[int, Group]
    ) -> Iterator[tuple[str, Tensor]]:
        made: dict[str, Tensor] = {}
        for output in self.outputs:
            tensor = self.own.get(output.parameter, output.source.tensor)
            if tensor is None:
                continue
            value = values[output.parameter]
            if tensor.name in made and not torch.equal(made[tensor.name], value):
                raise BaseModelError(
                    f"{tensor.name} is shared by tied parameters that this adapter gives different values.",
                    hint="Keep the adapter unmerged.",
                )
            made[tensor.name] = value
        yield from made.items()
        for group in groups.values():
            yield from group.revert({spec.name: values[spec.name] for spec in group.parameters}).items()


def load_group(group: Group, base: Weights) -> dict[str, Tensor]:
    """The parameters of a group in float32. Raises BaseModelError unless they go back to disk bit for bit."""
    stored = {spec.name: base.read(spec.name) for spec in group.tensors}
    loaded = group.load(stored)
    back = group.revert(loaded)
    for name, tensor in stored.items():
        if not torch.equal(back[name], tensor):
            raise BaseModelError(
                f"{name} does not come back bit for bit from the form transformers loads it in.",
                hint="transformers cannot undo its own conversion of this checkpoint; keep the adapter unmerged.",
            )
    return {name: value.float() for name, value in loaded.items()}


def _check_shape(parameter: str, expected: torch.Size, got: torch.Size) -> None:
    if tuple(expected) != tuple(got):
        raise ShapeError(
            f"{parameter}: expected {list(expected)} by the base's config.json, got {list(got)} on disk.",
            hint="The base's config.json and its weights do not belong together.",
        )
