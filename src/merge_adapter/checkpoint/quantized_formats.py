"""Which recipe makes which tensor of a quantised checkpoint: one reader per format, from names and shapes."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from merge_adapter.checkpoint.layout import Layout
from merge_adapter.checkpoint.quantization import used_method
from merge_adapter.checkpoint.recipes import (
    Block4,
    Int8,
    Mx4,
    Packed,
    Recipe,
    Scaled,
    Transposed,
    quant_state,
)
from merge_adapter.errors import BaseModelError, MalformedError
from merge_adapter.methods.change import TensorSpec
from merge_adapter.types import BaseModel

ORIGINAL = "Name the 16-bit original with --base-model."
"""The way out wherever a base cannot be dequantised."""
_STATE = ".quant_state.bitsandbytes__"
_SMALL, _READERS = 1 << 16, 8
"""Bytes of a tensor that only describes another, and how many of them are read at a time."""
_CONV1D = dict.fromkeys(
    ("gpt2", "openai-gpt", "imagegpt", "decision_transformer"), ("c_attn", "c_proj", "c_fc", "q_attn")
)
"""Models of transformers whose linear layers are stored `[in, out]`. bitsandbytes stores theirs `[out, in]`."""


def recipes_of(base: BaseModel, config: Mapping[str, Any], stored: Layout) -> dict[str, Recipe]:
    """Dequantised tensor -> how it is made, for a quantisation config that `quantization.refusal` lets pass.

    Raises BaseModelError for a use of the format that has no recipe, MalformedError for an unreadable state.
    """
    method = used_method(config)
    if method == "bitsandbytes":
        return dict(_bitsandbytes(base, stored))
    if method == "compressed-tensors":
        return dict(_compressed(base, config, stored))
    if method == "mxfp4":
        return dict(_mx4(stored.specs))
    suffix = "_scale" if method == "fbgemm_fp8" else "_scale_inv"
    return dict(_scaled(stored.specs, suffix, ("F8_E4M3", "F8_E5M2"), config.get("weight_block_size")))


# --------------------------------------------------------------------- FP8, and floats and integers with scales


def _scaled(
    specs: Mapping[str, TensorSpec], suffix: str, dtypes: tuple[str, ...], block: Any = None
) -> Iterator[tuple[str, Recipe]]:
    """Weights with a tensor of scales beside them: one for all, one per row, or one per block."""
    for name, spec in specs.items():
        scale = specs.get(f"{name}{suffix}")
        if scale is None or spec.dtype not in dtypes:
            continue
        zero = specs.get(f"{name}_zero_point")
        if zero is not None and zero.elements != scale.elements:
            raise BaseModelError(
                f"{name}: zero points of shape {list(zero.shape)} do not fit scales of shape {list(scale.shape)}.",
                hint=ORIGINAL,
            )
        uses = (name, scale.name, *([zero.name] if zero else []))
        yield (
            name,
            Scaled(uses, spec.shape, _block(name, spec, scale, block), zero=zero.name if zero else ""),
        )


def _block(name: str, spec: TensorSpec, scale: TensorSpec, block: Any) -> tuple[int, int]:
    """Rows and columns that share one scale: what the config says where that fits, else an even split."""
    if len(spec.shape) < 2:
        raise BaseModelError(f"{name} is quantised, but no matrix.", hint=ORIGINAL)
    rows, columns = spec.shape[-2:]
    if scale.elements == 1:
        return rows, columns
    counts = scale.shape if len(scale.shape) > 1 else (*scale.shape, 1)
    if len(counts) == len(spec.shape) <= 3 and counts[:-2] == spec.shape[:-2] and min(counts) > 0:
        size = _pair(block)
        if size is not None and counts[-2:] == (-(-rows // size[0]), -(-columns // size[1])):
            return size
        if rows % counts[-2] == 0 and columns % counts[-1] == 0:
            return rows // counts[-2], columns // counts[-1]
    raise BaseModelError(
        f"{name}: scales of shape {list(scale.shape)} do not fit weights of shape {list(spec.shape)}.",
        hint=ORIGINAL,
    )


def _pair(block: Any) -> tuple[int, int] | None:
    """The size of a block as a config states it, None where it is no size."""
    if not isinstance(block, list | tuple) or len(block) != 2:
        return None
    return (block[0], block[1]) if all(type(size) is int and size > 0 for size in block) else None


# --------------------------------------------------------------------------------------------- bitsandbytes


def _bitsandbytes(base: BaseModel, stored: Layout) -> Iterator[tuple[str, Recipe]]:
    specs = stored.specs
    transposed = _CONV1D.get(str(base.config.get("model_type")), ())
    states = {
        name.partition(_STATE)[0]: name for name in specs if name.partition(_STATE)[2] in ("nf4", "fp4")
    }
    texts = _small(base, stored, states.values())
    for name, spec in specs.items():
        module = name.removesuffix(".weight")
        state = states.get(name)
        recipe: Recipe
        if state is not None:
            recipe = _block4(stored, name, state, texts[state])
        elif spec.dtype == "I8" and f"{module}.SCB" in specs:
            recipe = Int8((name, f"{module}.SCB"), spec.shape)
        else:
            continue
        yield name, Transposed(recipe) if module.rpartition(".")[2] in transposed else recipe


def _block4(stored: Layout, name: str, state: str, text: bytes) -> Block4:
    parsed = quant_state(text, name)
    nested = parsed.nested_blocksize is not None
    parts = ["", ".absmax", ".quant_map", *([".nested_absmax", ".nested_quant_map"] if nested else [])]
    uses = [f"{name}{part}" for part in parts]
    absent = [used for used in uses if used not in stored.specs]
    if absent:
        raise BaseModelError(f"{absent[0]} is missing beside {name}.", hint=ORIGINAL)
    elements = parsed.shape[0] * parsed.shape[1]
    if stored.specs[name].nbytes != -(-elements // 2) or stored.specs[uses[1]].elements != -(
        -elements // parsed.blocksize
    ):
        raise BaseModelError(
            f"{name}: {stored.specs[name].nbytes} bytes and {stored.specs[uses[1]].elements} scales do not make the "
            f"{list(parsed.shape)} of its quantisation state.",
            hint="Download the base again, or name the 16-bit original with --base-model.",
        )
    return Block4((*uses, state), parsed)


def _small(base: BaseModel, stored: Layout, names: Iterable[str]) -> dict[str, bytes]:
    """The data of small tensors. Several at a time: on the Hub each is a request of its own."""
    places = {tensor.spec.name: tensor for file in stored.files for tensor in file.header.tensors}

    def read(name: str) -> bytes:
        file, place = stored.home[name], places[name]
        if place.spec.nbytes > _SMALL:
            raise MalformedError(
                f"{name} of {file.path} has {place.spec.nbytes} bytes, expected {_SMALL} at most.",
                hint="Download the base again.",
            )
        if file.pickled:
            from merge_adapter.checkpoint.pickled import load_pickled  # imports torch

            return (
                load_pickled(base.repository.local(file.path), file.path)[name].contiguous().numpy().tobytes()
            )
        return base.repository.read(file.path, offset=place.offset, length=place.spec.nbytes)

    names = tuple(names)
    with ThreadPoolExecutor(_READERS, thread_name_prefix="state") as pool:
        return dict(zip(names, pool.map(read, names), strict=True))


# --------------------------------------------------------------------------------------- compressed-tensors


def _compressed(base: BaseModel, config: Mapping[str, Any], stored: Layout) -> Iterator[tuple[str, Recipe]]:
    specs = stored.specs
    yield from _scaled(specs, "_scale", ("F8_E4M3", "F8_E5M2", "I8"), _block_structure(config))
    told = [name for name in specs if name.endswith(".weight_shape")]
    shapes = _small(
        base, stored, [name for name in told if specs[name].dtype == "I64" and specs[name].elements == 2]
    )
    for name, spec in specs.items():
        if not name.endswith(".weight_packed"):
            continue
        weight = name.removesuffix("_packed")
        scale = specs.get(f"{weight}_scale")
        bits = _packed_bits(config)
        if scale is None or bits is None or spec.dtype != "I32" or len(spec.shape) != 2:
            raise BaseModelError(
                f"{name}: of packed weights only those of whole integers of one width are dequantised here.",
                hint=ORIGINAL,
            )
        if f"{weight}_g_idx" in specs:
            raise BaseModelError(
                f"{name} is packed in the order of its activations, which is not undone here.", hint=ORIGINAL
            )
        yield weight, _packed(stored, spec, scale, bits, shapes)


def _packed(
    stored: Layout, spec: TensorSpec, scale: TensorSpec, bits: int, shapes: Mapping[str, bytes]
) -> Packed:
    weight = spec.name.removesuffix("_packed")
    shape = (spec.shape[0], spec.shape[1] * 32 // bits)
    uses = [spec.name, scale.name]
    if (told := f"{weight}_shape") in stored.specs:
        uses.append(told)
        if told in shapes:
            rows, columns = struct.unpack("<2q", shapes[told])
            if rows == shape[0] and 0 <= shape[1] - columns < 32:  # the last word may not be full
                shape = (rows, columns)
    groups = scale.shape[1] if len(scale.shape) == 2 else 1
    if shape[1] % max(1, groups) or scale.shape[0] not in (1, shape[0]):
        raise BaseModelError(
            f"{spec.name}: scales of shape {list(scale.shape)} do not fit weights of shape {list(shape)}.",
            hint=ORIGINAL,
        )
    zero = f"{weight}_zero_point"
    if zero in stored.specs:
        uses.append(zero)
        if stored.specs[zero].dtype != "I32" or stored.specs[zero].shape != (
            -(-shape[0] * bits // 32),
            groups,
        ):
            raise BaseModelError(f"{zero} is not packed as its weights are.", hint=ORIGINAL)
    return Packed(tuple(uses), shape, bits, zero=zero if zero in stored.specs else "")


def _weight_settings(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What each group of the config says about its weights."""
    groups = config.get("config_groups")
    return [
        group["weights"]
        for group in (groups.values() if isinstance(groups, Mapping) else ())
        if isinstance(group, Mapping) and isinstance(group.get("weights"), Mapping)
    ]


