"""What a merged tensor must be, computed apart from the merge: from the raw adapter file, in fp64.

For the LoRA family (plain, rsLoRA, rank and alpha patterns, biases, embeddings, 1x1-factored convolutions, DoRA
on linear layers) the update has a closed form, written here from the papers:

    W' = W + s B A                                   s = alpha / r, or alpha / sqrt(r) with rsLoRA
    W' = m (W + s B A) / |W + s B A|                 DoRA, norms over the input dimension

(Hu et al. 2021, arXiv 2106.09685; Kalajdzievski 2023, arXiv 2312.03732; Liu et al. 2024, arXiv 2402.09353.)
Every other method is judged against PEFT's own layer, merged on a copy of that one module in fp64, or in fp32
where it refuses fp64.

All updates work on row blocks: a tensor of any rank is seen as a matrix, its first dimension the rows, but for a stack
of matrices, such as the experts of a mixture, whose rows are those of all of them. The truth is fp64.
Because fp64 over every element is dear, an update can also say what fp32 makes of a block and how far that may lie from
the truth (`single`), and what single elements are (`points`).
"""

from __future__ import annotations

import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from merge_adapter.verify.mapped import need
from merge_adapter.verify.rounding import UNIT32, half_ulp, near_half_ulp, unit
from merge_adapter.verify.scratch import Scratch


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


RUN = 32
"""Ranks multiplied at a time in fp32: sums of short runs err less than one long sum may."""


