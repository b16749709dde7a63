"""What a merged tensor must be, computed apart from the merge: from the raw adapter file, in fp64.

For the LoRA family (plain, rsLoRA, rank and alpha patterns, biases, embeddings, 1x1-factored convolutions, DoRA
on linear layers) the update has a closed form, written here from the papers:

    W' = W + s B A                                   s = alpha / r, or alpha / sqrt(r) with rsLoRA
    W' = m (W + s B A) / |W + s B A|                 DoRA, norms over the input dimension

(Hu et al. 2021, arXiv 2106.09685; Kalajdzievski 2023, arXiv 2312.03732; Liu et al. 2024, arXiv 2402.09353.)
Every other method is judged against PEFT's own layer, merged on a copy of that one module in fp64, or in fp32
where it refuses fp64.

All updates work on row blocks: a tensor of any rank is seen as a matrix, its first dimension the rows.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from merge_adapter.verify.rounding import UNIT32, half_ulp, unit


def as_matrix(tensor: Tensor) -> Tensor:
    """A view (rows, rest); a vector becomes (n, 1)."""
    return tensor.reshape(tensor.shape[0] if tensor.ndim else 1, -1)


class Update(ABC):
    """A tensor the adapter changes: `target` is what it must become before rounding."""

    base: Tensor
    """The base's tensor as stored, shape of the merged one."""
    form: str
    """closed form, or which of PEFT's layers served as the oracle."""

    @property
    def shape(self) -> torch.Size:
        """Shape of the tensor."""
        return self.base.shape

    def base_rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Rows [start, stop) of the base, (rows, rest)."""
        return as_matrix(self.base)[start:stop].to(dtype)

    @abstractmethod
    def target_rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Rows [start, stop) of the merged tensor before rounding, (rows, rest)."""

    @abstractmethod
    def product_error(self, start: int, stop: int) -> Tensor:
        """Bound on the error that fp32 arithmetic itself may add to those rows, fp64."""

    @abstractmethod
    def cast_error(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """The named allowance: what more a merge may err that casts the update to 16 bit before it adds."""


@dataclass
class LowRank(Update):
    """W + left @ right, where left (rows, r) carries the scale and right is (r, rest)."""

    base: Tensor
    left: Tensor
    right: Tensor
    form: str = "closed form, W + s B A"

    def target_rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        left, right = self.left[start:stop].to(dtype), self.right.to(dtype)
        return torch.addmm(self.base_rows(start, stop, dtype), left, right)

    def product_error(self, start: int, stop: int) -> Tensor:
        # r products and r - 1 sums, one for the scale, each off by one unit of fp32; then the sum with W
        rank = self.right.shape[0]
        mass = self._mass(start, stop)
        return (rank + 2) * UNIT32 * mass + UNIT32 * self.target_rows(start, stop, torch.float64).abs()

    def cast_error(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        # a product rounded to 16 bit, scaled and rounded again; and both factors rounded to 16 bit before
        delta = self.left[start:stop].double() @ self.right.double()
        factors = 2 * unit(dtype) * self._mass(start, stop)
        return 2 * half_ulp(delta, dtype) + factors

    def _mass(self, start: int, stop: int) -> Tensor:
        return self.left[start:stop].double().abs() @ self.right.double().abs()


@dataclass
class Dora(LowRank):
    """m (W + left @ right) / |W + left @ right|; `by_row` when the outputs are the rows."""

    magnitude: Tensor = None  # type: ignore[assignment]  # always given; dataclass order forces a default
    by_row: bool = True
    form: str = "closed form, DoRA"

    def __post_init__(self) -> None:
        squares: list[Tensor] = []
        total = torch.zeros(self.right.shape[1], dtype=torch.float64)
        for start in range(0, self.left.shape[0], 256):
            rows = super().target_rows(start, min(start + 256, self.left.shape[0]), torch.float64).square()
            if self.by_row:
                squares.append(rows.sum(1))
            else:
                total += rows.sum(0)
        norm = (torch.cat(squares) if self.by_row else total).sqrt()
        self.factor = self.magnitude.double().flatten() / norm

    def _factor(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        factor = self.factor.to(dtype)
        return factor[start:stop, None] if self.by_row else factor[None, :]

    def target_rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        return super().target_rows(start, stop, dtype) * self._factor(start, stop, dtype)

    def product_error(self, start: int, stop: int) -> Tensor:
        plain = LowRank.target_rows(self, start, stop, torch.float64)
        factor = self._factor(start, stop, torch.float64).abs()
        rank, inputs = self.right.shape[0], (self.right.shape[1] if self.by_row else self.left.shape[0])
        own = (rank + 2) * UNIT32 * self._mass(start, stop) + UNIT32 * plain.abs()
        # a norm over n terms errs like a random walk; the quotient and the product add two roundings
        return factor * (own + (math.sqrt(inputs) + 3) * UNIT32 * plain.abs())

    def cast_error(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        # the sum, the norm, the quotient and the product, each rounded to 16 bit
        target = self.target_rows(start, stop, torch.float64)
        return 4 * half_ulp(target, dtype) + super().cast_error(start, stop, dtype)


@dataclass
class Computed(Update):
    """What PEFT's own layer made of a copy: `target` in fp64 or fp32, `native` in the stored dtype."""

    base: Tensor
    target: Tensor
    native: Tensor | None
    """The same merge done in the stored dtype; its distance from `target` is the named allowance."""
    single: Tensor | None
    """The same merge done in fp32; its distance from `target` bounds the method's own fp32 arithmetic."""
    form: str = "PEFT's own layer"

    def target_rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        return as_matrix(self.target)[start:stop].to(dtype)

    def product_error(self, start: int, stop: int) -> Tensor:
        target = self.target_rows(start, stop, torch.float64)
        error = 2 * UNIT32 * target.abs()
        if self.single is not None:
            # another order of the same fp32 operations errs about as much again
            error = error + 4 * (as_matrix(self.single)[start:stop].double() - target).abs()
            spread = (as_matrix(self.single).double() - as_matrix(self.target).double()).abs().mean()
            error = error + 8 * spread
        return error

    def cast_error(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:  # noqa: ARG002 - fixed by `native`
        target = self.target_rows(start, stop, torch.float64)
        if self.native is None:
            return torch.zeros_like(target)
        return (as_matrix(self.native)[start:stop].double() - target).abs()


@dataclass
class Replaced(Update):
    """A tensor the adapter brings whole: a head, an embedding, a bias."""

    base: Tensor
    value: Tensor
    form: str = "stored whole in the adapter"

    def target_rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        return as_matrix(self.value)[start:stop].to(dtype)

    def product_error(self, start: int, stop: int) -> Tensor:
        return torch.zeros_like(self.target_rows(start, stop, torch.float64))

    def cast_error(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:  # noqa: ARG002 - nothing is added
        return torch.zeros_like(self.target_rows(start, stop, torch.float64))
