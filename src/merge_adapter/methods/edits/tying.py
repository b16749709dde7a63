"""Tied parameters: which edits part them, and what each of them becomes.

In training an adapter changes one of two tied parameters alone: PEFT wraps the module, the shared weight
below stays as it was. Folding the change into the one tensor on disk would change both. So the changed one
gets a tensor of its own, and the config says that nothing is tied any more.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from merge_adapter.errors import MethodError
from merge_adapter.methods.change import Change, Context, Kind, RowChange, RowKernel, TensorSpec, Weights
from merge_adapter.types import CombinationType

if TYPE_CHECKING:
    from merge_adapter.methods.edits.placing import Edit

_SCALED_BY_TIE = frozenset({"t5", "mt5", "umt5", "switch_transformers", "longt5", "udop", "t5gemma"})
"""Model types whose forward pass itself depends on `tie_word_embeddings`, so that it cannot be turned off."""


@dataclass(frozen=True)
class Same:
    """Row arithmetic that changes nothing: an untied copy."""

    @property
    def memory_bytes(self) -> int:
        return 0

    def kernel(self, adapter: Weights) -> RowKernel:  # noqa: ARG002 - nothing of the adapter is needed
        from merge_adapter.methods.lora.kernels import SameKernel

        return SameKernel()


@dataclass(frozen=True)
class Ties:
    """What tied parameters call for."""

    edits: tuple[Edit, ...]
    """The edits, those that say the same of two tied parameters folded into one."""
    parted: Mapping[str, TensorSpec] = field(default_factory=dict)
    """Parameter -> the new tensor that it gets; its values start from the one it shared."""
    copies: tuple[Change, ...] = ()
    """Tensors for parameters that nothing changes, but that lose the one they shared."""
    untied: bool = False
    notes: tuple[str, ...] = ()


def find_ties(
    context: Context, edits: Sequence[Edit], *, elsewhere: Collection[tuple[str, ...]] = ()
) -> Ties:
    """Look at every set of tied parameters that an edit touches, and once one parts, at all others.

    `elsewhere`: sets that part, but are taken care of by others.
    """
    touched = [
        members for members in context.names.ties() if any(edit.parameter in members for edit in edits)
    ]
    parting = [members for members in touched if not _alike(context, _of(edits, members))]
    found = Ties(tuple(edits))
    for members in touched:
        found = (
            _parted(context, found, members)
            if members in parting
            else replace(found, edits=_folded(context, found.edits, members))
        )
    gone = {*parting, *elsewhere}
    return replace(_loosened(context, found, gone), untied=True) if gone else found


def loosened_copies(context: Context, members: tuple[str, ...]) -> tuple[Change, ...]:
    """Tensors for tied parameters that nothing changes, where the config no longer ties them."""
    return tuple(
        _copy(context, name, made)
        for name in members
        if not context.names.tied_for_good(name) and (made := _own_tensor(context, name)) is not None
    )


def check_can_part(context: Context, members: tuple[str, ...]) -> None:
    """Raise MethodError unless config.json can say that the members are apart.

    A T5 whose checkpoint holds two values is loaded untied by transformers 5 all the same, and tied by 4: what one
    reads rightly the other reads wrongly, in silence.
    """
    model_type = context.sources.base.config.get("model_type")
    scaled = model_type in _SCALED_BY_TIE
    if scaled or any(context.names.tied_for_good(name) for name in members):
        reason = (
            f"the config.json of a {model_type} cannot untie them without changing what else the model computes"
            if scaled
            else "its class holds one tensor for both, whatever config.json says"
        )
        raise MethodError(
            f"The adapter changes one of {', '.join(members)}, which this model ties for good: {reason}.",
            hint="Keep the adapter and load it with PEFT beside its base.",
        )


def _of(edits: Sequence[Edit], members: tuple[str, ...]) -> list[Edit]:
    return [edit for edit in edits if edit.parameter in members]


def _loosened(context: Context, found: Ties, parted: set[tuple[str, ...]]) -> Ties:
    """The other sets, which the config unties as well: each member gets a tensor of the same values."""
    edits, own, copies = list(found.edits), dict(found.parted), list(found.copies)
    for members in context.names.ties():
        if members in parted:
            continue
        same = _of(found.edits, members)
        if not same:
            copies.extend(loosened_copies(context, members))
            continue
        changed = [edit for edit in same if edit.parameter == same[0].parameter]
        edited = {edit.parameter for edit in same}
        for name in members:
            made = None if context.names.tied_for_good(name) else _own_tensor(context, name)
            if made is not None:
                own[name] = made
            holds = made is not None or context.names.disk_name(name) == context.names.direct(name)
            if holds and name not in edited:
                edits.extend(replace(edit, parameter=name, counted=False) for edit in changed)
    return replace(found, edits=tuple(edits), parted=own, copies=tuple(copies))


def _alike(context: Context, touched: Sequence[Edit]) -> bool:
    """Whether all members change in the same way, so that the tie can stay."""
    by_member: dict[str, list[Edit]] = {}
    for edit in touched:
        by_member.setdefault(edit.parameter, []).append(edit)
    if all(edit.follows_ties for edit in touched):
        values = [edits for edits in by_member.values() if any(edit.arithmetic for edit in edits)]
        return len(values) < 2 or _same(context, values)
    whole = {touched[0].parameter, *context.names.tied(touched[0].parameter)} == set(by_member)
    return bool(context.config.get("ensure_weight_tying")) and whole and _same(context, by_member.values())


def _same(context: Context, members: Collection[Sequence[Edit]]) -> bool:
    """Whether the adapter's file holds the same values for each member."""
    from merge_adapter.methods.adapter_file import read_adapter
    from merge_adapter.methods.edits.same_values import equal_edits

    first, *others = members
    if context.sources.combination.type is not CombinationType.SEQUENTIAL:
        return False  # the values are only made when the merge runs
    file = read_adapter(context.adapter)
    if any(name not in file.stored for edits in members for edit in edits for name in edit.consumes):
        return False
    with file.open() as weights:
        return all(equal_edits(weights, first, other) for other in others)


