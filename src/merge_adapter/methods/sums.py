"""Several sums on one tensor, added up so that their order leaves no trace."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from merge_adapter.methods.change import ModuleArithmetic, RowKernel, Weights

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class SumsKernel(RowKernel):
    """W + (D1 + D2 + …), the updates added first: W is rounded to nothing but the whole of them.

    Two summands commute; of three and more, each element's are put in order before they are added, so that the bits
    are the same whichever adapter came first.
    """

    def __init__(self, kernels: Sequence[RowKernel]) -> None:
        self._kernels = tuple(kernels)

    def apply(self, block: Tensor, start: int, merged: Tensor, update: Tensor) -> None:
        import torch

        parts = torch.empty((len(self._kernels), *block.shape), device=block.device)
        for kernel, part in zip(self._kernels, parts, strict=True):
            kernel.apply(block, start, merged, part)
        update.copy_(_added(parts))
        torch.add(block, update, out=merged)

    def to(self, device: torch.device) -> None:
        for kernel in self._kernels:
            kernel.to(device)


@dataclass(frozen=True)
class SumOfModules(ModuleArithmetic):
    """W + (f1(W) - W) + (f2(W) - W) + … for functions that are each a sum, of several adapters."""

    parts: tuple[tuple[ModuleArithmetic, int], ...]
    """A function, and which adapter it reads."""

    def run(self, base: Weights, adapter: Weights) -> Iterator[tuple[str, Tensor]]:  # noqa: ARG002 - never called
        raise AssertionError("a sum over adapters reads more than one; call run_together")

    def run_together(self, base: Weights, adapters: Sequence[Weights]) -> Iterator[tuple[str, Tensor]]:
        """As `run`, with the tensors of every adapter."""
        import torch

        updates: dict[str, list[Tensor]] = {}
        for arithmetic, number in self.parts:
            for name, made in arithmetic.run(base, adapters[number]):
                updates.setdefault(name, []).append(made.detach().float() - base.read(name).float())
        for name, found in updates.items():
            yield name, base.read(name).float() + _added(torch.stack(found))


def _added(parts: Tensor) -> Tensor:
    """The sum over the first dimension. Two summands commute; of more, each element's are put in order before."""
    if len(parts) > 2:
        parts = parts.sort(dim=0).values
    total = parts[0].clone()
    for part in parts[1:]:
        total.add_(part)
    return total
