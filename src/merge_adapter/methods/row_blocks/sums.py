"""Changes of one tensor by several adapters, made so that their order leaves no trace."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from merge_adapter.methods.change import ModuleArithmetic, RowKernel, TensorSpec, Weights

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
class ModulesTogether(ModuleArithmetic):
    """What several adapters make of the same tensors."""

    parts: tuple[tuple[ModuleArithmetic, int], ...]
    """A function, and which adapter it reads."""

    def run(self, base: Weights, adapter: Weights) -> Iterator[tuple[str, Tensor]]:  # noqa: ARG002 - never called
        raise AssertionError("several adapters read more than one file; call run_together")

    def run_together(self, base: Weights, adapters: Sequence[Weights]) -> Iterator[tuple[str, Tensor]]:
        """As `run`, with the tensors of every adapter."""
        raise NotImplementedError


@dataclass(frozen=True)
class SumOfModules(ModulesTogether):
    """W + (f1(W) - W) + (f2(W) - W) + … for functions that are each a sum, of several adapters."""

    def run_together(self, base: Weights, adapters: Sequence[Weights]) -> Iterator[tuple[str, Tensor]]:
        import torch

        updates: dict[str, list[Tensor]] = {}
        for arithmetic, number in self.parts:
            for name, made in arithmetic.run(base, adapters[number]):
                updates.setdefault(name, []).append(made.detach().float() - base.read(name).float())
        for name, found in updates.items():
            yield name, base.read(name).float() + _added(torch.stack(found))


@dataclass(frozen=True)
class ModulesInTurn(ModulesTogether):
    """f2(f1(W)) for functions whose order makes no difference: those of IA3 scale the same rows or columns."""

    def run_together(self, base: Weights, adapters: Sequence[Weights]) -> Iterator[tuple[str, Tensor]]:
        made: dict[str, Tensor] = {}
        for arithmetic, number in self.parts:
            made |= {
                name: value.detach().float()
                for name, value in arithmetic.run(_Over(base, made), adapters[number])
            }
        yield from made.items()


class _Over(Weights):
    """The base with some tensors already merged, in float32."""

    def __init__(self, base: Weights, made: Mapping[str, Tensor]) -> None:
        self._base = base
        self._made = dict(made)

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        return self._base.specs

    def read(self, name: str) -> Tensor:
        return self._made[name].clone() if name in self._made else self._base.read(name)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        return self._made[name][start:stop] if name in self._made else self._base.read_rows(name, start, stop)


def _added(parts: Tensor) -> Tensor:
    """The sum over the first dimension. Two summands commute; of more, each element's are put in order before."""
    if len(parts) > 2:
        parts = parts.sort(dim=0).values
    total = parts[0].clone()
    for part in parts[1:]:
        total.add_(part)
    return total
