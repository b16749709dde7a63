"""The second stage: what a merge would do, from configs and headers alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from merge_adapter.accounting import account, check_together
from merge_adapter.checkpoint.base import BaseFiles, read_base
from merge_adapter.checkpoint.loaded import with_loaded
from merge_adapter.checkpoint.output import INDEX, OutputShard, index_text, lay_out
from merge_adapter.checkpoint.quantization import quantization_of
from merge_adapter.errors import AccountingError, BaseModelError, UnknownModulesError, UnmergeableError
from merge_adapter.methods.adapter_file import AdapterFile, moved, other_readings, read_adapter
from merge_adapter.methods.change import Change, Kind, ModuleChange, Planned, TensorSpec
from merge_adapter.methods.combinations.combined import Together
from merge_adapter.methods.combinations.low_rank import CombinedFile, combine, without_copies
from merge_adapter.methods.combinations.vectors import CombinedVectors
from merge_adapter.methods.config import check_config
from merge_adapter.methods.dispatch import plan_adapter
from merge_adapter.methods.lora.replication import layer_sources, with_replicas
from merge_adapter.methods.lora.starts import changed_base, check_residual, check_start
from merge_adapter.methods.refuse import check_method
from merge_adapter.methods.row_blocks.cutting import BLOCK_ELEMENTS
from merge_adapter.methods.row_blocks.sums import ModulesInTurn, SumOfModules
from merge_adapter.names.choose import split_targets
from merge_adapter.names.one_way import OneWayError, load_parameters, note_on
from merge_adapter.types import Adapter, CombinationType, MergeSettings, Resolved, Strategy

if TYPE_CHECKING:
    from torch import Tensor

AnyFile = AdapterFile | CombinedFile | CombinedVectors
"""Where a plan's adapters come from: one adapter's file, or several shown as one."""

_STREAMED = "every change can be made tensor by tensor from the files"
_BLOCKS = 6
"""Blocks in float32 that a worker holds at a time."""
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
    adapters: tuple[AnyFile, ...] = field(default=(), repr=False)
    """The adapters' files, with the names that the steps use."""
    notes: tuple[str, ...] = ()
    view: BaseFiles | None = field(default=None, repr=False)
    """The base in the form that is merged: with tensors of the model that transformers loads, or layers replicated.
    None where its files are read as they are."""

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

    Where transformers cannot undo its own conversion of a tensor that is to change, the base is loaded.
    Raises AccountingError, ShapeError, MethodError or BaseModelError when the merge cannot be done rightly,
    MalformedError and NotFoundError for files that are not what they should be.
    """
    files = with_replicas(read_base(sources.base, settings), sources, settings)
    reason = ""
    while True:
        try:
            return _plan_on(files, sources, settings, reason)
        except OneWayError as error:
            files = _loaded(files, error, sources, settings)
            reason = f"transformers cannot undo its own conversion of {error.parameter}"


def _loaded(files: BaseFiles, error: OneWayError, sources: Resolved, settings: MergeSettings) -> BaseFiles:
    """The base with what cannot be written back as transformers loads it, under its names in memory.

    Raises BaseModelError where that is no way out.
    """
    if settings.strategy is Strategy.STREAM:
        raise error
    if quantization_of(sources.base.config) is not None:
        raise BaseModelError(
            error.message, hint="The base is stored quantised; name the 16-bit original with --base-model."
        ) from error
    parameters = [spec for one in error.found for spec in one.parameters]
    again = [spec.name for spec in parameters if spec.name in files.specs]
    if again:
        raise BaseModelError(
            f"{error.message} Stored under its name in memory, {again[0]} would be converted once more when it is"
            " loaded, so that no checkpoint can hold the merged weights.",
            hint="Keep the adapter unmerged, and load it with PEFT beside its base.",
        ) from error
    repository, stored = sources.base.repository, tuple(files.specs.values())

    def load() -> Mapping[str, Tensor]:
        heavy = {file.path for file in files.layout.files} | (
            {files.layout.index} if files.layout.index else set()
        )
        light = {path for path in repository.files if path.endswith((".json", ".py", ".jinja"))}
        return load_parameters(error.model, repository.folder(sorted(heavy | light)), parameters, stored)

    made = with_loaded(files, [(one.parameters, one.sources) for one in error.found], load)
    return replace(made, notes=(*made.notes, note_on(error.found)))


def _plan_on(files_of_base: BaseFiles, sources: Resolved, settings: MergeSettings, loaded: str) -> MergePlan:
    """The plan on this view of the base; `loaded` says why it is that of the loaded model, "" when it is not."""
    layout, base = files_of_base.layout, files_of_base.specs
    notes = list(files_of_base.notes)
    config_changes = dict(files_of_base.config_changes)
    files: list[AnyFile] = []
    planned: list[Planned] = []
    for file, made, about_config in _plan_adapters(sources, settings, files_of_base):
        files.append(file)
        planned.append(made)
        notes.extend((*file.notes, *about_config, *made.notes))
        config_changes.update(made.config_changes)
    check_together([(file.adapter, made.changes) for file, made in zip(files, planned, strict=True)])
    steps = _joined(
        tuple(Step(change, number) for number, made in enumerate(planned) for change in made.changes),
        files,
    )
    dropped = {name for made in planned for name in made.dropped}
    kept = {name: spec for name, spec in base.items() if name not in dropped}
    written = {spec.name: spec for step in steps for spec in step.change.writes}
    outputs = lay_out(layout, kept, written.values(), settings.dtype)
    in_memory = next((made.strategy_reason for made in planned if made.strategy is Strategy.MEMORY), loaded)
    final = {spec.name: spec for shard in outputs for spec in shard.tensors}
    total = sum(shard.bytes for shard in outputs)
    if layout.index:
        total += len(index_text(outputs, layout.index_metadata))
    return MergePlan(
        method=sources.adapter.method,
        strategy=Strategy.MEMORY if in_memory else Strategy.STREAM,
        strategy_reason=in_memory or _STREAMED,
        view=files_of_base if loaded or layer_sources(sources.adapter.config) else None,
        steps=steps,
        outputs=outputs,
        adapter_tensors=sum(file.tensors for file in files),
        consumed=sum(_consumed(file, made) for file, made in zip(files, planned, strict=True)),
        adapters=tuple(files),
        bytes_read=layout.bytes + sum(file.bytes for file in files),
        bytes_written=total,
        bytes_changed=sum(final[name].nbytes for name in written),
        memory_bytes=_memory(steps)
        + (2 * layout.bytes if loaded else 0)
        + max(
            (file.memory_bytes for file in files if isinstance(file, Together)),
            default=0,
        ),
        disk_bytes=total,
        index=INDEX if layout.index else None,
        index_metadata=layout.index_metadata,
        config_changes=config_changes,
        notes=tuple(dict.fromkeys(notes)),
    )


def _plan_adapters(
    sources: Resolved, settings: MergeSettings, base: BaseFiles
) -> Iterator[tuple[AnyFile, Planned, tuple[str, ...]]]:
    """Each adapter's file, what it does, and notes on its config; of combined adapters the one they make together."""
    if sources.combination.type is CombinationType.SEQUENTIAL:
        for adapter in sources.adapters:
            checked, notes = _checked(adapter, sources)
            file = read_adapter(checked)
            if len(sources.adapters) > 1 or adapter.weight != 1:
                file = without_copies(file, base.specs)
            read, made = _plan_reading(sources, settings, file, base.specs)
            _check_changed(read, made, base)
            yield read, made, notes
        return
    checks = [_checked(adapter, sources) for adapter in sources.adapters]
    files = [without_copies(read_adapter(checked), base.specs) for checked, _ in checks]
    for file in files:
        if changed_base(file.adapter.config):
            _check_changed(file, _plan_whole(sources, settings, file, base.specs), base)
    combined = combine(files, sources.combination)
    made = plan_adapter(sources, settings, combined.adapter, combined.specs, base.specs)
    account(combined.specs, made.changes)
    yield combined, made, tuple(note for _, notes in checks for note in notes)


