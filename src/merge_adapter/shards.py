"""The work of a merge, cut into jobs: for each output file, its tensors; for each tensor, runs of rows."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Lock

import torch

from merge_adapter.checkpoint.dtypes import torch_dtype
from merge_adapter.checkpoint.header import build_header
from merge_adapter.checkpoint.output import OutputShard
from merge_adapter.checkpoint.reader import buffer_of
from merge_adapter.checkpoint.writer import ShardWriter, copy_file
from merge_adapter.methods.change import Kind, ModuleChange, Replacement, RowChange, TensorSpec, Weights
from merge_adapter.methods.row_blocks.cutting import block_rows
from merge_adapter.methods.row_blocks.rows import Retained, RowRun, as_rows, kept_and_asked
from merge_adapter.methods.row_blocks.scratch import Scratch, scratch_on
from merge_adapter.methods.row_blocks.sums import ModulesTogether
from merge_adapter.plan import MergePlan, Step
from merge_adapter.types import FileOrigin, OutputFile, Repository, Task
from merge_adapter.workers import Job, Queues, Stop

JOB_BYTES = 32 << 20
"""Output bytes of a job: long enough to be worth a queue, short enough for all workers to end together."""


class Shard:
    """One output file while it is being written."""

    def __init__(self, plan: OutputShard, path: Path) -> None:
        self.plan = plan
        self._path = path
        self._start, self.header = build_header(plan.tensors, plan.metadata)
        self._writer: ShardWriter | None = None
        self._lock = Lock()
        self.sha256 = ""

    def write(self, offset: int, tensor: torch.Tensor) -> None:
        """Write a contiguous tensor's bytes at `offset` of the file."""
        writer = self._open()
        writer.write(offset, buffer_of(tensor))
        if writer.complete:
            self._finish()

    def write_header(self) -> None:
        """Write what comes before the data; to be called once."""
        writer = self._open()
        writer.write(0, memoryview(self._start))
        if writer.complete:
            self._finish()

    def abandon(self) -> None:
        """Remove the file unless it is whole."""
        with self._lock:
            if self._writer is not None:
                self._writer.abandon()

    def _open(self) -> ShardWriter:
        with self._lock:
            if self._writer is None:
                self._writer = ShardWriter(self._path, self.plan.bytes)
            return self._writer

    def _finish(self) -> None:
        with self._lock:
            if not self.sha256 and self._writer is not None:
                self.sha256 = self._writer.finish()


@dataclass
class TensorWork:
    """One tensor of the output while it is being made."""

    spec: TensorSpec
    """As it is written."""
    shard: Shard
    offset: int
    """Of its data in the file."""
    source: Weights
    source_name: str
    changes: tuple[RowChange, ...]
    adapters: tuple[Weights, ...]
    """For each change the adapter it reads."""
    lock: Lock = field(default_factory=Lock)
    run: RowRun | None = None
    jobs_left: int = 0
    retained: float | None = None

    @property
    def rows(self) -> int:
        return self.spec.shape[0] if self.spec.shape else 1

    @property
    def row_bytes(self) -> int:
        return self.spec.nbytes // max(self.rows, 1)


