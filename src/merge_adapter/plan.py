"""The second stage: what a merge would do, from configs and headers alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from merge_adapter.accounting import account
from merge_adapter.checkpoint.layout import Layout, find_layout
from merge_adapter.checkpoint.output import INDEX, OutputShard, index_text, lay_out
from merge_adapter.methods.adapter_file import AdapterFile, read_adapter
from merge_adapter.methods.blocks import BLOCK_ELEMENTS
from merge_adapter.methods.change import Change, Kind
from merge_adapter.methods.dispatch import plan_adapter
from merge_adapter.types import MergeSettings, Resolved, Strategy

_RUNTIME_BYTES = 300 << 20
"""Resident memory of Python with torch before any work."""


@dataclass(frozen=True)
class TensorChange:
    """One change as a person reads it."""

    tensors: tuple[str, ...]
    """Names on disk that it writes."""
    consumes: tuple[str, ...]
    """Tensors of the adapter that it uses up."""
    kind: Kind
    shape: tuple[int, ...]
    """Of the first tensor written."""
    adapter: int = 0
    """Which of the adapters, counted from 0."""


@dataclass(frozen=True)
class Step:
    """A change and the adapter it belongs to."""

    change: Change
    adapter: int = 0


@dataclass(frozen=True)
class MergePlan:
    """What a merge does: every adapter tensor assigned, every output file laid out."""

    method: str
    strategy: Strategy
    strategy_reason: str
    steps: tuple[Step, ...] = field(repr=False)
    """In the order in which changes of one tensor apply."""
    outputs: tuple[OutputShard, ...] = field(repr=False)
    adapter_tensors: int
    consumed: int
    bytes_read: int
    bytes_written: int
    bytes_changed: int
    memory_bytes: int
    """Estimate of the peak beyond Python and torch themselves."""
    disk_bytes: int
    """Needed where the output goes."""
    index: str | None = None
    """Path of the index to write; None for a single file."""
    index_metadata: Mapping[str, Any] = field(default_factory=dict, repr=False)
    config_changes: Mapping[str, Any] = field(default_factory=dict)
    """Edits of config.json; None removes the key."""
    notes: tuple[str, ...] = ()

    @property
    def changes(self) -> tuple[TensorChange, ...]:
        """The changes as a person reads them."""
        return tuple(
            TensorChange(
                tensors=tuple(spec.name for spec in step.change.writes),
                consumes=step.change.consumes,
                kind=step.change.kind,
                shape=step.change.writes[0].shape if step.change.writes else (),
                adapter=step.adapter,
            )
            for step in self.steps
        )


def make_plan(sources: Resolved, settings: MergeSettings) -> MergePlan:
    """Assign every adapter tensor and lay out every output file, from configs and headers.

    Raises AccountingError, ShapeError, MethodError or BaseModelError when the merge cannot be done rightly,
    MalformedError and NotFoundError for files that are not what they should be.
    """
    layout = find_layout(sources.base.repository)
    base = layout.specs
    files = [read_adapter(adapter) for adapter in sources.adapters]
    steps: list[Step] = []
    notes: list[str] = []
    config_changes: dict[str, Any] = {}
    consumed = 0
    strategy, reason = Strategy.STREAM, "every change can be made tensor by tensor from the files"
    for number, file in enumerate(files):
        planned = plan_adapter(sources, settings, file.adapter, file.specs, base)
        consumed += account(file.specs, planned.changes)
        steps.extend(Step(change, number) for change in planned.changes)
        notes.extend((*file.notes, *planned.notes))
        config_changes.update(planned.config_changes)
        if planned.strategy is Strategy.MEMORY:
            strategy, reason = planned.strategy, planned.strategy_reason
    made = _assemble(sources, settings, layout, files, steps, notes, config_changes, consumed)
    return replace(made, strategy=strategy, strategy_reason=reason)


def _assemble(
    sources: Resolved,
    settings: MergeSettings,
    layout: Layout,
    files: list[AdapterFile],
    steps: list[Step],
    notes: list[str],
    config_changes: dict[str, Any],
    consumed: int,
) -> MergePlan:
    written = {spec.name: spec for step in steps for spec in step.change.writes}
    outputs = lay_out(layout, layout.specs, written.values(), settings.dtype)
    index = INDEX if layout.index else None
    index_bytes = len(index_text(outputs, layout.index_metadata)) if index else 0
    final = {spec.name: spec for shard in outputs for spec in shard.tensors}
    total = sum(shard.bytes for shard in outputs) + index_bytes
    return MergePlan(
        method=sources.adapter.method,
        strategy=Strategy.STREAM,
        strategy_reason="",
        steps=tuple(steps),
        outputs=outputs,
        adapter_tensors=sum(len(file.specs) for file in files),
        consumed=consumed,
        bytes_read=layout.bytes + sum(file.layout.bytes for file in files),
        bytes_written=total,
        bytes_changed=sum(final[name].nbytes for name in written),
        memory_bytes=_RUNTIME_BYTES
        + 2 * (6 * 4 * BLOCK_ELEMENTS + max((step.change.memory_bytes for step in steps), default=0)),
        disk_bytes=total,
        index=index,
        index_metadata=layout.index_metadata,
        config_changes=config_changes,
        notes=tuple(dict.fromkeys(notes)),
    )
