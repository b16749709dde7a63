"""Trained tensors that take the place of the base's, or are added to it: modules_to_save, bias=, heads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from merge_adapter.methods.change import FLOATING, Change, Context, Kind, Planned, Replacement, TensorSpec
from merge_adapter.methods.targets import Absent, OnDisk, check_shape, locate


def plan_replacements(context: Context, parameters: Mapping[str, TensorSpec]) -> Planned:
    """Plan tensors that are parameters of the model: name of the parameter -> tensor of the adapter."""
    changes: list[Change] = []
    for path, spec in parameters.items():
        parameter = path.replace(".base_layer.", ".")
        changes.append(_replacement(context, parameter, spec))
    return Planned(tuple(changes))


def usual_dtype(base: Mapping[str, TensorSpec]) -> str:
    """The floating dtype that most of the base's tensors have."""
    counts = Counter(spec.dtype for spec in base.values() if spec.dtype in FLOATING)
    return counts.most_common(1)[0][0] if counts else "F32"


def _replacement(context: Context, parameter: str, spec: TensorSpec) -> Change:
    target = locate(context, parameter)
    if isinstance(target, OnDisk):
        check_shape(parameter, target.tensor.shape, spec.shape)
        return Replacement(target.tensor, parameter, spec.name)
    name = context.names.disk_name(parameter)
    added = TensorSpec(name, usual_dtype(context.base), spec.shape)
    assert isinstance(target, Absent)
    return Replacement(added, parameter, spec.name, kind=Kind.ADD)