def _packed_bits(config: Mapping[str, Any]) -> int | None:
    found = [one.get("num_bits") for one in _weight_settings(config) if one.get("type", "int") == "int"]
    bits = found[0] if found and all(one == found[0] for one in found) else None
    return bits if type(bits) is int and 1 <= bits <= 8 else None


def _block_structure(config: Mapping[str, Any]) -> Any:
    found = [one["block_structure"] for one in _weight_settings(config) if one.get("block_structure")]
    return found[0] if len(found) == 1 else None


# ---------------------------------------------------------------------------------------------------- MXFP4


def _mx4(specs: Mapping[str, TensorSpec]) -> Iterator[tuple[str, Recipe]]:
    for name, spec in specs.items():
        plain = name.removesuffix("_blocks")
        scales = specs.get(f"{plain}_scales")
        if plain == name or scales is None:
            continue
        if len(spec.shape) != 4 or spec.shape[3] != 16 or scales.shape != spec.shape[:3]:
            raise BaseModelError(
                f"{name}: blocks of shape {list(spec.shape)} with scales of shape {list(scales.shape)} are not MXFP4.",
                hint=ORIGINAL,
            )
        experts, out, groups, half = spec.shape
        yield plain, Mx4((name, scales.name), (experts, groups * half * 2, out))
