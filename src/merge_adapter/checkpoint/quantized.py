"""Bases stored quantised, shown as the 16-bit tensors that they stand for.

Supported are formats whose values are a table or a float times a scale: bitsandbytes 4 bit (NF4, FP4, nested
scales) and 8 bit, FP8 with block or row scales, compressed-tensors (float, int and packed symmetric), and MXFP4
experts. GPTQ and AWQ reorder and pack by rules of their kernels and are refused. Recipes read rows, so that a
dequantised base streams like any other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from merge_adapter.checkpoint.header import Header, StoredTensor
from merge_adapter.checkpoint.layout import Layout, WeightFile
from merge_adapter.checkpoint.recipes import Block4, Mx4, Packed, Recipe, Scaled, quant_state
from merge_adapter.errors import BaseModelError
from merge_adapter.methods.change import TensorSpec, Weights
from merge_adapter.types import BaseModel

if TYPE_CHECKING:
    from torch import Tensor

    from merge_adapter.checkpoint.reader import StoredWeights

_ORIGINAL = "Name the 16-bit original with --base-model."
_LEFTOVERS = ("weight_format", "input_scale", "output_scale", "activation_scale", "input_zero_point")
"""Tensors beside a quantised weight that say how to run it, and nothing about its values."""
_DTYPES: Mapping[str, str] = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


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
    """Plan how to read a quantised base. Reads headers, and of bitsandbytes' 4 bit the small state of each tensor.

    Raises BaseModelError for a method, or a use of it, that has no recipe here.
    """
    config = base.config.get("quantization_config")
    if not isinstance(config, Mapping):
        raise BaseModelError("The base's quantization_config is not an object.", hint=_ORIGINAL)
    method = str(config.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in config else ""))
    specs = stored.specs
    if method == "bitsandbytes":
        found = dict(_bitsandbytes(base, stored))
    elif method in ("fp8", "finegrained_fp8"):
        found = dict(_scaled(specs, "_scale_inv", config.get("weight_block_size")))
    elif method == "compressed-tensors":
        found = dict(_compressed(config, specs))
    elif method == "mxfp4":
        found = dict(_mx4(specs))
    else:
        raise BaseModelError(
            f"The base is stored quantised by {method or 'an unnamed method'}, which is not dequantised here.",
            hint=_ORIGINAL,
        )
    if not found:
        raise BaseModelError(
            f"The base's config says {method}, but none of its tensors is stored so.", hint=_ORIGINAL
        )
    found = {name: _with_leftovers(name, recipe, specs) for name, recipe in found.items()}
    left = [
        name
        for name, spec in specs.items()
        if spec.dtype.startswith("F8")
        and name not in found
        and not any(name in r.uses for r in found.values())
    ]
    if left:
        raise BaseModelError(f"{left[0]} is stored in FP8 without a scale beside it.", hint=_ORIGINAL)
    dtype = _DTYPES.get(str(base.config.get("dtype") or base.config.get("torch_dtype")), "BF16")
    return Dequantized(_plain_layout(stored, found, dtype), stored, found, dtype)


def _with_leftovers(name: str, recipe: Recipe, specs: Mapping[str, TensorSpec]) -> Recipe:
    module = name.rpartition(".")[0]
    extra = tuple(f"{module}.{part}" for part in _LEFTOVERS if f"{module}.{part}" in specs)
    return recipe.using(extra) if extra else recipe


def _plain_layout(stored: Layout, recipes: Mapping[str, Recipe], dtype: str) -> Layout:
    """The files as they would be unquantised: each recipe's tensor where its first part is, helpers gone."""
    anchors = {recipe.uses[0]: name for name, recipe in recipes.items()}
    helpers = {used for recipe in recipes.values() for used in recipe.uses}
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


def _scaled(specs: Mapping[str, TensorSpec], suffix: str, block: Any = None) -> Iterator[tuple[str, Recipe]]:
    """Weights with a tensor of scales beside them: one for all, one per row, or one per block."""
    for name, spec in specs.items():
        scale = specs.get(f"{name}{suffix}")
        if scale is None or spec.dtype not in ("F8_E4M3", "F8_E5M2", "I8"):
            continue
        if f"{name}_zero_point" in specs:
            raise BaseModelError(f"{name} has zero points, which are not dequantised here.", hint=_ORIGINAL)
        yield name, Scaled((name, scale.name), spec.shape, _block(name, spec, scale, block))


