"""The factors of combined adapters, computed module by module with PEFT's own functions.

Types that combine factors work in float32 on A and on B, as PEFT does; their results are PEFT's bit for bit. Types
that end in an SVD work on whole updates in float64, where PEFT works in float32: pruning and sign election compare
values, and must not hang on the order of a sum.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from threading import Lock
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

import torch

from merge_adapter.methods.change import TensorSpec
from merge_adapter.methods.combinations.combined import OpenedTogether
from merge_adapter.types import Combination, CombinationType

if TYPE_CHECKING:
    from torch import Tensor

    from merge_adapter.methods.combinations.low_rank import CombinedFile, CombinedModule

_DRAWING = Lock()
"""PEFT draws from torch's one generator; modules combined at once would share its numbers."""


class Mixture(Protocol):
    """One of PEFT's functions: tensors of one shape and a weight for each -> one tensor."""

    def __call__(self, tensors: list[Tensor], weights: Tensor, /) -> Tensor: ...


class CombinedWeights(OpenedTogether):
    """The tensors of a CombinedFile. The partner of a factor is kept until it is read too."""

    def __init__(self, file: CombinedFile) -> None:
        super().__init__(file.files)
        self._file = file
        self._homes = {spec.name: module for module in file.modules for spec in (module.a, module.b)}
        self._waiting: dict[str, Tensor] = {}
        self._lock = Lock()

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        return self._file.specs

    def read(self, name: str) -> Tensor:
        with self._lock:
            if name not in self._waiting:
                module = self._homes[name]
                self._waiting |= zip((module.a.name, module.b.name), self._combine(module), strict=True)
            return self._waiting.pop(name)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._waiting.clear()
        super().__exit__(kind, error, trace)

    def _combine(self, module: CombinedModule) -> tuple[Tensor, Tensor]:
        """The module's two factors in float32, of the shapes that its specs say."""
        downs, ups = [], []
        for part in module.parts:
            stored = self._stored[part.number]
            downs.append(stored.read(part.a.name).float().flatten(1))  # [r, in]
            ups.append(stored.read(part.b.name).float().flatten(1))  # [out, r]
        a, b = combine_factors(
            downs,
            ups,
            [part.weight for part in module.parts],
            [part.scale for part in module.parts],
            self._file.combination,
            module,
        )
        rank = module.a.shape[0]
        wide = torch.zeros(rank, a.shape[1])
        tall = torch.zeros(b.shape[0], rank)
        wide[: a.shape[0]], tall[:, : b.shape[1]] = (
            a,
            b,
        )  # a module of fewer adapters needs less than the whole
        return wide.reshape(module.a.shape), tall.reshape(module.b.shape)


def combine_factors(
    downs: list[Tensor],
    ups: list[Tensor],
    weights: Sequence[float],
    scales: Sequence[float],
    combination: Combination,
    module: CombinedModule,
) -> tuple[Tensor, Tensor]:
    """A `[r, in]` and B `[out, r]` of one module, whose product is the combined update; each at most of its rank."""
    kind = combination.type
    if kind is CombinationType.CAT:
        scaled = [down * weight * scale for down, weight, scale in zip(downs, weights, scales, strict=True)]
        return torch.cat(scaled), torch.cat(ups, 1)
    factors = [weight * scale for weight, scale in zip(weights, scales, strict=True)]
    if kind is CombinationType.SVD:
        single = torch.tensor(weights).tolist()  # PEFT holds weights in float32
        factors = [weight * scale for weight, scale in zip(single, scales, strict=True)]
        return _low_rank_svd(downs, ups, factors, module.a.shape[0])
    mix = _mixture(combination)
    if kind.endswith("svd"):
        deltas = [
            (up.double() @ down.double()) for up, down in zip(ups, downs, strict=True)
        ]  # each [out, in]
        if module.transposed:  # random pruning draws in the order of memory
            deltas = [delta.T for delta in deltas]
        deltas = [delta * scale for delta, scale in zip(deltas, scales, strict=True)]
        with _seeded(combination.seed_of(module.path)):
            mixed = mix(deltas, torch.tensor(weights, dtype=torch.float32))
        u, values, v = torch.linalg.svd(mixed.T if module.transposed else mixed, full_matrices=False)
        return _truncated(u, values, v, module.a.shape[0])
    roots = [math.sqrt(abs(factor)) for factor in factors]
    signed = [root if factor >= 0 else -root for root, factor in zip(roots, factors, strict=True)]
    with _seeded(combination.seed_of(module.path)):
        return mix(downs, torch.tensor(signed)), mix(ups, torch.tensor(roots))


def _mixture(combination: Combination) -> Mixture:
    """PEFT's function for the type, without its ending `_svd`."""
    from peft.utils import merge_utils

    density, majority = combination.density, combination.majority_sign.value
    found: dict[str, Mixture] = {
        "linear": merge_utils.task_arithmetic,
        "ties": partial(merge_utils.ties, density=density, majority_sign_method=majority),
        "dare_linear": partial(merge_utils.dare_linear, density=density),
        "dare_ties": partial(merge_utils.dare_ties, density=density, majority_sign_method=majority),
        "magnitude_prune": partial(merge_utils.magnitude_prune, density=density),
    }
    return found[combination.type.value.removesuffix("_svd")]


def _low_rank_svd(
    downs: list[Tensor], ups: list[Tensor], factors: Sequence[float], rank: int
) -> tuple[Tensor, Tensor]:
    """The SVD of sum(f B A), without making that sum: it has no more rank than the factors side by side."""
    left, left_core = torch.linalg.qr(torch.cat(ups, 1).double())
    scaled = torch.cat([down.double() * factor for down, factor in zip(downs, factors, strict=True)])
    right, right_core = torch.linalg.qr(scaled.T)
    u, values, v = torch.linalg.svd(left_core @ right_core.T, full_matrices=False)
    return _truncated(left @ u, values, v @ right.T, rank)


def _truncated(u: Tensor, values: Tensor, v: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The part of the largest `rank` singular values, as A and B."""
    return v[:rank].float(), (u[:, :rank] * values[:rank]).float()


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """PEFT's draws from a seed of their own; its remark that a density of 1 prunes nothing is dropped."""
    with _DRAWING, torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        torch.default_generator.manual_seed(seed)
        yield
