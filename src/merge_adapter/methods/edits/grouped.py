"""Row changes of parameters that are on disk in another form: fused experts, split or permuted projections.

All tensors of a group are loaded, turned into parameters by transformers' own conversion, changed as any
others, and turned back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from merge_adapter.errors import ShapeError
from merge_adapter.methods.change import (
    FLOATING,
    Group,
    Kind,
    ModuleArithmetic,
    ModuleChange,
    RowArithmetic,
    Weights,
)

if TYPE_CHECKING:
    from torch import Tensor

    from merge_adapter.methods.edits.placing import Edit


@dataclass(frozen=True)
class GroupArithmetic(ModuleArithmetic):
    """Load a group, change its parameters row block by row block, revert it."""

    group: Group
    steps: tuple[tuple[str, RowArithmetic | None, str], ...]
    """`(parameter, arithmetic, adapter tensor)`; without arithmetic the adapter's tensor takes its place."""
    writes: tuple[str, ...] = field(repr=False)

    def run(self, base: Weights, adapter: Weights) -> Iterator[tuple[str, Tensor]]:
        from merge_adapter.methods.row_blocks.rows import change_whole

        parameters = self.group.load({spec.name: base.read(spec.name).float() for spec in self.group.tensors})
        parameters = {name: value.contiguous() for name, value in parameters.items()}
        for parameter, arithmetic, source in self.steps:
            if arithmetic is None:
                parameters[parameter] = adapter.read(source).float()
            else:
                parameters[parameter] = change_whole(parameters[parameter], arithmetic.kernel(adapter))
        yield from self.group.revert(parameters).items()


def plan_group(group: Group, edits: Sequence[Edit]) -> ModuleChange:
    """One change for all edits of a group's parameters."""
    fixed = [spec.name for spec in group.tensors if spec.dtype not in FLOATING]
    if fixed:
        raise ShapeError(
            f"{fixed[0]}: expected floating-point weights, got {group.tensors[0].dtype}.",
            hint="The base is stored quantised; name the 16-bit original with --base-model.",
        )
    kinds = {edit.kind for edit in edits}
    steps = tuple((edit.parameter, edit.arithmetic, edit.consumes[0]) for edit in edits)
    elements = sum(spec.elements for spec in group.tensors)
    return ModuleChange(
        module=edits[0].parameter,
        reads=tuple(spec.name for spec in group.tensors),
        writes=group.tensors,
        consumes=tuple(name for edit in edits for name in edit.consumes),
        kind=kinds.pop() if len(kinds) == 1 else Kind.MULTIPLICATIVE,
        # The stored tensors, the parameters made of them and the tensors made back, all in float32.
        memory_bytes=12 * elements + sum(e.arithmetic.memory_bytes for e in edits if e.arithmetic),
        arithmetic=GroupArithmetic(group, steps, tuple(spec.name for spec in group.tensors)),
    )
