"""The third stage: write the merged weights.

Output files are written at their final size from the start. Jobs, each some rows of one tensor, run in worker
threads with one torch thread each; every byte is computed the same way whatever thread takes which job.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from hashlib import sha256
from pathlib import Path

import torch

from merge_adapter.checkpoint.base import read_base
from merge_adapter.checkpoint.output import index_text
from merge_adapter.checkpoint.writer import storage_errors
from merge_adapter.errors import InputError
from merge_adapter.plan import MergePlan
from merge_adapter.shards import Work
from merge_adapter.types import (
    FileOrigin,
    MergeResult,
    MergeSettings,
    OutputFile,
    Progress,
    Resolved,
)
from merge_adapter.workers import Stop, run_jobs


def merge(
    plan: MergePlan,
    sources: Resolved,
    destination: Path,
    *,
    settings: MergeSettings,
    device: str = "auto",
    threads: int | None = None,
    progress: Progress,
) -> MergeResult:
    """Write the weight files of `plan`, and their index, into the existing empty folder `destination`.

    The same bytes come out for any number of threads. Files have temporary names until they are whole; when
    something fails, or the user interrupts, the workers are stopped, all files removed, and the error is
    raised: MalformedError for input that changed or breaks off, StorageError for a full disk, InputError for a
    device that this machine does not have.
    """
    began = time.monotonic()
    with ExitStack() as stack:
        base = stack.enter_context((plan.view or read_base(sources.base, settings)).open())
        adapters = [file.open() for file in plan.adapters]
        for opened in adapters:
            stack.push(opened)
        task = stack.enter_context(progress.task("Merging", plan.bytes_written))
        work = Work(plan, sources.base.repository, base, adapters, destination, Stop(), task, _device(device))
        stack.enter_context(_one_torch_thread())
        try:
            run_jobs(work.queues(), threads=threads or _cores(), stop=work.stop)
            files = work.files()
            if plan.index is not None:
                files += (write_index(plan, destination),)
        except BaseException:
            work.abandon()
            raise
        return MergeResult(
            files=files,
            seconds=time.monotonic() - began,
            bytes_read=base.bytes_read + sum(adapter.bytes_read for adapter in adapters) + work.bytes_copied,
            bytes_written=sum(file.bytes for file in files),
            bytes_changed=plan.bytes_changed,
            tensors_changed=len(work.changed),
            tensors_copied=sum(len(shard.tensors) for shard in plan.outputs) - len(work.changed),
            retained=work.retained(),
        )


def write_index(plan: MergePlan, destination: Path) -> OutputFile:
    """Write the index of all weight files of `plan`, which must have one, into `destination`."""
    assert plan.index is not None
    text = index_text(plan.outputs, plan.index_metadata)
    path = destination / plan.index
    with storage_errors(path):
        path.write_bytes(text)
    return OutputFile(plan.index, len(text), sha256(text).hexdigest(), FileOrigin.WRITTEN)


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Our own threads share the cores; torch's would only fight them, and may split sums differently."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _device(name: str) -> torch.device:
    """The device that adds; `auto` is the CPU, which keeps up with disks. Raises InputError."""
    try:
        device = torch.device("cpu" if name == "auto" else name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"The device {name!r} cannot be used: {reason}",
            hint="Use --device cpu, or cuda where there is a GPU.",
        ) from error
    return device


def _cores() -> int:
    """Cores this process may use."""
    return max(1, len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
