"""Every tensor of an adapter is used exactly once, or the merge does not happen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from merge_adapter.errors import AccountingError, MethodError
from merge_adapter.methods.change import Change, Kind, ModuleChange, Replacement, RowChange, TensorSpec
from merge_adapter.types import Adapter


def account(tensors: Mapping[str, TensorSpec], changes: Iterable[Change]) -> int:
    """The number of adapter tensors consumed, which is all of them.

    Raises AccountingError when one is left over, used twice, or unknown, or when two changes cannot both
    write a tensor.
    """
    changes = tuple(changes)
    used = Counter(name for change in changes for name in change.consumes)
    left = tuple(name for name in tensors if name not in used)
    if left:
        raise AccountingError(
            f"{len(left)} of {len(tensors)} adapter tensors are not used by any change: {', '.join(left)}.",
            tensors=left,
            hint="They belong to no module that the method or the base knows; check base and PEFT version.",
        )
    twice = tuple(name for name, count in used.items() if count > 1)
    if twice:
        raise AccountingError(
            f"{len(twice)} adapter tensors would be used more than once: {', '.join(twice)}.",
            tensors=twice,
            hint="Two modules of the model share them; this adapter cannot be merged as it is.",
        )
    unknown = tuple(name for name in used if name not in tensors)
    if unknown:
        raise AssertionError(f"a planner consumes tensors the adapter does not have: {unknown}")
    _check_writers(changes)
    return len(used)


def check_together(adapters: Sequence[tuple[Adapter, Sequence[Change]]]) -> None:
    """Make sure that several adapters can be merged one after the other, each with its weight.

    Sums commute; everything else would depend on the order, or hide what an adapter did. Raises MethodError.
    """
    owner: dict[str, tuple[int, Change]] = {}
    for number, (adapter, changes) in enumerate(adapters):
        for change in changes:
            if adapter.weight != 1 and not _is_sum(change):
                raise MethodError(
                    f"{change.module}: a weight of {adapter.weight} was given for {adapter.repository.origin}, but"
                    f" its change is {change.kind.value} there, and only sums can be weighted.",
                    hint="Give this adapter the weight 1.",
                )
            for spec in change.writes:
                before = owner.setdefault(spec.name, (number, change))
                if before[0] == number or _add_up(change, before[1]):
                    continue
                if not _commute(change, before[1], adapter, adapters[before[0]][0]):
                    sums = _is_sum(change) and _is_sum(before[1])
                    reason = (
                        "one by its factors and the other through PEFT's own layer, which are not added up in one step"
                        if sums
                        else "and not only by adding: the result would depend on their order"
                    )
                    raise MethodError(
                        f"{spec.name} is changed by two adapters, {reason}.",
                        hint="Merge them one by one, in the order you want: merge FIRST --output DIR, then merge"
                        " SECOND --base-model DIR.",
                    )


def _commute(left: Change, right: Change, one: Adapter, other: Adapter) -> bool:
    """Whether two changes of the same tensors that are no sums give the same in either order: those of IA3 do."""
    modules = isinstance(left, ModuleChange) and isinstance(right, ModuleChange)
    return modules and left.writes == right.writes and one.method == other.method == "IA3"


def _is_sum(change: Change) -> bool:
    return isinstance(change, RowChange | ModuleChange) and change.kind is Kind.ADDITIVE


def _add_up(left: Change, right: Change) -> bool:
    """Whether both are sums of the same kind: of rows, or of the same tensors of the base as a whole."""
    if not (_is_sum(left) and _is_sum(right)):
        return False
    if isinstance(left, RowChange) or isinstance(right, RowChange):
        return isinstance(left, RowChange) and isinstance(right, RowChange)
    return left.writes == right.writes and {spec.name for spec in left.writes} <= set(left.reads)


def _check_writers(changes: tuple[Change, ...]) -> None:
    """One replacement or one module change per tensor; row changes may follow one another."""
    owner: dict[str, Change] = {}
    for change in changes:
        for spec in change.writes:
            before = owner.get(spec.name)
            if before is not None and (
                isinstance(change, ModuleChange | Replacement) or isinstance(before, ModuleChange)
            ):
                names = (*before.consumes, *change.consumes)
                raise AccountingError(
                    f"{spec.name} is written by two changes that exclude each other: {before.module} and "
                    f"{change.module}.",
                    tensors=names,
                    hint="The adapter's file holds two versions of one module; save it again.",
                )
            owner[spec.name] = change
