"""The merged model as it should be, or should not be, put in the place of a base's weights without being written."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor, nn

from merge_adapter.verify.memory.lazy import PIECE, Fill, lazy_content, set_tensor, widen
from merge_adapter.verify.memory.mapped import is_paged
from merge_adapter.verify.rounding import is_narrower, rounded
from merge_adapter.verify.weights.expectations import Expectations
from merge_adapter.verify.weights.judging import Agreement, Ties, blocks_of
from merge_adapter.verify.weights.mutants import Mutant, faulty_rows
from merge_adapter.verify.weights.oracle import Replaced, Update, as_matrix
from merge_adapter.verify.weights.tensors import WeightsPart

Rounding = Callable[[Update, str, int, int, torch.dtype], Tensor]
"""Rows [start, stop) of an update as a merge in that dtype may hold them."""

DRAWN = 1 << 22
"""Random numbers drawn once for O+. Each block of weights takes a run of them that begins elsewhere."""


@dataclass(frozen=True)
class Known:
    """The once-rounded oracle of one tensor, as the weights part has found it: the merged tensor, but for ties."""

    merged: Tensor
    ties: Ties | None


def known_oracle(part: WeightsPart, held: Mapping[str, Tensor]) -> dict[str, Known]:
    """What `part` tells of the once-rounded oracle, given the merged tensors `held` that it judged.

    Nothing where weights come and go: the merged ones would have to come once more.
    """
    if is_paged():
        return {}
    return {
        entry.name: Known(held[entry.name], entry.ties)
        for entry in part.tensors
        if entry.agreement is Agreement.EXACT
        or (entry.agreement is Agreement.ROUNDED and entry.ties is not None)
    }


def place_oracle(
    plain: nn.Module,
    expected: Expectations,
    storage: Mapping[str, torch.dtype],
    device: torch.device,
    how: Rounding,
    known: Mapping[str, Known],
) -> None:
    """Make `plain` the merged model that `expected` describes, each update put through `how`.

    `known`: what `how` would make of some of them, bit for bit, and cheaper to read.
    """
    for name, update in expected.updates.items():
        if name in known:
            tensor = lazy_content(update.shape, device, _known_rows(known[name]), known[name].merged)
        else:
            tensor = lazy_content(update.shape, device, _rows(update, name, storage[name], how), update.base)
        set_tensor(plain, name, tensor)
    # named one by one: tensors tied in the base part when the adapter changes only one of them
    for name, tensor in expected.plain.items():
        set_tensor(plain, name, _kept(name, tensor, storage[name], device, known))
    widen(plain, device)


def _kept(
    name: str, tensor: Tensor, dtype: torch.dtype, device: torch.device, known: Mapping[str, Known]
) -> Tensor:
    """A tensor that the adapter leaves alone, rounded where the merged model is stored in a narrower dtype."""
    if not (tensor.is_floating_point() and is_narrower(dtype, tensor.dtype)):
        return tensor
    if name in known:
        return known[name].merged

    def fill(start: int, stop: int, out: Tensor) -> None:
        out.copy_(as_matrix(tensor)[start:stop].to(dtype))

    return lazy_content(tensor.shape, device, fill, tensor)


def _known_rows(known: Known) -> Fill:
    matrix = as_matrix(known.merged)
    width = matrix.shape[1]

    def fill(start: int, stop: int, out: Tensor) -> None:
        out.copy_(matrix[start:stop])
        if known.ties is not None:
            ends = torch.tensor([start * width, stop * width])
            low, high = torch.searchsorted(known.ties.positions, ends).tolist()
            places = known.ties.positions[low:high] - start * width
            out.view(-1)[places] = known.ties.values[low:high].float()

    return fill


def _rows(update: Update, name: str, storage: torch.dtype, how: Rounding) -> Fill:
    """Makes rows of the merged tensor block by block, so that nothing of its size exists in fp64."""

    each = update.rows // max(1, update.shape[0] if update.shape else 1)

    def fill(start: int, stop: int, out: Tensor) -> None:
        start, stop, out = start * each, stop * each, out.view(-1, update.width)
        # always the same blocks, whichever rows are asked for: what is random in them must not depend on that
        for first, last in blocks_of(update, PIECE):
            low, high = max(first, start), min(last, stop)
            if low < high:
                rows = how(update, name, first, last, storage)
                out[low - start : high - start] = rows[low - first : high - first]

    return fill


def once_rounded(update: Update, name: str, start: int, stop: int, dtype: torch.dtype) -> Tensor:  # noqa: ARG001
    """O: rows of the oracle rounded once."""
    work = torch.float64 if dtype == torch.float32 else torch.float32
    return rounded(update.target_rows(start, stop, work), dtype)


def dithered(seed: int) -> Rounding:
    """O+: every element off by a random part of its tolerance, then rounded. The same at every read."""

    def how(update: Update, name: str, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        if isinstance(update, Replaced):
            return once_rounded(update, name, start, stop, dtype)
        target, tolerance = update.loose_rows(start, stop, dtype)
        drawn = _drawn(seed)
        first = zlib.crc32(f"{name}:{start}".encode()) % DRAWN
        shift = drawn[first : first + target.numel()]
        if len(shift) < target.numel():
            shift = drawn.repeat(target.numel() // DRAWN + 2)[first : first + target.numel()]
        return rounded(target + shift.view(target.shape) * tolerance, dtype)

    return how


@cache
def _drawn(seed: int) -> Tensor:
    """(DRAWN,) fp32, uniform over [-1, 1)."""
    return torch.rand(DRAWN, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def mutated(seed: int, mutant: Mutant) -> Rounding:
    """A fault in every update."""

    def how(update: Update, name: str, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        if isinstance(update, Replaced):
            return once_rounded(update, name, start, stop, dtype)
        return faulty_rows(mutant, update, start, stop, dtype, seed)

    return how


def dropped(expected: Expectations) -> Rounding:
    """The once-rounded oracle, but for the block in the middle of the model, which stays the base's."""
    blocks_of = [match.group(0) for name in expected.updates if (match := re.search(r"\.\d+\.", name))]
    return partial(_without, blocks_of[len(blocks_of) // 2] if blocks_of else "")


def _without(chosen: str, update: Update, name: str, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    if chosen in name and not isinstance(update, Replaced):
        return update.base_rows(start, stop, torch.float32).to(dtype)
    return once_rounded(update, name, start, stop, dtype)
