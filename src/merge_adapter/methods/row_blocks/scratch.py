"""The memory that one worker thread computes in, and how blocks get to the device and back."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


class Scratch:
    """Buffers of one worker thread on the CPU, reused from block to block."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, role: str, rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """`[rows, columns]`, contiguous, with whatever was in it. Equal roles share memory."""
        wanted = rows * columns
        buffer = self._buffers.get((role, dtype))
        if buffer is None or buffer.numel() < wanted:
            buffer = self._buffers[role, dtype] = self._empty(role, wanted, dtype)
        return buffer[:wanted].view(rows, columns)

    def working(self) -> AbstractContextManager[object]:
        """Everything that this thread computes on the device belongs inside."""
        return nullcontext()

    def load(self, role: str, stored: Tensor) -> Tensor:
        """A 2-D block that was read from a file, in float32 on the device."""
        return self.take(role, *stored.shape).copy_(stored)

    def fetch(self, block: Tensor) -> Tensor:
        """A block of the device as memory of the host; good until the next `fetch`."""
        return block

    def settle(self) -> None:
        """Return when all that was asked of the device is done, so that other threads may use it."""

    def _empty(self, role: str, elements: int, dtype: torch.dtype) -> Tensor:  # noqa: ARG002 - for subclasses
        return torch.empty(elements, dtype=dtype, device=self.device)


class CudaScratch(Scratch):
    """Buffers on a GPU, with a stream of this thread's own and pinned memory to copy from and to.

    One thread reads, copies and computes its blocks one after the other; as every thread has its own stream, one's
    copies run beside another's sums, and the disk, the bus and the GPU are busy at the same time.
    """

    _TO, _FROM = "pinned to", "pinned from"

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._sent = torch.cuda.Event()  # type: ignore[no-untyped-call]
        """When the pinned block was last on the device, and may be overwritten."""

    def working(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._stream)

    def load(self, role: str, stored: Tensor) -> Tensor:
        rows, columns = stored.shape
        self._sent.synchronize()
        pinned = self.take(self._TO, rows, columns, stored.dtype).copy_(stored)
        raw = self.take("as stored", rows, columns, stored.dtype).copy_(pinned, non_blocking=True)
        self._sent.record(self._stream)
        return self.take(role, rows, columns).copy_(raw)

    def fetch(self, block: Tensor) -> Tensor:
        rows, columns = block.shape
        pinned = self.take(self._FROM, rows, columns, block.dtype).copy_(block, non_blocking=True)
        self._stream.synchronize()
        return pinned

    def settle(self) -> None:
        self._stream.synchronize()

    def _empty(self, role: str, elements: int, dtype: torch.dtype) -> Tensor:
        if role in (self._TO, self._FROM):
            return torch.empty(elements, dtype=dtype, pin_memory=True)
        return super()._empty(role, elements, dtype)


def scratch_on(device: torch.device) -> Scratch:
    """The scratch memory of one thread that computes on `device`."""
    return CudaScratch(device) if device.type == "cuda" else Scratch(device)
