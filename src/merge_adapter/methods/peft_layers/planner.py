"""Any method of PEFT, merged by PEFT's own layers, one module at a time.

The plan is made on a model of ghosts: PEFT builds its layers there, which tells every tensor it would save and
the module each belongs to. When it runs, each module in turn gets its real weights, in float32, PEFT's `merge()`
changes them, and the ghost returns. Modules whose weights lie in one conversion group on disk (experts, a fused
projection) are done together. Methods whose initialisation reads a weight get a model of that one module; what even
that cannot do is done on the whole model in memory, by the same functions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from merge_adapter.errors import AccountingError, BaseModelError, MethodError
from merge_adapter.methods.adapter_file import PREFIX
from merge_adapter.methods.change import (
    Change,
    Context,
    Kind,
    ModuleChange,
    Planned,
    TensorSpec,
)
from merge_adapter.methods.edits.heads import head_changes
from merge_adapter.methods.edits.placing import place
from merge_adapter.methods.edits.replacements import replacement_edits
from merge_adapter.methods.edits.tying import check_can_part, loosened_copies
from merge_adapter.methods.peft_layers.ghost import ghostly
from merge_adapter.methods.peft_layers.model import AdaptedModel, Assigned, Layer, adapt, assign, check_sizes
from merge_adapter.methods.peft_layers.run import MergeTogether, Output, Session, Source
from merge_adapter.methods.refuse import check_method
from merge_adapter.methods.table import Method, Way
from merge_adapter.names.conversion import ConvertedNames
from merge_adapter.types import Strategy

_COPIES = 10
"""PEFT's merge of one module takes up to this many times the module's weight in float32."""
_GHOST_BYTES = 64 << 20
"""What the model of ghosts takes, apart from the adapter."""


def plan_peft(context: Context, *, in_memory: bool = False) -> Planned:
    """Plan an adapter of any mergeable method through PEFT's layers.

    `context.names` must be a ConvertedNames. `in_memory` asks for the in-memory way whatever the method.
    Raises MethodError, AccountingError, ShapeError or BaseModelError.
    """
    method = check_method(context.config)
    names = context.names
    if not isinstance(names, ConvertedNames):
        raise TypeError(f"expected ConvertedNames, got {type(names).__name__}")
    if context.adapter.weight != 1.0 and not method.scaled:
        raise MethodError(
            f"A {method.title} adapter cannot be merged with weight {context.adapter.weight}: PEFT's layer has no scale"
            " to give it, and a part of a change that was trained as a whole has no meaning of its own.",
            hint="Give this adapter the weight 1.",
        )
    if context.config.get("layer_replication"):
        raise MethodError(
            "This variant of LoRA goes through PEFT's own layers, in which replicated layers share their weights.",
            hint="Keep the adapter and load it with PEFT beside its base.",
        )
    check_sizes(context.config, context.tensors)
    adapted = adapt(ghostly(names.model), context.config, weight=context.adapter.weight)
    way, reason = _way(method, context.config, adapted, in_memory=in_memory)
    if way is Way.MEMORY and context.settings.strategy is Strategy.STREAM:
        raise MethodError(
            f"This adapter cannot be streamed: {reason}.",
            hint="Leave out --strategy stream; the merge then loads the base.",
        )
    assigned = assign(
        adapted,
        context.tensors,
        set(names.model.state_dict()),
        shapes_known=method.peft_type != "ADAMSS",  # whose clusters have the sizes that the weight gives them
    )
    planner = _Planner(context, names, method, adapted, assigned, way)
    return planner.plan(reason)


def _way(
    method: Method, config: Mapping[str, Any], adapted: AdaptedModel, *, in_memory: bool
) -> tuple[Way, str]:
    """How the modules are merged, and why in memory when they are."""
    if in_memory:
        return Way.MEMORY, "it was asked for"
    way = Way.ALONE if config.get("kasa_config") else method.way_for(config)
    if way is Way.MEMORY:
        return way, f"{method.title} cannot be merged module by module: {method.note}".rstrip(".")
    if way is not Way.ALONE and adapted.reads and not method.reads_weights:
        return (
            Way.MEMORY,
            f"PEFT's initialisation of {method.title} read base weights, which it was not known to do",
        )
    return (Way.LAYER if way is Way.ROWS else way), ""


@dataclass(frozen=True)
class _Planner:
    context: Context
    names: ConvertedNames
    method: Method
    adapted: AdaptedModel
    assigned: Assigned
    way: Way

    def plan(self, reason: str) -> Planned:
        layers = self.adapted.layers()
        if not layers and not self.assigned.parameters:
            raise MethodError("The adapter changes nothing: no module of the base is a target of it.")
        weight = self.context.adapter.weight
        session = Session(self.names, self.adapted, self.assigned, self.context.config, self.way, weight)
        outputs = {layer.path: self._outputs(layer) for layer in layers}
        parting = self._parting(layers, outputs)
        untied, copies = self._untied(parting, outputs)
        changes: list[Change] = []
        shared = self.assigned.shared
        for members in self._together(layers, outputs):
            changes.append(self._change(session, members, outputs, untied, shared))
            shared = ()  # counted once
        trained = self._trained({output.parameter for made in outputs.values() for output in made}, parting)
        in_memory = self.way is Way.MEMORY
        return replace(
            trained,
            changes=(*trained.changes, *changes, *copies),
            strategy=Strategy.MEMORY if in_memory else Strategy.STREAM,
            strategy_reason=reason if in_memory else "",
        )

    # ------------------------------------------------------------------------------- where parameters lie

    def _outputs(self, layer: Layer) -> tuple[Output, ...]:
        """The parameters of the base that a layer changes, and where each is written."""
        wanted = layer.only or self.method.writes
        held = [name for name in wanted if layer.base._parameters.get(name) is not None]
        if self.context.config.get("lora_bias") and layer.base._parameters.get("bias") is not None:
            held.append("bias")
        if not held and hasattr(layer.base, "in_proj_weight"):
            raise MethodError(
                f"{layer.path} is torch's MultiheadAttention, which is merged by streaming only.",
                hint="Leave out --strategy memory.",
            )
        if not held:
            raise MethodError(
                f"{layer.path}: {self.method.title} changes {' and '.join(wanted)}, which the base's module lacks.",
                hint="This architecture cannot hold the update; keep the adapter unmerged.",
            )
        return tuple(Output(f"{layer.path}.{name}", self._source(f"{layer.path}.{name}")) for name in held)

    def _source(self, parameter: str) -> Source:
        tensor = self.names.direct(parameter)
        if tensor is not None:
            return Source(self.context.base[tensor], None)
        group = self.names.group(parameter)
        if group is not None:
            return Source(None, group)
        self.names.check_two_ways(parameter)
        names = self.assigned.of_module.get(parameter.rpartition(".")[0], ())
        raise AccountingError(
            f"The adapter changes {parameter}, which a {self.names.architecture} has, but which is neither in the"
            " base checkpoint nor in the adapter. In training it was random, and nothing recorded its values.",
            tensors=names,
            hint="Name the very base of the training with --base-model. Or train again with this module in"
            " modules_to_save, or out of target_modules.",
        )

    def _together(
        self, layers: Iterable[Layer], outputs: Mapping[str, tuple[Output, ...]]
    ) -> list[tuple[Layer, ...]]:
        """Layers that must be merged in one go: those with disk tensors in common, or all of them in memory."""
        layers = tuple(layers)
        if self.way is Way.MEMORY:
            return [layers] if layers else []
        sets: list[tuple[set[str], list[Layer]]] = []
        for layer in layers:
            tensors = {name for output in outputs[layer.path] for name in output.source.tensors}
            joined = [entry for entry in sets if entry[0] & tensors]
            merged = (
                tensors.union(*(entry[0] for entry in joined)),
                [m for e in joined for m in e[1]] + [layer],
            )
            sets = [entry for entry in sets if entry not in joined] + [merged]
        return [tuple(members) for _, members in sets]

    def _parting(
        self, layers: Iterable[Layer], outputs: Mapping[str, tuple[Output, ...]]
    ) -> frozenset[tuple[str, ...]]:
        """The sets of tied parameters whose members were different in training.

        Trained tokens are the exception: PEFT then adapts all of them with the same values.
        """
        adapted = {output.parameter for made in outputs.values() for output in made}
        tokens = any(getattr(p, "tied_adapter", None) for layer in layers for p in layer.layers)
        return frozenset(
            members
            for members in self.names.ties()
            if adapted & set(members)
            and not set(members) <= set(self.names.renamed)
            and not (tokens and set(members) <= adapted)
        )

    def _untied(
        self, parting: Iterable[tuple[str, ...]], outputs: Mapping[str, tuple[Output, ...]]
    ) -> tuple[dict[str, TensorSpec], tuple[Change, ...]]:
        """Adapted parameters that must get a tensor of their own, and the copies that their partners need."""
        adapted = {output.parameter for made in outputs.values() for output in made}
        new: dict[str, TensorSpec] = {}
        copies: list[Change] = []
        for members in sorted(parting):
            check_can_part(self.context, members)
            self._check_replaced(members, adapted)
            idle = tuple(name for name in members if name not in adapted)
            copies.extend(loosened_copies(self.context, idle))
            for own in set(members) - set(idle) - set(self.names.renamed):
                tensor = self.context.base[self.names.direct(own) or ""]
                new[own] = TensorSpec(self.names.disk_name(own), tensor.dtype, tensor.shape)
        return new, tuple(copies)

    def _check_replaced(self, members: tuple[str, ...], adapted: set[str]) -> None:
        """Refuse a tie that parts while the adapter holds another tensor for one of its members."""
        replaced = [name for name in members if name in self.assigned.parameters and name not in adapted]
        if replaced:
            raise BaseModelError(
                f"{' and '.join(members)} are tied in the base; this {self.method.title} adapter unties them and"
                f" holds whole tensors for {' and '.join(replaced)}.",
                hint="Untie the base's embeddings first, or keep the adapter unmerged.",
            )

    # ------------------------------------------------------------------------------------------- changes

    def _change(
        self,
        session: Session,
        members: tuple[Layer, ...],
        outputs: Mapping[str, tuple[Output, ...]],
        untied: Mapping[str, TensorSpec],
        shared: tuple[str, ...],
    ) -> ModuleChange:
        made = tuple(output for layer in members for output in outputs[layer.path])
        own = {output.parameter: untied[output.parameter] for output in made if output.parameter in untied}
        arithmetic = MergeTogether(session, tuple(layer.path for layer in members), made, own)
        consumed = [name for layer in members for name in self.assigned.of_module.get(layer.path, ())]
        consumed += [name for p in arithmetic.parameters for name in self.assigned.parameters.get(p, ())]
        elements = max((spec.elements for spec in arithmetic.writes), default=0)
        if self.way is Way.MEMORY:
            elements = sum(parameter.numel() for parameter in self.names.model.parameters())
        reads = dict.fromkeys(name for output in made for name in output.source.tensors)
        return ModuleChange(
            module=members[0].path if len(members) == 1 else f"{members[0].path} and {len(members) - 1} more",
            reads=tuple(reads),
            writes=arithmetic.writes,
            consumes=(*consumed, *shared),
            kind=self._kind(),
            memory_bytes=_GHOST_BYTES + (2 if self.way is Way.MEMORY else _COPIES) * 4 * elements,
            arithmetic=arithmetic,
        )

    def _kind(self) -> Kind:
        config = self.context.config
        # its factors come out of the weight itself
        depends = Way.ALONE in (self.way, self.method.way_for(config)) or config.get("kasa_config")
        if depends or config.get("use_dora") or config.get("init_weights") == "bat":
            return Kind.MULTIPLICATIVE
        assert self.method.kind is not None
        return self.method.kind

    def _trained(self, merged: set[str], parting: frozenset[tuple[str, ...]]) -> Planned:
        """Tensors of the adapter that simply take a parameter's place: heads, saved modules, biases."""
        specs = {
            name.removeprefix(PREFIX): self.context.tensors[name]
            for parameter, names in self.assigned.parameters.items()
            if parameter not in merged
            for name in names
        }
        edits = replacement_edits(self.context, specs)
        return head_changes(self.context, place(self.context, edits, parting=parting))
