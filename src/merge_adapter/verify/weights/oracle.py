"""What a merged tensor must be, computed apart from the merge: from the raw adapter file, in fp64.

The LoRA family has a closed form (`low_rank`); every other method is judged against PEFT's own layer (`computed`).

All updates work on row blocks: a tensor of any rank is seen as a matrix, its first dimension the rows, but for a stack
of matrices, such as the experts of a mixture, whose rows are those of all of them. The truth is fp64.
Because fp64 over every element is dear, an update can also say what fp32 makes of a block and how far that may lie from
the truth (`single`), and what single elements are (`points`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from merge_adapter.verify.memory.mapped import need
from merge_adapter.verify.memory.scratch import Scratch
from merge_adapter.verify.rounding import UNIT32, half_ulp


def as_matrix(tensor: Tensor) -> Tensor:
    """A view (rows, rest); a vector becomes (n, 1)."""
    need(tensor)
    return tensor.reshape(tensor.shape[0] if tensor.ndim else 1, -1)


@dataclass(frozen=True)
class Single:
    """A row block in fp32, each (rows, rest); the tensors lie in the scratch they were made in."""

    base: Tensor
    delta: Tensor
    """Target less base."""
    target: Tensor
    bound: float
    """No element of `target` lies further than this from the exact value. Rigorous, not an estimate."""
    largest: float
    """Largest magnitude in `target`."""


@dataclass(frozen=True)
class Points:
    """Chosen elements of an update, each field (n,) in fp64."""

    base: Tensor
    target: Tensor
    product_error: Tensor
    cast_error: Tensor


def magnitude(block: Tensor) -> float:
    """The largest absolute value; NaN when there is one."""
    if not block.numel():
        return 0.0
    low, high = torch.aminmax(block)
    return max(abs(float(low)), abs(float(high))) if low == low else math.nan


class Update(ABC):
    """A tensor the adapter changes: `target` is what it must become before rounding."""

    base: Tensor
    """The base's tensor as stored, shape of the merged one."""
    form: str
    """closed form, or which of PEFT's layers served as the oracle."""
    loaded: torch.dtype | None = None
    """What the base was rounded to before it was changed; None: it was as stored."""

    @property
    def shape(self) -> torch.Size:
        """Shape of the tensor."""
        return self.base.shape

    @property
    def rows(self) -> int:
        """Rows of the tensor as a matrix."""
        return self.shape[0] if self.shape else 1

    @property
    def width(self) -> int:
        """Elements of a row."""
        return math.prod(self.shape) // max(1, self.rows)

    def matrix(self, tensor: Tensor) -> Tensor:
        """A tensor of this shape, or some of its first dimension, as a matrix: a view, (rows, width)."""
        return as_matrix(tensor)

    def base_at(self, at: slice | tuple[Tensor, Tensor]) -> Tensor:
        """Rows, or chosen elements, of the base's matrix as the merge had it."""
        stored = self.matrix(self.base)[at]
        return stored if self.loaded is None else stored.to(self.loaded)

    def base_rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Rows [start, stop) of the base, (rows, width)."""
        return self.base_at(slice(start, stop)).to(dtype)

    @property
    def terms(self) -> int:
        """Products that a single element takes."""
        return 1

    def forget(self) -> None:
        """Let go of what was computed once for all rows; it is computed again when they are asked for again."""
        for name in ("_norms", "_turned"):
            self.__dict__.pop(name, None)

    @abstractmethod
    def target_rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Rows [start, stop) of the merged tensor before rounding, (rows, rest)."""

    @abstractmethod
    def product_error(self, start: int, stop: int) -> Tensor:
        """Bound on the error that fp32 arithmetic itself may add to those rows, fp64."""

    @abstractmethod
    def cast_error(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """The named allowance: what more a merge may err that casts the update to 16 bit before it adds."""

    def loose_rows(self, start: int, stop: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Those rows before rounding, and how far each element of a merge in `dtype` may lie from them."""
        target = self.target_rows(start, stop, torch.float64)
        error = self.product_error(start, stop) + self.cast_error(start, stop, dtype)
        return target, half_ulp(target, dtype) + error

    @abstractmethod
    def exact(self, rows: Tensor, columns: Tensor) -> Tensor:
        """The elements at (rows, columns) of the matrix before rounding, (n,) fp64."""

    @abstractmethod
    def points(self, rows: Tensor, columns: Tensor, dtype: torch.dtype) -> Points:
        """The same elements, with the figures that the blocks give there."""

    def single(self, start: int, stop: int, scratch: Scratch) -> Single:
        """Rows [start, stop) in fp32 with a bound on their error. The next call with `scratch` overwrites them."""
        shape = torch.Size((stop - start, self.width))
        base = scratch.floats("base", shape).copy_(self.base_at(slice(start, stop)))
        target = scratch.floats("target", shape).copy_(self.target_rows(start, stop, torch.float64))
        delta = torch.sub(target, base, out=scratch.floats("delta", shape))
        largest = magnitude(target)
        return Single(base, delta, target, UNIT32 * largest, largest)


@dataclass
class Replaced(Update):
    """A tensor the adapter brings whole: a head, an embedding, a bias."""

    base: Tensor
    value: Tensor
    form: str = "stored whole in the adapter"

    def target_rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        return self.matrix(self.value)[start:stop].to(dtype)

    def product_error(self, start: int, stop: int) -> Tensor:
        return torch.zeros_like(self.target_rows(start, stop, torch.float64))

    def cast_error(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:  # noqa: ARG002 - nothing is added
        return torch.zeros_like(self.target_rows(start, stop, torch.float64))

    def exact(self, rows: Tensor, columns: Tensor) -> Tensor:
        return self.matrix(self.value)[rows, columns].double()

    def points(self, rows: Tensor, columns: Tensor, dtype: torch.dtype) -> Points:  # noqa: ARG002 - nothing is added
        base, target = (self.matrix(each)[rows, columns].double() for each in (self.base, self.value))
        return Points(base, target, torch.zeros_like(target), torch.zeros_like(target))
