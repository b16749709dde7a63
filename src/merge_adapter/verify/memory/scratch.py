"""Buffers that row blocks are computed in, block after block: fresh memory costs more than the arithmetic."""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor


class Scratch:
    """Named buffers that grow to the largest block asked for. Not shared between threads."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, torch.dtype], Tensor] = {}

    def floats(self, name: str, shape: torch.Size) -> Tensor:
        """An fp32 tensor of `shape`, whatever it held before; the next call of that name overwrites it."""
        return self.take(name, shape, torch.float32)

    def take(self, name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """The same in any dtype."""
        size = math.prod(shape)
        held = self._held.get((name, dtype))
        if held is None or held.numel() < size:
            held = self._held[name, dtype] = torch.empty(size, dtype=dtype)
        return held[:size].view(shape)


class _Own(threading.local):
    def __init__(self) -> None:
        self.scratch = Scratch()


_own = _Own()


def own_scratch() -> Scratch:
    """The calling thread's buffers."""
    return _own.scratch
