"""From edits of parameters to changes of disk tensors.

A planner of row arithmetic says what happens to each parameter of the adapted model (`Edit`); `place` finds
where the parameters are and makes the changes: directly, through a group that transformers converts on
load, as a new tensor, or on one of two tensors that were tied and now part.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from merge_adapter.errors import AccountingError, ShapeError
from merge_adapter.methods.change import (
    FLOATING,
    Change,
    Context,
    Group,
    Kind,
    Replacement,
    RowArithmetic,
    RowChange,
    TensorSpec,
)
from merge_adapter.methods.edits.grouped import plan_group
from merge_adapter.methods.edits.resizing import may_resize, vocabularies
from merge_adapter.methods.edits.tying import Ties, find_ties


@dataclass(frozen=True)
class Edit:
    """What an adapter does to one parameter. Edits of one parameter apply in the order they are given."""

    parameter: str
    """As the adapted model names it."""
    consumes: tuple[str, ...]
    kind: Kind
    arithmetic: RowArithmetic | None = None
    """How rows change; None when a tensor of the adapter takes the parameter's place."""
    shape: tuple[int, ...] | None = None
    """The shape the parameter must have, or gets when it is replaced; None when rows fit any."""
    follows_ties: bool = False
    """Whether a parameter tied to this one changes with it, as it did in training."""
    counted: bool = True
    """False for an edit that uses adapter tensors which another edit accounts for."""


@dataclass(frozen=True)
class Placed:
    """Changes of the checkpoint."""

    changes: tuple[Change, ...]
    notes: tuple[str, ...] = ()
    untied: bool = False
    """Whether tied tensors have parted, so that the config must say so."""
    added: tuple[str, ...] = ()
    """Parameters that the base checkpoint lacks and the output has, untied copies not counted."""


@dataclass(frozen=True)
class OnDisk:
    """The parameter is one tensor of the checkpoint, value for value."""

    tensor: TensorSpec


@dataclass(frozen=True)
class Grouped:
    """The parameter is on disk in another form."""

    group: Group
    parameter: TensorSpec


@dataclass(frozen=True)
class Absent:
    """The checkpoint does not have the parameter."""


def locate(context: Context, parameter: str) -> OnDisk | Grouped | Absent:
    """Where a parameter is in the base checkpoint. Raises OneWayError where it cannot be written back."""
    name = context.names.direct(parameter)
    if name is not None and name in context.base:
        return OnDisk(context.base[name])
    group = context.names.group(parameter)
    if group is not None:
        found = next((spec for spec in group.parameters if spec.name == parameter), None)
        if found is not None:
            return Grouped(group, found)
    context.names.check_two_ways(parameter)
    return Absent()


def shape_of(context: Context, parameter: str) -> tuple[int, ...] | None:
    """The parameter's shape; None when the base does not have it."""
    found = locate(context, parameter)
    if isinstance(found, OnDisk):
        return found.tensor.shape
    return found.parameter.shape if isinstance(found, Grouped) else None


def place(context: Context, edits: Sequence[Edit], *, parting: Collection[tuple[str, ...]] = ()) -> Placed:
    """Make the changes. Raises AccountingError naming every tensor without a target, ShapeError.

    `parting`: sets of tied parameters that part by other changes than these.
    """
    ties = find_ties(context, edits, elsewhere=parting)
    missing: dict[str, tuple[str, ...]] = {}
    builder = _Builder(context, ties)
    for edit in ties.edits:
        if not builder.add(edit):
            missing[edit.parameter] = (*missing.get(edit.parameter, ()), *edit.consumes)
    if missing:
        raise _never_saved(context, missing) or no_target(missing)
    return builder.finish()


