"""The closed form of LoRA on one tensor: W + scale * B A, row block by row block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from merge_adapter.methods.change import RowKernel, Weights

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """D = scale * left @ right.

    `left` is `[rows, r]` and `right` `[r, columns]` once reshaped and, where said so, transposed: for a
    linear layer B and A, for a transposed one (Conv1D) A^T and B^T, for an embedding A^T and B^T, for a
    convolution B and A flattened.
    """

    left: str
    """Name in the adapter's file."""
    right: str
    rank: int
    scale: float
    transposed: bool = False
    """Whether both factors are stored transposed."""
    magnitude: str | None = None
    """DoRA's magnitude vector in the adapter's file; None for plain LoRA."""
    magnitude_of_columns: bool = False
    """DoRA: whether norms run down the columns (transposed layers, embeddings) or along the rows."""
    rows: int = 0
    columns: int = 0

    @property
    def memory_bytes(self) -> int:
        return 4 * self.rank * (self.rows + self.columns)

    def kernel(self, adapter: Weights) -> RowKernel:
        from merge_adapter.methods.lora import kernels as lora_kernels

        left, right = self._factor(adapter, self.left), self._factor(adapter, self.right)
        if self.transposed:
            left, right = left.T, right.T
        left = (left * self.scale).contiguous()
        right = right.contiguous()
        if self.magnitude is None:
            return lora_kernels.LowRankKernel(left, right)
        magnitude = adapter.read(self.magnitude).float().reshape(-1)
        if self.magnitude_of_columns:
            return lora_kernels.ColumnDoraKernel(left, right, magnitude)
        return lora_kernels.RowDoraKernel(left, right, magnitude)

    def _factor(self, adapter: Weights, name: str) -> Tensor:
        factor = adapter.read(name).float()
        if factor.dim() <= 2:
            return factor
        # Convolutions: A [r, in, *kernel] -> [r, in * kernel], B [out, r, 1, ...] -> [out, r].
        return factor.reshape(factor.shape[0], -1)


@dataclass(frozen=True)
class LowRankStack:
    """One low-rank sum per expert of a stack `[experts, …, …]`, the factors of all experts side by side.

    A is `[experts * r, inputs]`, expert by expert; B is `[outputs, r * experts]`, rank by rank.
    """

    a: str
    b: str
    experts: int
    rank: int
    scale: float
    into_first: bool
    """Whether the stack is `[experts, inputs, outputs]`; else `[experts, outputs, inputs]`."""
    elements: int
    """Of the whole stack."""

    @property
    def memory_bytes(self) -> int:
        return 8 * self.elements // max(self.experts, 1)

    def kernel(self, adapter: Weights) -> RowKernel:
        from merge_adapter.methods.lora import kernels as lora_kernels

        a, b = adapter.read(self.a).float(), adapter.read(self.b).float()
        a = a.reshape(self.experts, self.rank, a.shape[1])  # [experts, r, inputs]
        b = b.reshape(b.shape[0], self.rank, self.experts).permute(2, 0, 1)  # [experts, outputs, r]
        left, right = (a.transpose(1, 2), b.transpose(1, 2)) if self.into_first else (b, a)
        return lora_kernels.LowRankStackKernel((left * self.scale).contiguous(), right.contiguous())


@dataclass(frozen=True)
class ScaledSum:
    """D = scale * a vector of the adapter: the bias of lora_B."""

    source: str
    scale: float

    @property
    def memory_bytes(self) -> int:
        return 0

    def kernel(self, adapter: Weights) -> RowKernel:
        from merge_adapter.methods.lora import kernels as lora_kernels

        return lora_kernels.SumKernel(adapter.read(self.source).float().reshape(-1, 1) * self.scale)


@dataclass(frozen=True)
class NewRows:
    """Some rows take trained values: trainable tokens."""

    source: str
    """`[number of tokens, width]` in the adapter's file."""
    rows: tuple[int, ...]

    @property
    def memory_bytes(self) -> int:
        return 0

    def kernel(self, adapter: Weights) -> RowKernel:
        from merge_adapter.methods.lora import kernels as lora_kernels

        return lora_kernels.NewRowsKernel(adapter.read(self.source).float(), self.rows)
