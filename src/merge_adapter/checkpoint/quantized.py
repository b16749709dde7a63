"""Bases stored quantised, shown as the 16-bit tensors that they stand for.

Dequantised are formats whose values are a table, an integer or a float times a scale: bitsandbytes 4 bit (NF4, FP4,
nested scales) and 8 bit, FP8 with block, row or tensor scales, compressed-tensors (float, int and packed int, with
or without zero points), and MXFP4 experts. GPTQ, AWQ and their like pack by rules of their kernels and are refused.
Recipes read rows, so that a dequantised base streams like any other. Which of them a base uses is decided
by its config and by the tensors that lie there; a tensor of codes that no recipe takes is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from merge_adapter.checkpoint.header import Header, StoredTensor
from merge_adapter.checkpoint.layout import Layout, WeightFile
from merge_adapter.checkpoint.quantization import quantization_of, refusal, used_method
from merge_adapter.checkpoint.quantized_formats import ORIGINAL, recipes_of
from merge_adapter.checkpoint.recipes import Recipe
from merge_adapter.errors import BaseModelError
from merge_adapter.methods.change import TensorSpec, Weights
from merge_adapter.types import BaseModel

if TYPE_CHECKING:
    from torch import Tensor

    from merge_adapter.checkpoint.reader import StoredWeights

_LEFTOVERS = frozenset(
    f"{what}_{part}"
    for what in ("input", "output", "activation", "q", "k", "v")
    for part in ("scale", "zero_point", "global_scale", "scale_ub")
) | {"weight_format"}
"""Tensors beside a quantised weight that say how to run it, and nothing about its values."""
_DTYPES: Mapping[str, str] = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_CODES = ("weight", "_packed", "_blocks", "_proj")
"""How the names of tensors of codes end."""


@dataclass(frozen=True)
class Dequantized:
    """How a quantised checkpoint reads as a plain one."""

    layout: Layout
    """The files with the tensors they stand for; those that hold recipes cannot be copied."""
    stored: Layout = field(repr=False)
    recipes: Mapping[str, Recipe] = field(repr=False)
    """Dequantised tensor -> how it is made."""
    dtype: str

    def open(self, base: BaseModel) -> DequantizedWeights:
        """The weights of `base`, dequantised as they are read."""
        from merge_adapter.checkpoint.reader import StoredWeights  # imports torch

        return DequantizedWeights(self, StoredWeights(base.repository, self.stored))


class DequantizedWeights(Weights):
    """Dequantised tensors under plain names, the others as they are. Thread-safe as the files below are."""

    def __init__(self, plan: Dequantized, stored: StoredWeights) -> None:
        self._plan = plan
        self._stored = stored

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        return self._plan.layout.specs

    @property
    def bytes_read(self) -> int:
        """Bytes of stored data read so far."""
        return self._stored.bytes_read

    def read(self, name: str) -> Tensor:
        if name not in self._plan.recipes:
            return self._stored.read(name)
        return self.read_rows(name, 0, self.specs[name].shape[0])

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        recipe = self._plan.recipes.get(name)
        if recipe is None:
            return self._stored.read_rows(name, start, stop)
        from merge_adapter.checkpoint.dtypes import torch_dtype

        return recipe.rows(self._stored, start, stop).to(torch_dtype(self._plan.dtype)).contiguous()

    def close(self) -> None:
        """Close every file."""
        self._stored.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def dequantized(base: BaseModel, stored: Layout) -> Dequantized:
    """Plan how to read a quantised base. Reads headers, and of each 4-bit tensor the few bytes that tell its shape.

    Raises BaseModelError for a method, or a use of it, that has no recipe here, and MalformedError for a
    quantisation state that cannot be read.
    """
    config = quantization_of(base.config)
    if config is None:
        raise BaseModelError("The base's quantization_config is not an object.", hint=ORIGINAL)
    reason = refusal(config)
    if reason:
        raise BaseModelError(f"The base cannot be dequantised: {reason}.", hint=ORIGINAL)
    found = recipes_of(base, config, stored)
    if not found:
        raise BaseModelError(
            f"The base's config says {used_method(config)}, but none of its tensors is stored so.",
            hint=ORIGINAL,
        )
    _check_nothing_left(stored.specs, found)
    dtype = _dtype(base.config)
    return Dequantized(_plain_layout(stored, found, dtype), stored, found, dtype)


def _dtype(config: Mapping[str, Any]) -> str:
    """What the model computes in, to which transformers dequantises too; bf16 where the config does not say."""
    for part in (config, config.get("text_config")):
        if isinstance(part, Mapping):
            named = part.get("dtype") or part.get("torch_dtype")
            if str(named) in _DTYPES:
                return _DTYPES[str(named)]
    return "BF16"


def _check_nothing_left(specs: Mapping[str, TensorSpec], found: Mapping[str, Recipe]) -> None:
    """Codes without a recipe would be copied as if they were weights."""
    used = {name for recipe in found.values() for name in recipe.uses}
    for name, spec in specs.items():
        if name in used:
            continue
        if spec.dtype.startswith("F8"):
            raise BaseModelError(f"{name} is stored in FP8 without a scale beside it.", hint=ORIGINAL)
        if spec.dtype in ("I8", "U8", "I32") and name.endswith(_CODES):
            raise BaseModelError(
                f"{name} is stored in codes ({spec.dtype}) whose scales are not there, or of another kind.",
                hint=ORIGINAL,
            )


def _plain_layout(stored: Layout, recipes: Mapping[str, Recipe], dtype: str) -> Layout:
    """The files as they would be unquantised: each recipe's tensor where its first part is, helpers gone."""
    anchors = {recipe.uses[0]: name for name, recipe in recipes.items()}
    helpers = {used for recipe in recipes.values() for used in recipe.uses}
    helpers |= {name for name in stored.specs if name.rpartition(".")[2] in _LEFTOVERS}
    files = []
    for file in stored.files:
        if not any(spec.name in helpers for spec in file.specs):
            files.append(file)
            continue
        tensors: list[StoredTensor] = []
        for spec in file.specs:
            if spec.name in anchors:
                name = anchors[spec.name]
                tensors.append(StoredTensor(TensorSpec(name, dtype, recipes[name].shape), 0))
            elif spec.name not in helpers:
                tensors.append(StoredTensor(spec, 0))
        files.append(_derived(file, tuple(tensors)))
    return replace(stored, files=tuple(files))


def _derived(file: WeightFile, tensors: tuple[StoredTensor, ...]) -> WeightFile:
    return replace(file, header=Header(tensors, file.header.metadata, 0), derived=True)
