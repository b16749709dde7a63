"""The kernels of LoRA's family: float32 blocks in, float32 blocks out. All shapes are of one block."""

from __future__ import annotations

import torch
from torch import Tensor

from merge_adapter.methods.change import RowKernel


class LowRankKernel(RowKernel):
    """W + left @ right, the scale already inside `left`."""

    def __init__(self, left: Tensor, right: Tensor) -> None:
        self._left = left  # [rows, r]
        self._right = right  # [r, columns]

    def apply(self, block: Tensor, start: int, merged: Tensor, update: Tensor) -> None:
        self._sum(block, start, merged, update)

    def _sum(self, block: Tensor, start: int, merged: Tensor, update: Tensor) -> None:
        torch.mm(self._left[start : start + block.shape[0]], self._right, out=update)  # [rows, columns]
        torch.add(block, update, out=merged)


class RowDoraKernel(LowRankKernel):
    """m / |W + D| * (W + D), norms along the rows: linear layers and convolutions, `[out, ...]`."""

    def __init__(self, left: Tensor, right: Tensor, magnitude: Tensor) -> None:
        super().__init__(left, right)
        self._magnitude = magnitude  # [rows]

    def apply(self, block: Tensor, start: int, merged: Tensor, update: Tensor) -> None:
        self._sum(block, start, merged, update)
        norm = torch.linalg.vector_norm(merged, dim=1)
        factor = self._magnitude[start : start + block.shape[0]] / norm
        merged.mul_(factor.unsqueeze(1))
        torch.sub(merged, block, out=update)


class ColumnDoraKernel(LowRankKernel):
    """The same with norms down the columns: transposed layers `[in, out]`, embeddings `[tokens, width]`."""

    surveys = True

    def __init__(self, left: Tensor, right: Tensor, magnitude: Tensor) -> None:
        super().__init__(left, right)
        self._magnitude = magnitude  # [columns]
        self._squares = torch.zeros(magnitude.shape, dtype=torch.float64)

    def survey(self, block: Tensor, start: int) -> None:
        merged, update = torch.empty_like(block), torch.empty_like(block)
        self._sum(block, start, merged, update)
        self._squares += merged.double().square_().sum(dim=0)

    def apply(self, block: Tensor, start: int, merged: Tensor, update: Tensor) -> None:
        self._sum(block, start, merged, update)
        merged.mul_((self._magnitude / self._squares.sqrt().float()).unsqueeze(0))
        torch.sub(merged, block, out=update)


class LowRankStackKernel(RowKernel):
    """The same for a stack: row e of the block is expert e, flattened."""

    def __init__(self, left: Tensor, right: Tensor) -> None:
        self._left = left  # [experts, p, r]
        self._right = right  # [experts, r, q]

    def apply(self, block: Tensor, start: int, merged: Tensor, update: Tensor) -> None:
        rows = slice(start, start + block.shape[0])
        stack = update.view(block.shape[0], self._left.shape[1], self._right.shape[2])  # [n, p, q]
        torch.bmm(self._left[rows], self._right[rows], out=stack)
        torch.add(block, update, out=merged)


class SameKernel(RowKernel):
    """W as it is."""

    def apply(self, block: Tensor, start: int, merged: Tensor, update: Tensor) -> None:  # noqa: ARG002
        merged.copy_(block)
        update.zero_()


class SumKernel(RowKernel):
    """W + a tensor of the same rows."""

    def __init__(self, addend: Tensor) -> None:
        self._addend = addend  # [rows, columns]

    def apply(self, block: Tensor, start: int, merged: Tensor, update: Tensor) -> None:
        update.copy_(self._addend[start : start + block.shape[0]])
        torch.add(block, update, out=merged)


class NewRowsKernel(RowKernel):
    """Named rows replaced, the others kept."""

    def __init__(self, values: Tensor, rows: tuple[int, ...]) -> None:
        self._values = values  # [tokens, columns]
        self._rows = rows

    def apply(self, block: Tensor, start: int, merged: Tensor, update: Tensor) -> None:
        merged.copy_(block)
        for position, row in enumerate(self._rows):
            if start <= row < start + block.shape[0]:
                merged[row - start].copy_(self._values[position])
        torch.sub(merged, block, out=update)