def _block(name: str, spec: TensorSpec, scale: TensorSpec, block: Any) -> tuple[int, int]:
    """Rows and columns that share one scale."""
    rows, columns = spec.shape[-2:] if len(spec.shape) > 1 else (spec.shape[0], 1)
    if scale.elements == 1:
        return rows, columns
    counts = scale.shape if len(scale.shape) == 2 else (*scale.shape, 1)
    if isinstance(block, list | tuple) and len(block) == 2:
        size = (int(block[0]), int(block[1]))
    else:
        size = (-(-rows // counts[0]), -(-columns // counts[1]))
    if len(spec.shape) != 2 or (-(-rows // size[0]), -(-columns // size[1])) != tuple(counts):
        raise BaseModelError(
            f"{name}: scales of shape {list(scale.shape)} do not fit weights of shape {list(spec.shape)}.",
            hint=_ORIGINAL,
        )
    return size


def _bitsandbytes(base: BaseModel, stored: Layout) -> Iterator[tuple[str, Recipe]]:
    specs = stored.specs
    for name, spec in specs.items():
        states = [f"{name}.quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4")]
        state = next((one for one in states if one in specs), None)
        scales = f"{name.removesuffix('.weight')}.SCB"
        if state is not None:
            yield name, _block4(base, stored, name, state)
        elif spec.dtype == "I8" and scales in specs:
            yield name, Scaled((name, scales), spec.shape, (1, spec.shape[1]), divisor=127.0)


def _block4(base: BaseModel, stored: Layout, name: str, state: str) -> Block4:
    file = stored.home[state]
    place = next(tensor for tensor in file.header.tensors if tensor.spec.name == state)
    parsed = quant_state(base.repository.read(file.path, offset=place.offset, length=place.spec.nbytes), name)
    nested = parsed.nested_blocksize is not None
    parts = ["", ".absmax", ".quant_map", *([".nested_absmax", ".nested_quant_map"] if nested else [])]
    uses = [f"{name}{part}" for part in parts]
    absent = [used for used in uses if used not in stored.specs]
    if absent:
        raise BaseModelError(f"{absent[0]} is missing beside {name}.", hint=_ORIGINAL)
    return Block4(
        (*uses, state), parsed.shape, parsed.blocksize, parsed.nested_blocksize, parsed.nested_offset
    )


def _compressed(config: Mapping[str, Any], specs: Mapping[str, TensorSpec]) -> Iterator[tuple[str, Recipe]]:
    yield from _scaled(specs, "_scale")
    for name, spec in specs.items():
        if not name.endswith(".weight_packed"):
            continue
        module = name.removesuffix(".weight_packed")
        scale = specs.get(f"{module}.weight_scale")
        extra = [part for part in ("weight_zero_point", "weight_g_idx") if f"{module}.{part}" in specs]
        bits = _packed_bits(config)
        if scale is None or extra or bits is None or spec.dtype != "I32":
            raise BaseModelError(
                f"{name}: only symmetric weights of 4 or 8 bit, packed without reordering, are dequantised here.",
                hint=_ORIGINAL,
            )
        columns = spec.shape[1] * (32 // bits)
        uses = [name, scale.name]
        if f"{module}.weight_shape" in specs:
            uses.append(f"{module}.weight_shape")
        yield f"{module}.weight", Packed(tuple(uses), (spec.shape[0], columns), bits)


def _packed_bits(config: Mapping[str, Any]) -> int | None:
    groups = config.get("config_groups")
    found = {
        group["weights"].get("num_bits")
        for group in (groups.values() if isinstance(groups, Mapping) else ())
        if isinstance(group, Mapping) and isinstance(group.get("weights"), Mapping)
    }
    bits = found.pop() if len(found) == 1 else None
    return bits if bits in (4, 8) else None


def _mx4(specs: Mapping[str, TensorSpec]) -> Iterator[tuple[str, Recipe]]:
    for name, spec in specs.items():
        plain = name.removesuffix("_blocks")
        if plain == name or f"{plain}_scales" not in specs or len(spec.shape) != 4:
            continue
        experts, out, groups, half = spec.shape
        yield plain, Mx4((name, f"{plain}_scales"), (experts, groups * half * 2, out))