class Work:
    """All jobs of one merge, and what they share."""

    def __init__(
        self,
        plan: MergePlan,
        repository: Repository,
        base: Weights,
        adapters: Sequence[Weights],
        destination: Path,
        stop: Stop,
        task: Task,
        device: torch.device,
    ) -> None:
        self.stop = stop
        self._device = device
        self.bytes_copied = 0
        self._plan = plan
        self._repository = repository
        self._base = base
        self._adapters = tuple(adapters)
        self._destination = destination
        self._task = task
        self._local = threading.local()
        self._lock = Lock()
        self._files: dict[str, OutputFile] = {}
        self._shards = {
            shard.path: Shard(shard, destination / shard.path)
            for shard in plan.outputs
            if shard.origin is not FileOrigin.COPIED
        }
        self._places = {
            stored.spec.name: (shard, stored.offset, stored.spec)
            for shard in self._shards.values()
            for stored in shard.header.tensors
        }
        self._tensors: list[TensorWork] = []
        self._module_retained: dict[str, float] = {}
        self.changed = frozenset(spec.name for step in plan.steps for spec in step.change.writes)

    def queues(self) -> Queues:
        """The jobs, one queue per output file, in the order of the data."""
        steps: dict[str, list[Step]] = defaultdict(list)
        for step in self._plan.steps:
            for spec in step.change.writes:
                steps[spec.name].append(step)
        started: set[int] = set()
        return Queues(
            [partial(self._copy, shard)]
            if shard.origin is FileOrigin.COPIED
            else list(self._shard_jobs(self._shards[shard.path], steps, started))
            for shard in self._plan.outputs
        )

    def files(self) -> tuple[OutputFile, ...]:
        """The finished files in plan order. To be called when every job is done."""
        for shard in self._shards.values():
            if not shard.sha256:
                raise AssertionError(f"{shard.plan.path} was never completed")
            plan = shard.plan
            self._files[plan.path] = OutputFile(plan.path, plan.bytes, shard.sha256, plan.origin)
        return tuple(self._files[shard.path] for shard in self._plan.outputs)

    def retained(self) -> dict[str, float]:
        """Per changed tensor the part of the update that survived rounding, in plan order."""
        found = {work.spec.name: work.retained for work in self._tensors if work.retained is not None}
        return {**found, **self._module_retained}

    def abandon(self) -> None:
        """Remove every file written so far, finished ones included. No job may be running."""
        for shard in self._shards.values():
            shard.abandon()
        for planned in self._plan.outputs:
            (self._destination / planned.path).unlink(missing_ok=True)

    # -------------------------------------------------------------------------------------- making jobs

    def _shard_jobs(self, shard: Shard, steps: dict[str, list[Step]], started: set[int]) -> Iterator[Job]:
        yield shard.write_header
        for stored in shard.header.tensors:
            changes = steps.get(stored.spec.name, [])
            module = next((step for step in changes if isinstance(step.change, ModuleChange)), None)
            if module is None:
                yield from self._tensor_jobs(shard, stored.spec, stored.offset, changes)
            elif len(changes) > 1:
                raise AssertionError(
                    f"{stored.spec.name} is written by {len(changes)} changes, one of them whole"
                )
            elif id(module) not in started:
                started.add(id(module))
                yield partial(self._run_module, module)

    def _tensor_jobs(self, shard: Shard, spec: TensorSpec, offset: int, steps: list[Step]) -> Iterator[Job]:
        work = self._tensor_work(shard, spec, offset, steps)
        if not spec.elements:
            return
        self._tensors.append(work)
        step = max(1, JOB_BYTES // max(work.row_bytes, 1) // block_rows(spec.shape)) * block_rows(spec.shape)
        starts = range(0, work.rows, step)
        work.jobs_left = len(starts)
        for start in starts:
            yield partial(self._run_rows, work, start, min(start + step, work.rows))

    def _tensor_work(self, shard: Shard, spec: TensorSpec, offset: int, steps: list[Step]) -> TensorWork:
        source, name = self._base, spec.name
        changes: list[RowChange] = []
        adapters: list[Weights] = []
        for step in steps:
            change = step.change
            if isinstance(change, Replacement):
                source, name = self._adapters[step.adapter], change.source
                changes, adapters = [], []
            elif isinstance(change, RowChange):
                if not changes and source is self._base:
                    name = change.reads[0]
                changes.append(change)
                adapters.append(self._adapters[step.adapter])
        return TensorWork(spec, shard, offset, source, name, tuple(changes), tuple(adapters))

    # ------------------------------------------------------------------------------------- running jobs

    def _scratch(self) -> Scratch:
        if not hasattr(self._local, "scratch"):
            self._local.scratch = scratch_on(self._device)
        scratch: Scratch = self._local.scratch
        return scratch

    def _copy(self, shard: OutputShard) -> None:
        def advance(count: int) -> None:
            self.stop.check()
            self._task.advance(count)

        target = self._destination / shard.path
        digest = copy_file(self._repository.local(shard.source), target, advance=advance)
        with self._lock:
            self.bytes_copied += shard.bytes
            self._files[shard.path] = OutputFile(shard.path, shard.bytes, digest, shard.origin, "base")

    def _run_rows(self, work: TensorWork, start: int, stop: int) -> None:
        dtype = torch_dtype(work.spec.dtype)

        def emit(row: int, rows: torch.Tensor) -> None:
            work.shard.write(work.offset + row * work.row_bytes, rows)
            self._task.advance(rows.nbytes)

        if not work.changes:
            self._cast_rows(work, start, stop, dtype, emit)
            return
        scratch = self._scratch()
        with scratch.working():
            with work.lock:
                if work.run is None:
                    work.run = RowRun(
                        work.source, work.source_name, work.changes, work.adapters, self._device
                    )
                    work.run.survey(scratch, self.stop.check)
                    scratch.settle()
            work.run.run(scratch, start=start, stop=stop, dtype=dtype, emit=emit, check=self.stop.check)
        with work.lock:
            work.jobs_left -= 1
            if not work.jobs_left:
                work.retained, work.run = work.run.retained.value(), None

    def _cast_rows(
        self,
        work: TensorWork,
        start: int,
        stop: int,
        dtype: torch.dtype,
        emit: Callable[[int, torch.Tensor], None],
    ) -> None:
        """Rows that only move, or move into another dtype."""
        step = block_rows(work.spec.shape) * 4
        for row in range(start, stop, step):
            self.stop.check()
            rows = work.source.read_rows(work.source_name, row, min(row + step, stop))
            emit(row, rows.to(dtype))

    def _run_module(self, step: Step) -> None:
        change = step.change
        assert isinstance(change, ModuleChange)
        expected = {spec.name for spec in change.writes}
        arithmetic = change.arithmetic
        made = (
            arithmetic.run_together(self._base, self._adapters)
            if isinstance(arithmetic, ModulesTogether)
            else arithmetic.run(self._base, self._adapters[step.adapter])
        )
        for name, tensor in made:
            self.stop.check()
            expected.remove(name)
            self._write_whole(name, tensor, added=change.kind is Kind.ADD)
        if expected:
            raise AssertionError(f"{change.module} did not make {', '.join(sorted(expected))}")

    def _write_whole(self, name: str, tensor: torch.Tensor, *, added: bool) -> None:
        """Write a computed tensor, rounded once, and compare it with the base's on the way."""
        shard, offset, spec = self._places[name]
        if tuple(tensor.shape) != spec.shape:
            raise AssertionError(f"{name}: computed {tuple(tensor.shape)}, planned {spec.shape}")
        if not spec.elements:
            return
        dtype, retained = torch_dtype(spec.dtype), Retained()
        compare = not added and name in self._base.specs and self._base.specs[name].shape == spec.shape
        merged = as_rows(tensor.detach())
        step, row_bytes = block_rows(spec.shape), spec.nbytes // merged.shape[0]
        for row in range(0, merged.shape[0], step):
            self.stop.check()
            block = merged[row : row + step].cpu()
            rounded = block.to(dtype)
            shard.write(offset + row * row_bytes, rounded)
            self._task.advance(rounded.nbytes)
            if compare:
                before = as_rows(self._base.read_rows(name, row, row + block.shape[0])).float()
                retained.add(row, *kept_and_asked(name, before, rounded.float(), block.float() - before))
        if compare and (value := retained.value()) is not None:
            with self._lock:
                self._module_retained[name] = value