def _folded(context: Context, edits: Sequence[Edit], members: tuple[str, ...]) -> tuple[Edit, ...]:
    """The edits with each disk tensor of the members changed once.

    Members that share one disk tensor need one of their edits; the others' adapter tensors, which hold the
    same values again, count as used by it. A member with a disk tensor of its own and no edit gets the others'.
    """
    own: dict[str | None, list[str]] = {}
    for name in members:
        own.setdefault(context.names.direct(name), []).append(name)
    edited = [name for name in members if any(edit.parameter == name for edit in edits)]
    first = [edit for edit in edits if edit.parameter == edited[0]]
    kept = [edit for edit in edits if edit.parameter not in members]
    for names in own.values():
        here = [name for name in edited if name in names]
        if not here:
            kept.extend(replace(edit, parameter=names[0], counted=False) for edit in first)
            continue
        again = tuple(tensor for edit in edits if edit.parameter in here[1:] for tensor in edit.consumes)
        mine = [edit for edit in edits if edit.parameter == here[0]]
        kept.append(replace(mine[0], consumes=(*mine[0].consumes, *again)))
        kept.extend(mine[1:])
    return tuple(kept)


def _parted(context: Context, found: Ties, members: tuple[str, ...]) -> Ties:
    """Each member with a tensor of its own."""
    check_can_part(context, members)
    parted, copies = dict(found.parted), list(found.copies)
    edits = tuple(sorted((*_following(found.edits, members), *found.edits), key=_turn))
    changed = frozenset(edit.parameter for edit in _of(edits, members))
    for name in members:
        made = _own_tensor(context, name)
        if made is None:
            continue
        if name in changed:
            parted[name] = made
        else:
            copies.append(_copy(context, name, made))
    by_itself = sorted({edit.parameter for edit in _of(found.edits, members)})
    note = (
        f"{' and '.join(members)} were tied in the base and are no longer: the adapter changed"
        f" {' and '.join(by_itself)} by itself."
    )
    return replace(
        found,
        edits=edits,
        parted=parted,
        copies=tuple(copies),
        untied=True,
        notes=(*found.notes, note),
    )


def _following(edits: Sequence[Edit], members: tuple[str, ...]) -> list[Edit]:
    """What changed all members in training although the adapter's file says it of one.

    PEFT saves the frozen embedding where it was resized, and sets trained tokens below an adapted partner too.
    """
    touched = _of(edits, members)
    frozen = [edit for edit in touched if edit.follows_ties and edit.arithmetic is None][:1]
    tokens = [edit for edit in touched if edit.follows_ties and edit.arithmetic is not None][:1]
    replaced = {edit.parameter for edit in touched if edit.arithmetic is None}
    whole = replaced - {edit.parameter for edit in touched if edit.follows_ties and edit.arithmetic is None}
    own = {edit.parameter for edit in touched if edit.follows_ties and edit.arithmetic is not None}
    return [
        *(
            replace(edit, parameter=name, counted=False)
            for edit in frozen
            for name in members
            if name not in replaced
        ),
        *(
            replace(edit, parameter=name, counted=False)
            for edit in tokens
            for name in members
            if name not in own | whole
        ),
    ]


def _turn(edit: Edit) -> int:
    """Whole tensors first, then single rows, then what is added to them."""
    return 0 if edit.arithmetic is None else 1 if edit.follows_ties else 2


def _own_tensor(context: Context, parameter: str) -> TensorSpec | None:
    """The tensor that a parameter needs once untied; None when the one on disk is its own."""
    shared = context.names.direct(parameter)
    own = context.names.disk_name(parameter)
    if shared is None or own == shared or own in context.base:
        return None
    return replace(context.base[shared], name=own)


def _copy(context: Context, parameter: str, spec: TensorSpec) -> Change:
    shared = context.names.direct(parameter)
    assert shared is not None
    return RowChange(spec, parameter, (), Kind.ADD, Same(), source=shared)
