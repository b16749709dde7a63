"""From a parameter of the adapted model to where it is in the base checkpoint."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from merge_adapter.errors import AccountingError, ShapeError
from merge_adapter.methods.change import Context, Group, TensorSpec


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

    parameter: str


Target = OnDisk | Grouped | Absent


def locate(context: Context, parameter: str) -> Target:
    """Where a parameter is."""
    name = context.names.direct(parameter)
    if name is not None and name in context.base:
        return OnDisk(context.base[name])
    group = context.names.group(parameter)
    if group is not None:
        found = next((spec for spec in group.parameters if spec.name == parameter), None)
        if found is not None:
            return Grouped(group, found)
    return Absent(parameter)


def check_shape(what: str, expected: Iterable[int], got: Iterable[int], *, hint: str = "") -> None:
    """Raise ShapeError unless the two are equal. `expected` is the base's."""
    expected, got = list(expected), list(got)
    if expected != got:
        raise ShapeError(
            f"{what}: expected {expected} to fit the base, got {got}.",
            hint=hint or "The adapter was trained on another base; name that one with --base-model.",
        )


def no_target(missing: dict[str, tuple[str, ...]]) -> AccountingError:
    """The error for adapter tensors whose targets the base does not have: target -> adapter tensors."""
    tensors = tuple(name for names in missing.values() for name in names)
    listed = "; ".join(f"{target} ({', '.join(names)})" for target, names in missing.items())
    return AccountingError(
        f"{len(tensors)} adapter tensors have no tensor in the base to change: {listed}.",
        tensors=tensors,
        hint="The adapter was trained on another architecture; name its base with --base-model.",
    )
