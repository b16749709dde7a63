"""Several sums on one tensor, added up so that their order leaves no trace."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from merge_adapter.methods.change import RowKernel

if TYPE_CHECKING:
    from torch import Tensor


class SumsKernel(RowKernel):
    """W + (D1 + D2 + …), the updates added first: W is rounded to nothing but the whole of them.

    Two summands commute; of three and more, each element's are put in order before they are added, so that the bits
    are the same whichever adapter came first.
    """

    def __init__(self, kernels: Sequence[RowKernel]) -> None:
        self._kernels = tuple(kernels)

    def apply(self, block: Tensor, start: int, merged: Tensor, update: Tensor) -> None:
        parts = torch.empty((len(self._kernels), *block.shape), device=block.device)
        for kernel, part in zip(self._kernels, parts, strict=True):
            kernel.apply(block, start, merged, part)
        if len(self._kernels) > 2:
            parts = parts.sort(dim=0).values
        update.copy_(parts[0])
        for part in parts[1:]:
            update.add_(part)
        torch.add(block, update, out=merged)

    def to(self, device: torch.device) -> None:
        for kernel in self._kernels:
            kernel.to(device)
