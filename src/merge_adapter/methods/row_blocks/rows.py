"""Running row changes over one tensor, block by block."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import TYPE_CHECKING

import torch

from merge_adapter.errors import MalformedError
from merge_adapter.methods.change import Kind, RowChange, RowKernel, Weights
from merge_adapter.methods.row_blocks.cutting import block_rows
from merge_adapter.methods.row_blocks.scratch import Scratch
from merge_adapter.methods.row_blocks.sums import SumsKernel

if TYPE_CHECKING:
    from torch import Tensor


def as_rows(tensor: Tensor) -> Tensor:
    """A tensor as the 2-D block that kernels see; vectors become columns, scalars one element."""
    return tensor.reshape(tensor.shape[0] if tensor.dim() else 1, -1)


@dataclass
class Retained:
    """How much of an update survived rounding, summed over blocks in any order with equal result."""

    parts: dict[int, tuple[float, float]] = field(default_factory=dict)
    _lock: Lock = field(default_factory=Lock)

    def add(self, start: int, kept: float, asked: float) -> None:
        with self._lock:
            self.parts[start] = (kept, asked)

    def value(self) -> float | None:
        """`<M-W, D> / <D, D>`; None for an update of zero, or one that is not finite."""
        parts = [self.parts[start] for start in sorted(self.parts)]
        asked = math.fsum(part[1] for part in parts)
        kept = math.fsum(part[0] for part in parts)
        return kept / asked if asked > 0 and math.isfinite(kept / asked) else None


class RowRun:
    """The changes of one tensor, ready to run; its rows may be processed by several threads."""

    def __init__(
        self,
        source: Weights,
        name: str,
        changes: Sequence[RowChange],
        adapters: Sequence[Weights],
        device: torch.device,
    ) -> None:
        """Start from the tensor `name` of `source`; `adapters[i]` answers for the tensors of `changes[i]`."""
        self._source = source
        self._spec = source.specs[name]
        self.retained = Retained()
        self.kernels: tuple[RowKernel, ...] = tuple(
            change.arithmetic.kernel(adapter) for change, adapter in zip(changes, adapters, strict=True)
        )
        if len(self.kernels) > 1 and all(change.kind is Kind.ADDITIVE for change in changes):
            self.kernels = (SumsKernel(self.kernels),)
        for kernel in self.kernels:
            kernel.to(device)

    def survey(self, scratch: Scratch, check: Callable[[], None]) -> None:
        """Show every block to the kernels that ask for it; each sees what those before it make of the block."""
        for position, kernel in enumerate(self.kernels):
            if not kernel.surveys:
                continue
            for start, block in self._blocks(scratch, 0, self._rows, check):
                current = block
                for earlier in self.kernels[:position]:
                    current, _ = self._apply(earlier, current, start, scratch)
                kernel.survey(current, start)

    def run(
        self,
        scratch: Scratch,
        *,
        start: int,
        stop: int,
        dtype: torch.dtype,
        emit: Callable[[int, Tensor], None],
        check: Callable[[], None],
    ) -> None:
        """Rows `start` to `stop`, `start` at the edge of a block; `emit(row, merged)` gets each block in `dtype`.

        `check` is called before each block and may raise to stop.
        """
        for row, block in self._blocks(scratch, start, stop, check):
            merged, update = block, block
            for kernel in self.kernels:
                merged, update = self._apply(kernel, merged, row, scratch)
            if len(self.kernels) > 1:
                torch.sub(merged, block, out=update)
            rounded = scratch.take("rounded", block.shape[0], block.shape[1], dtype)
            if dtype == torch.float64:  # float32 holds the update, not a double base
                rounded.copy_(self._stored(row, block.shape[0])).add_(update)
            else:
                rounded.copy_(merged)
            emit(row, scratch.fetch(rounded))
            back = merged if dtype == torch.float32 else scratch.take("back", *block.shape).copy_(rounded)
            self.retained.add(row, *kept_and_asked(self._spec.name, block, back, update))

    def _blocks(
        self, scratch: Scratch, start: int, stop: int, check: Callable[[], None]
    ) -> Iterator[tuple[int, Tensor]]:
        step = block_rows(self._spec.shape)
        for row in range(start, stop, step):
            check()
            stored = self._stored(row, min(step, stop - row))
            yield row, scratch.load("block", stored)

    def _stored(self, row: int, count: int) -> Tensor:
        return as_rows(self._source.read_rows(self._spec.name, row, row + count))

    def _apply(self, kernel: RowKernel, block: Tensor, row: int, scratch: Scratch) -> tuple[Tensor, Tensor]:
        role = "merged a" if block.data_ptr() != scratch.take("merged a", 1, 1).data_ptr() else "merged b"
        merged, update = scratch.take(role, *block.shape), scratch.take("update", *block.shape)
        kernel.apply(block, row, merged, update)
        return merged, update

    @property
    def _rows(self) -> int:
        return self._spec.shape[0] if self._spec.shape else 1


def kept_and_asked(name: str, before: Tensor, after: Tensor, update: Tensor) -> tuple[float, float]:
    """`<M-W, D>` and `<D, D>` of one block of the tensor `name`; overwrites `after`. All float32 of one shape.

    Raises MalformedError for an update that is not finite, on rows of the base that are.
    """
    torch.sub(after, before, out=after)
    flat = update.reshape(-1)
    kept, asked = float(torch.dot(after.reshape(-1), flat)), float(torch.dot(flat, flat))
    if not math.isfinite(asked) and not torch.isfinite(update).all() and torch.isfinite(before).all():
        raise MalformedError(
            f"The adapter's update of {name} holds NaN or infinity; nothing sensible can be merged.",
            hint="The training diverged, or the file was damaged; use an earlier checkpoint.",
        )
    return kept, asked


def change_whole(tensor: Tensor, kernel: RowKernel) -> Tensor:
    """A float32 tensor after one kernel, in new memory; the cut into blocks is that of a tensor on disk."""
    rows, step = as_rows(tensor), block_rows(tuple(tensor.shape))
    starts = range(0, rows.shape[0], step)
    if kernel.surveys:
        for start in starts:
            kernel.survey(rows[start : start + step], start)
    merged = torch.empty_like(rows)
    update = torch.empty(step, rows.shape[1])
    for start in starts:
        block = rows[start : start + step]
        kernel.apply(block, start, merged[start : start + step], update[: block.shape[0]])
    return merged.view(tensor.shape)