def _checked(adapter: Adapter, sources: Resolved) -> tuple[Adapter, tuple[str, ...]]:
    """The adapter with a checked config, and notes on it; also on the base that it needs."""
    checked, notes = check_config(adapter)
    return checked, (*notes, *check_start(checked, sources.base))


def _check_changed(file: AdapterFile, made: Planned, base: BaseFiles) -> None:
    """Raise BaseModelError where the adapter needs a changed base, and `base` can be told to be the original."""
    if changed_base(file.adapter.config):
        with base.open() as weights, file.open() as factors:
            check_residual(file.adapter, made.changes, weights, factors)


def _consumed(file: AnyFile, made: Planned) -> int:
    """Tensors used: all of a combination's, once every combined one is, which accounting has made sure of."""
    if isinstance(file, Together):
        return file.tensors
    return sum(len(change.consumes) for change in made.changes)


def _plan_reading(
    sources: Resolved, settings: MergeSettings, file: AdapterFile, base: Mapping[str, TensorSpec]
) -> tuple[AdapterFile, Planned]:
    """Plan and account for one adapter; where it does not fit as it is, under the one other reading that fits whole."""
    try:
        return file, _plan_whole(sources, settings, file, base)
    except AccountingError as error:
        readings: list[AdapterFile] = []
        if set(error.tensors) == set(file.stored):
            readings.extend(other_readings(file))
        now = list(_moved(file, sources, settings)) if isinstance(error, UnknownModulesError) else []
        readings.extend(now)
        fitting: dict[frozenset[str], tuple[AdapterFile, Planned]] = {}
        for reading in readings:
            with suppress(UnmergeableError):
                planned = _plan_whole(sources, settings, reading, base)
                fitting.setdefault(frozenset(reading.stored), (reading, planned))
        if len(fitting) != 1:
            for reading in now:
                _plan_whole(
                    sources, settings, reading, base
                )  # the base has all its modules: what is wrong is told
            raise
        [found] = fitting.values()
        return found


