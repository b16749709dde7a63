"""The matrix products of the outputs part: nearly all of its time.

torch hands fp32 products on a CPU to MKL, which on some processors reaches half of what oneDNN, the other library in
torch, does; and it splits each product over threads that then wait for each other. Here a layer's weight is cut into
the same runs of rows whatever the number of threads, each worker takes some of them, and each run is made fp32 and
multiplied in one thread: the bits do not depend on how many there are. Layers whose weight is small are left to torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from merge_adapter.verify.memory.lazy import MANY, PIECE, LazyFloat
from merge_adapter.verify.memory.mapped import is_paged, need, release
from merge_adapter.verify.memory.scratch import own_scratch

SMALL = 1 << 16
"""Elements of a weight below which handing it round costs more than multiplying by it."""

RESIDENT = 1 << 31
"""Bytes of mapped weights that may stay in memory between passes of few vectors, by which text is written: mapping a
weight again costs as much as multiplying a few vectors by it, and clean pages are the system's to take at any time."""

Multiply = Callable[[Tensor, Tensor, Tensor | None], Tensor]


@contextmanager
def fast_products(device: torch.device) -> Iterator[None]:
    """Within this, linear layers on the CPU are computed as described above; elsewhere nothing changes."""
    multiply = _multiply()
    if device.type != "cpu" or multiply is None:
        yield
        return
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            # the setting is partly the process's, not the thread's: started first, so that it can be put back
            list(pool.map(lambda _: None, range(threads)))
            torch.set_num_threads(threads)
            with _Products(pool, threads, multiply):
                yield
    finally:
        torch.set_num_threads(threads)


@cache
def _multiply() -> Multiply | None:
    """oneDNN's linear layer as torch carries it; None where it is missing or does not answer as torch's own."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]  # torch's own gap
        return None
    try:
        linear = torch.ops.mkldnn._linear_pointwise
    except AttributeError:
        return None

    def multiply(vectors: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        made = linear(vectors, weight, bias, "none", [], "")
        assert isinstance(made, Tensor)
        return made

    generator = torch.Generator().manual_seed(0)
    vectors, weight = torch.randn(3, 40, generator=generator), torch.randn(24, 40, generator=generator)
    bias = torch.randn(24, generator=generator)
    try:
        same = torch.allclose(
            multiply(vectors, weight, bias), nn.functional.linear(vectors, weight, bias), atol=1e-4
        )
    except (RuntimeError, TypeError):
        return None
    return multiply if same else None


class _Products(TorchFunctionMode):
    """Takes over `nn.functional.linear` with a large fp32 weight, lazy or not."""

    def __init__(self, pool: ThreadPoolExecutor, threads: int, multiply: Multiply) -> None:
        super().__init__()
        self._pool = pool
        self._threads = threads
        self._multiply = multiply
        self._resident: set[int] = set()
        self._bytes = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.linear and _taken(*args, **kwargs):
            return self._linear(*args, **kwargs)
        return func(*args, **kwargs)

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        with torch._C.DisableTorchFunctionSubclass(), torch.no_grad():
            rows, width = weight.shape
            vectors = input.reshape(-1, width).contiguous()
            made = torch.empty(vectors.shape[0], rows)
            step = max(1, PIECE // width)
            starts = list(range(0, rows, step))

            def run(first: int) -> None:
                # contiguous pieces to each worker: the disk is read in order
                share = -(-len(starts) // self._threads)
                scratch = own_scratch()
                with torch.no_grad():
                    for start in starts[first * share : (first + 1) * share]:
                        stop = min(start + step, rows)
                        piece = _rows(
                            weight, start, stop, scratch.floats("product", torch.Size((stop - start, width)))
                        )
                        own = None if bias is None else bias.detach()[start:stop]
                        made[:, start:stop] = self._multiply(vectors, piece, own)

            if self._threads == 1 or is_paged():
                for first in range(self._threads):
                    run(first)
            else:
                list(self._pool.map(run, range(self._threads)))
            self._let_go(weight, vectors.shape[0])
            return made.view(*input.shape[:-1], rows)

    def _let_go(self, weight: Tensor, vectors: int) -> None:
        """Give the weight's mapped pages back, but for some that the next few vectors will need."""
        stored = weight._mapped if isinstance(weight, LazyFloat) else weight
        if stored is None:
            return
        if vectors < MANY:
            if stored.data_ptr() in self._resident:
                return
            if self._bytes + stored.nbytes <= RESIDENT:
                self._resident.add(stored.data_ptr())
                self._bytes += stored.nbytes
                return
        release(stored)


def _taken(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    if weight.ndim != 2 or weight.numel() < SMALL or isinstance(bias, LazyFloat):
        return False
    if isinstance(weight, LazyFloat) and weight._fill is None:
        return False
    plain = isinstance(input, Tensor) and not isinstance(input, LazyFloat)
    alike = (
        plain
        and input.dtype == weight.dtype == torch.float32
        and input.device.type == weight.device.type == "cpu"
    )
    return alike and (bias is None or bias.dtype == torch.float32)


def _rows(weight: Tensor, start: int, stop: int, room: Tensor) -> Tensor:
    """Rows [start, stop) in fp32, in `room` unless they are fp32 where they lie."""
    if isinstance(weight, LazyFloat):
        fill = weight._fill
        assert fill is not None
        fill(start, stop, room)
        return room
    need(weight)
    return weight.detach()[start:stop]
