"""The oracle of the LoRA family, in closed form.

For plain LoRA, rsLoRA, rank and alpha patterns, biases, embeddings, 1x1-factored convolutions and DoRA on linear layers
the update is written here from the papers:

    W' = W + s B A                                   s = alpha / r, or alpha / sqrt(r) with rsLoRA
    W' = m (W + s B A) / |W + s B A|                 DoRA, norms over the input dimension

(Hu et al. 2021, arXiv 2106.09685; Kalajdzievski 2023, arXiv 2312.03732; Liu et al. 2024, arXiv 2402.09353.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from merge_adapter.verify.memory.mapped import need
from merge_adapter.verify.memory.scratch import Scratch
from merge_adapter.verify.rounding import UNIT32, half_ulp, near_half_ulp, unit
from merge_adapter.verify.weights.oracle import Points, Single, Update, magnitude

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