def _moved(file: AdapterFile, sources: Resolved, settings: MergeSettings) -> Iterator[AdapterFile]:
    """The file as of where its modules are now, if they were elsewhere in the model when it was trained."""
    from merge_adapter.names.renamed import renamed_modules  # imports torch

    method = check_method(file.adapter.config, soft_prompt=settings.soft_prompt)
    modules, parameters = split_targets(file.specs, method.prefixes)
    paths = {*modules, *(name.rpartition(".")[0] for name in parameters)}
    trust = settings.trust_remote_code
    if found := renamed_modules(sources.base, file.adapter.config, paths, trust_remote_code=trust):
        yield moved(file, found)


def _plan_whole(
    sources: Resolved, settings: MergeSettings, file: AdapterFile, base: Mapping[str, TensorSpec]
) -> Planned:
    made = plan_adapter(sources, settings, file.adapter, file.specs, base)
    account(file.specs, made.changes)
    return made


def _joined(steps: tuple[Step, ...], files: Sequence[AnyFile]) -> tuple[Step, ...]:
    """The steps with module changes of the same tensors by several adapters made one; that they may be is checked."""
    together: dict[tuple[TensorSpec, ...] | int, list[Step]] = {}
    for number, step in enumerate(steps):
        scaled = files[step.adapter].adapter.method == "IA3"
        module = isinstance(step.change, ModuleChange) and (step.change.kind is Kind.ADDITIVE or scaled)
        together.setdefault(step.change.writes if module else number, []).append(step)
    return tuple(_sum_of(group) if len(group) > 1 else group[0] for group in together.values())


def _sum_of(group: list[Step]) -> Step:
    changes = [step.change for step in group if isinstance(step.change, ModuleChange)]
    parts = tuple((change.arithmetic, step.adapter) for change, step in zip(changes, group, strict=True))
    whole = replace(
        changes[0],
        consumes=tuple(name for change in changes for name in change.consumes),
        memory_bytes=sum(change.memory_bytes for change in changes),
        arithmetic=SumOfModules(parts) if changes[0].kind is Kind.ADDITIVE else ModulesInTurn(parts),
    )
    return Step(whole, group[0].adapter)


def _memory(steps: tuple[Step, ...]) -> int:
    """Peak bytes with two workers, each with a few blocks and the costliest change."""
    largest = max((step.change.memory_bytes for step in steps), default=0)
    return _RUNTIME_BYTES + 2 * (_BLOCKS * 4 * BLOCK_ELEMENTS + largest)
