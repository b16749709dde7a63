"""The oracle of every other method: PEFT's own layer, merged on a copy of that one module in fp64, or in fp32."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from merge_adapter.verify.rounding import UNIT32
from merge_adapter.verify.weights.oracle import Points, Update


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