@dataclass
class _Builder:
    """Collects changes edit by edit."""

    context: Context
    ties: Ties
    changes: list[Change] = field(default_factory=list)
    added: list[str] = field(default_factory=list)
    groups: dict[str, tuple[Group, list[Edit]]] = field(default_factory=dict)
    replaced: dict[str, TensorSpec] = field(default_factory=dict)
    """Tensors on disk that a trained one has taken the place of, as they then are."""

    def add(self, edit: Edit) -> bool:
        """False when the base has no target for it."""
        target = locate(self.context, edit.parameter)
        if isinstance(target, Grouped):
            check_shape(edit.parameter, target.parameter.shape, edit.shape)
            key = target.group.tensors[0].name
            self.groups.setdefault(key, (target.group, []))[1].append(edit)
            return True
        if isinstance(target, Absent):
            if edit.arithmetic is not None or not self._may_add(edit):
                return False
            self._add_new(edit)
            return True
        self._change(edit, target.tensor)
        return True

    def finish(self) -> Placed:
        for group, edits in self.groups.values():
            self.changes.append(plan_group(group, edits))
        self.changes = [*self.changes, *self.ties.copies]
        return Placed(
            tuple(self.changes), notes=self.ties.notes, untied=self.ties.untied, added=tuple(self.added)
        )

    def _change(self, edit: Edit, stored: TensorSpec) -> None:
        """A change of a tensor on disk, or of the copy that a parameter gets when it is untied."""
        parted = self.ties.parted.get(edit.parameter)
        written = parted or stored
        if edit.arithmetic is None:
            made = self._replacement(edit, stored, written)
            self.replaced[written.name] = made.tensor
            self.changes.append(made)
        else:
            written = self.replaced.get(written.name, written)
            check_shape(edit.parameter, written.shape, edit.shape)
            if stored.dtype not in FLOATING:
                raise ShapeError(
                    f"{edit.parameter}: expected floating-point weights in the base, got {stored.dtype}.",
                    hint="The base is stored quantised; name the 16-bit original with --base-model.",
                )
            kind = Kind.ADD if parted else edit.kind
            self.changes.append(
                RowChange(
                    written,
                    edit.parameter,
                    edit.consumes if edit.counted else (),
                    kind,
                    edit.arithmetic,
                    source=stored.name if parted else "",
                )
            )

    def _replacement(self, edit: Edit, stored: TensorSpec, written: TensorSpec) -> Replacement:
        assert edit.shape is not None
        if len(edit.shape) == len(stored.shape) and may_resize(self.context, edit.parameter, stored):
            check_shape(edit.parameter, (edit.shape[0], *stored.shape[1:]), edit.shape)
        else:
            check_shape(edit.parameter, stored.shape, edit.shape)
        spec = TensorSpec(written.name, written.dtype, edit.shape)
        kind = Kind.ADD if written is not stored else Kind.REPLACE
        return Replacement(
            spec, edit.parameter, edit.consumes[0], kind, edit.consumes[1:], counted=edit.counted
        )

    def _may_add(self, edit: Edit) -> bool:
        """Only a module that the model has, or may have, can be given tensors that the checkpoint lacks."""
        return self.context.names.exists(edit.parameter.rpartition(".")[0]) is True

    def _check_new(self, edit: Edit) -> None:
        """A tensor that the base lacks must be what the class expects, but for its number of tokens."""
        module, _, leaf = edit.parameter.rpartition(".")
        expected = getattr(self.context.names.module(module), leaf, None)
        got = edit.shape
        if expected is None or got is None or tuple(expected.shape) == got:
            return
        tokens = vocabularies(self.context.sources.base.config)
        if len(got) == expected.ndim and expected.shape[0] in tokens and expected.shape[1:] == got[1:]:
            return
        raise ShapeError(
            f"{edit.parameter}: expected {list(expected.shape)} in a {self.context.names.architecture} of the"
            f" base's config.json, got {list(got)} from the adapter.",
            hint="The head was trained under another configuration; name the base that has it with --base-model.",
        )

    def _add_new(self, edit: Edit) -> None:
        assert edit.shape is not None
        self._check_new(edit)
        spec = TensorSpec(
            self.context.names.disk_name(edit.parameter), usual_dtype(self.context.base.values()), edit.shape
        )
        self.changes.append(Replacement(spec, edit.parameter, edit.consumes[0], Kind.ADD, edit.consumes[1:]))
        self.added.append(edit.parameter)


def usual_dtype(specs: Iterable[TensorSpec]) -> str:
    """The floating dtype that holds most elements."""
    sizes: dict[str, int] = {}
    for spec in specs:
        if spec.dtype in FLOATING:
            sizes[spec.dtype] = sizes.get(spec.dtype, 0) + spec.elements
    return max(sizes, key=lambda dtype: sizes[dtype], default="F32")


def check_shape(what: str, expected: Sequence[int], got: Sequence[int] | None, *, hint: str = "") -> None:
    """Raise ShapeError unless the two are equal; `expected` is the base's, `got` None fits anything."""
    if got is not None and tuple(expected) != tuple(got):
        raise ShapeError(
            f"{what}: expected {list(expected)} to fit the base, got {list(got)} from the adapter.",
            hint=hint or "The adapter was trained on another base; name that one with --base-model.",
        )


def no_target(missing: Mapping[str, tuple[str, ...]]) -> AccountingError:
    """The error for adapter tensors whose targets the base does not have: target -> adapter tensors."""
    tensors = tuple(name for names in missing.values() for name in names)
    return AccountingError(
        f"{len(tensors)} adapter tensors have no tensor in the base to change: {_listed(missing)}.",
        tensors=tensors,
        hint="The adapter was trained on another architecture; name its base with --base-model.",
    )


def _never_saved(context: Context, missing: Mapping[str, tuple[str, ...]]) -> AccountingError | None:
    """The error for targets that the class of the training has, but neither base nor adapter holds."""
    model = context.names.architecture
    if model is None or not all(_has(context, name) for name in missing):
        return None
    tensors = tuple(name for names in missing.values() for name in names)
    return AccountingError(
        f"{len(tensors)} adapter tensors change parameters that a {model} has, but that are neither in the base"
        f" checkpoint nor in the adapter: {_listed(missing)}. In training they were random, and nothing recorded"
        " their values.",
        tensors=tensors,
        hint="Name the very base of the training with --base-model. Or train again with these modules in"
        " modules_to_save, or out of target_modules.",
    )


def _has(context: Context, parameter: str) -> bool:
    """Whether the class has this parameter; one that is computed from others, by weight norm, is none."""
    module, _, leaf = parameter.rpartition(".")
    return leaf in getattr(context.names.module(module), "_parameters", {})


def _listed(missing: Mapping[str, tuple[str, ...]], most: int = 6) -> str:
    """The first targets with their adapter tensors; the error itself holds all names."""
    shown = "; ".join(f"{target} ({', '.join(names)})" for target, names in list(missing.items())[:most])
    return f"{shown}; and {len(missing) - most} more" if len(missing) > most else shown


def config_without_ties(config: Any) -> dict[str, Any]:
    """The edits of config.json that say embeddings are no longer tied."""
    edits: dict[str, Any] = {"tie_word_embeddings": False}
    for key in ("text_config", "decoder", "language_config", "llm_config"):
        inner = config.get(key)
        if isinstance(inner, dict):
            edits[key] = {**inner, "tie_word_embeddings": False}
    return edits