def multiplied(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """`left` (n, r) times `right` (r, m); in fp32, of many ranks, run by run."""
    rank = left.shape[1]
    if left.dtype != torch.float32 or rank <= 2 * RUN:
        return torch.mm(left, right, out=out)
    made = torch.mm(left[:, :RUN], right[:RUN], out=out)
    for start in range(RUN, rank, RUN):
        made += left[:, start : start + RUN] @ right[start : start + RUN]
    return made


def roundings(rank: int) -> int:
    """How many roundings a product may pass through on its way into an element of `multiplied`, its own included."""
    return rank if rank <= 2 * RUN else RUN + math.ceil(rank / RUN)


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
class LowRank(Update):
    """W + left scales right, with left (rows, r), right (r, rest) and a scale for each of the r.

    The factors stay in the dtype and the place they came in; what is wider is made for the rows that are asked for.
    """

    base: Tensor
    left: Tensor
    right: Tensor
    form: str = "closed form, W + s B A"
    ranks: tuple[int, ...] = ()
    """Where several adapters add up: how many of the r columns of `left` are each one's, in their order."""
    scales: Tensor | None = None
    """(r,) fp64; None: `left` carries them already."""
    loaded: torch.dtype | None = None

    def on_rounded_base(self, dtype: torch.dtype) -> Self:
        """The same update on the base rounded to `dtype`: what is merged into a base that was loaded in it."""
        return replace(self, loaded=dtype)

    def left_rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Rows [start, stop) of `left` times the scales, (rows, r)."""
        return self._scaled(self.left[start:stop]).to(dtype)

    def part(self, at: int) -> LowRank:
        """What adapter number `at` of several adds: the same tensor with its columns of the factors alone."""
        own = slice(sum(self.ranks[:at]), sum(self.ranks[: at + 1]))
        scales = None if self.scales is None else self.scales[own]
        return replace(
            self,
            left=self.left[:, own],
            right=self.right[..., own, :],
            scales=scales,
            ranks=(self.ranks[at],),
        )

    def delta_rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Rows [start, stop) of what is added, (rows, rest)."""
        return self._product(self.left_rows(start, stop, dtype), start)

    def target_rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        return self.base_rows(start, stop, dtype) + LowRank.delta_rows(self, start, stop, dtype)

    def product_error(self, start: int, stop: int) -> Tensor:
        return self._product_error(
            self._mass(start, stop), LowRank.target_rows(self, start, stop, torch.float64)
        )

    def cast_error(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        delta = LowRank.delta_rows(self, start, stop, torch.float64)
        return self._cast_error(self._mass(start, stop), delta, dtype)

    def loose_rows(self, start: int, stop: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        # what is permitted need not be known to more digits than fp32 has
        left = self.left_rows(start, stop, torch.float32)
        delta = self._product(left, start)
        mass = self._product(left.abs(), start, size=True)
        if dtype in (torch.bfloat16, torch.float16):
            target = self.base_rows(start, stop, torch.float32).add_(delta)
        else:
            target = LowRank.target_rows(self, start, stop, torch.float64)
        tolerance = near_half_ulp(target.float(), dtype).add_(near_half_ulp(delta, dtype), alpha=2)
        steps = (self.terms + 2) * UNIT32 + 2 * unit(dtype)
        return target, tolerance.add_(mass, alpha=steps).add_(target.float().abs(), alpha=UNIT32)

    def exact(self, rows: Tensor, columns: Tensor) -> Tensor:
        left, right = self._at(rows, columns)
        base = self.base_at((rows, columns)).double()
        return base + torch.einsum("nr,nr->n", left, right)

    def points(self, rows: Tensor, columns: Tensor, dtype: torch.dtype) -> Points:
        mass, delta = self._products(rows, columns)
        base = self.base_at((rows, columns)).double()
        target = base + delta
        return Points(base, target, self._product_error(mass, target), self._cast_error(mass, delta, dtype))

    def single(self, start: int, stop: int, scratch: Scratch) -> Single:
        shape = torch.Size((stop - start, self.width))
        base = scratch.floats("base", shape).copy_(self.base_at(slice(start, stop)))
        left = self.left_rows(start, stop, torch.float32)
        delta = self._product(left, start, out=scratch.floats("delta", shape))
        target = torch.add(base, delta, out=scratch.floats("target", shape))
        largest = magnitude(target)
        # both factors are rounded to fp32, their products and sums so many times: gamma_n of Higham, Accuracy and
        # Stability of Numerical Algorithms, 3.1; the mass of an element is at most the product of norms
        steps = (roundings(self.terms) + 2) * UNIT32
        rows, columns = self._norms
        product = steps / (1 - steps) * float(rows[start:stop].max()) * columns
        return Single(base, delta, target, product + UNIT32 * largest, largest)

    @property
    def terms(self) -> int:
        return self.left.shape[1]

    def _product(
        self,
        left: Tensor,
        start: int,  # noqa: ARG002 - the same for all rows
        *,
        size: bool = False,
        out: Tensor | None = None,
    ) -> Tensor:
        """Rows of a left factor, from `start` on, times what of `right` belongs to them; `size`: its magnitudes."""
        right = self.right.to(left.dtype)
        return multiplied(left, right.abs() if size else right, out)

    def _product_error(self, mass: Tensor, target: Tensor) -> Tensor:
        # r products and r - 1 sums, one for the scale, each off by one unit of fp32; then the sum with W
        return (self.terms + 2) * UNIT32 * mass + UNIT32 * target.abs()

    def _cast_error(self, mass: Tensor, delta: Tensor, dtype: torch.dtype) -> Tensor:
        # a product rounded to 16 bit, scaled and rounded again; and both factors rounded to 16 bit before
        return 2 * half_ulp(delta, dtype) + 2 * unit(dtype) * mass

    def _mass(self, start: int, stop: int) -> Tensor:
        return self._product(self.left_rows(start, stop, torch.float64).abs(), start, size=True)

    def _scaled(self, rows: Tensor) -> Tensor:
        return rows.double() if self.scales is None else rows.double() * self.scales

    def _products(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """The mass and the update at chosen elements, (n,) each."""
        left, right = self._at(rows, columns)
        products = left * right
        return products.abs().sum(1), products.sum(1)

    def _at(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """What chosen elements are products of, (n, r) each, fp64."""
        return self._scaled(self.left[rows]), self._columns(rows, columns).double()

    def _columns(self, rows: Tensor, columns: Tensor) -> Tensor:  # noqa: ARG002 - the same for all rows
        """The columns of `right` that chosen elements are made with, (n, r)."""
        return self._turned[columns]

    @cached_property
    def _turned(self) -> Tensor:
        """`right` column by column, (columns, r) or (matrices, columns, r): single columns are read many times."""
        return self.right.transpose(-1, -2).contiguous()

    @cached_property
    def _norms(self) -> tuple[Tensor, float]:
        """The norm of each row of `left`, and the largest norm of a column of `right`."""
        return self._scaled(self.left).norm(dim=1), float(self.right.double().norm(dim=-2).max())


@dataclass
class LowRankStack(LowRank):
    """A stack of matrices, each with factors of its own: left (matrices * rows, r), right (matrices, r, columns)."""

    @property
    def rows(self) -> int:
        return self.left.shape[0]

    def matrix(self, tensor: Tensor) -> Tensor:
        need(tensor)
        return tensor.flatten(0, -2)

    def _product(self, left: Tensor, start: int, *, size: bool = False, out: Tensor | None = None) -> Tensor:
        made = left.new_empty(left.shape[0], self.width) if out is None else out
        each = self.shape[1]
        stop = start + left.shape[0]
        for at in range(start // each, -(-stop // each)):
            rows = slice(max(at * each, start) - start, min((at + 1) * each, stop) - start)
            right = self.right[at].to(left.dtype)
            multiplied(left[rows], right.abs() if size else right, made[rows])
        return made

    def _columns(self, rows: Tensor, columns: Tensor) -> Tensor:
        return self._turned[rows // self.shape[1], columns]


NORMED = 1 << 17
"""Elements of the rows whose norms are taken at a time."""


@dataclass
class Dora(LowRank):
    """m (W + left @ right) / |W + left @ right|; `by_row` when the outputs are the rows."""

    magnitude: Tensor = None  # type: ignore[assignment]  # always given; dataclass order forces a default
    by_row: bool = True
    form: str = "closed form, DoRA"

    @cached_property
    def factor(self) -> Tensor:
        """The magnitude over the norm of each row, or column, of W + D, fp64."""
        return self.magnitude.double().flatten() / self._squares().sqrt()

    def _squares(self) -> Tensor:
        """|W + D|^2 of each row, or column, as |W|^2 + 2 <W, D> + |D|^2: D itself need not be made for it."""
        right = self.right.double()
        rank, columns = right.shape
        found: list[Tensor] = []
        squares, cross = right.new_zeros(columns), right.new_zeros(rank, columns)
        gram = right @ right.T if self.by_row else right.new_zeros(rank, rank)
        step = max(1, NORMED // columns)
        for start in range(0, self.rows, step):
            stop = min(start + step, self.rows)
            base, left = (rows(start, stop, torch.float64) for rows in (self.base_rows, self.left_rows))
            if self.by_row:
                found.append(base.square().sum(1) + ((2 * base @ right.T + left @ gram) * left).sum(1))
            else:
                squares += base.square().sum(0)
                cross += left.T @ base
                gram += left.T @ left
        return torch.cat(found) if self.by_row else squares + ((2 * cross + gram @ right) * right).sum(0)

    def _factor(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        factor = self.factor.to(dtype)
        return factor[start:stop, None] if self.by_row else factor[None, :]

    def target_rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        return super().target_rows(start, stop, dtype) * self._factor(start, stop, dtype)

    def product_error(self, start: int, stop: int) -> Tensor:
        plain = LowRank.target_rows(self, start, stop, torch.float64)
        factor = self._factor(start, stop, torch.float64)
        return self._normed_error(self._mass(start, stop), plain, factor)

    def cast_error(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        # the sum, the norm, the quotient and the product, each rounded to 16 bit
        target = self.target_rows(start, stop, torch.float64)
        return 4 * half_ulp(target, dtype) + super().cast_error(start, stop, dtype)

    def loose_rows(self, start: int, stop: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return Update.loose_rows(self, start, stop, dtype)

    def exact(self, rows: Tensor, columns: Tensor) -> Tensor:
        return super().exact(rows, columns) * self.factor[rows if self.by_row else columns]

    def points(self, rows: Tensor, columns: Tensor, dtype: torch.dtype) -> Points:
        mass, delta = self._products(rows, columns)
        base = self.base_at((rows, columns)).double()
        factor = self.factor[rows if self.by_row else columns]
        target = (base + delta) * factor
        cast = 4 * half_ulp(target, dtype) + self._cast_error(mass, delta, dtype)
        return Points(base, target, self._normed_error(mass, base + delta, factor), cast)

    def single(self, start: int, stop: int, scratch: Scratch) -> Single:
        plain = super().single(start, stop, scratch)
        factor = self._factor(start, stop, torch.float32)
        scale = magnitude(factor)
        target = plain.target.mul_(factor)
        delta = torch.sub(target, plain.base, out=plain.delta)
        largest = magnitude(target)
        # the factor is rounded to fp32, and its product with the sum is
        bound = (scale * plain.bound + 2 * UNIT32 * scale * plain.largest) * (1 + 4 * UNIT32)
        return Single(plain.base, delta, target, bound, largest)

    def _normed_error(self, mass: Tensor, plain: Tensor, factor: Tensor) -> Tensor:
        inputs = self.right.shape[1] if self.by_row else self.left.shape[0]
        own = self._product_error(mass, plain)
        # a norm over n terms errs like a random walk; the quotient and the product add two roundings
        return factor.abs() * (own + (math.sqrt(inputs) + 3) * UNIT32 * plain.abs())


@dataclass(frozen=True)
class Merges:
    """One tensor as PEFT's own layer merges it."""

    target: Tensor
    """In fp64, or in fp32 where the method refuses that."""
    native: Tensor | None
    """The same merge done in the stored dtype; its distance from `target` is the named allowance."""
    single: Tensor | None
    """The same merge done in fp32; its distance from `target` bounds the method's own fp32 arithmetic."""


_making = threading.Lock()
"""Merges are made one at a time: each takes several times its module's size."""


@dataclass
class Computed(Update):
    """What PEFT's own layer makes of copies: seven times a 16-bit tensor, so made when asked for, then forgotten."""

    base: Tensor
    make: Callable[[torch.dtype | None], Merges]
    """Given what the base is to be rounded to before; None leaves it as it is stored."""
    form: str = "PEFT's own layer"
    loaded: torch.dtype | None = None
    _made: Merges | None = field(default=None, init=False, repr=False)

    def on_rounded_base(self, dtype: torch.dtype) -> Self:
        """What PEFT's layer makes of the base rounded to `dtype`."""
        return replace(self, loaded=dtype)

    @property
    def merges(self) -> Merges:
        """The tensor in all dtypes, held until `forget`."""
        with _making:
            made = self._made if self._made is not None else self.make(self.loaded)
            self._made = made
            return made

    def forget(self) -> None:
        super().forget()
        self._made = None

    def target_rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        return self.matrix(self.merges.target)[start:stop].to(dtype)

    def product_error(self, start: int, stop: int) -> Tensor:
        single = self.merges.single
        target = self.target_rows(start, stop, torch.float64)
        return self._product_error(
            target, None if single is None else self.matrix(single)[start:stop].double()
        )

    def cast_error(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:  # noqa: ARG002 - fixed by `native`
        native = self.merges.native
        target = self.target_rows(start, stop, torch.float64)
        if native is None:
            return torch.zeros_like(target)
        return (self.matrix(native)[start:stop].double() - target).abs()

    def exact(self, rows: Tensor, columns: Tensor) -> Tensor:
        return self.matrix(self.merges.target)[rows, columns].double()

    def points(self, rows: Tensor, columns: Tensor, dtype: torch.dtype) -> Points:  # noqa: ARG002
        made = self.merges
        base, target = (
            self.base_at((rows, columns)).double(),
            self.matrix(made.target)[rows, columns].double(),
        )
        single, native = (
            None if each is None else self.matrix(each)[rows, columns].double()
            for each in (made.single, made.native)
        )
        cast = torch.zeros_like(target) if native is None else (native - target).abs()
        return Points(base, target, self._product_error(target, single), cast)

    def _product_error(self, target: Tensor, single: Tensor | None) -> Tensor:
        error = 2 * UNIT32 * target.abs()
        # another order of the same fp32 operations errs about as much again
        return error if single is None else error + 4 * (single - target).abs() + 8 * self._spread

    @cached_property
    def _spread(self) -> float:
        """The mean distance of the fp32 merge from the exact one over the whole tensor."""
        made = self.merges
        assert made.single is not None
        left, right = self.matrix(made.single), self.matrix(made.target)
        step = max(1, (1 << 17) // max(1, left.shape[1]))
        total = 0.0
        for start in range(0, left.shape[0], step):
            one, two = left[start : start + step].double(), right[start : start + step].double()
            total += float((one - two).abs().sum())
        return total / max(1, left.numel())


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
