"""LoRA's family in closed form: what the adapter's tensors are, and the changes they make."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from merge_adapter.errors import AccountingError, MethodError, ShapeError
from merge_adapter.methods.adapter_file import PREFIX
from merge_adapter.methods.change import Change, Context, Kind, ModuleKind, Planned, RowChange, TensorSpec
from merge_adapter.methods.lora_arithmetic import LowRank, ScaledSum
from merge_adapter.methods.replacements import plan_replacements
from merge_adapter.methods.targets import OnDisk, check_shape, locate, no_target

_PART = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?P<leaf>\.weight|\.bias)?"
)


@dataclass(frozen=True)
class Factors:
    """The tensors of one adapted module, by what they are."""

    module: str
    parts: Mapping[str, TensorSpec] = field(default_factory=dict)
    """`lora_A`, `lora_B`, `lora_B.bias`, `lora_embedding_A`, `lora_embedding_B`, `lora_magnitude_vector`."""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(spec.name for spec in self.parts.values())

    @property
    def embedding(self) -> bool:
        return "lora_embedding_A" in self.parts


def plan_lora(context: Context) -> Planned:
    """Plan a LoRA adapter. Raises AccountingError, ShapeError, MethodError."""
    factors, rest = split_factors(context.tensors)
    missing: dict[str, tuple[str, ...]] = {}
    changes: list[Change] = []
    for module in factors:
        made = _plan_module(context, module)
        if made:
            changes.extend(made)
        else:
            missing[f"{module.module}.weight"] = module.names
    if missing:
        raise no_target(missing)
    replaced = plan_replacements(context, rest)
    # Trained tensors take the base's place before anything is added to them.
    return replace(replaced, changes=(*replaced.changes, *changes))


def split_factors(
    tensors: Mapping[str, TensorSpec],
) -> tuple[tuple[Factors, ...], dict[str, TensorSpec]]:
    """The adapted modules, and whatever is not a part of LoRA: parameter name -> tensor."""
    modules: dict[str, dict[str, TensorSpec]] = {}
    rest: dict[str, TensorSpec] = {}
    for name, spec in tensors.items():
        path = name.removeprefix(PREFIX)
        match = _PART.fullmatch(path)
        if match is None:
            rest[path] = spec
            continue
        part = match["part"] + (match["leaf"] or "").replace(".weight", "")
        modules.setdefault(match["module"], {})[part] = spec
    return tuple(Factors(module, parts) for module, parts in modules.items()), rest


def scale_of(config: Mapping[str, Any], module: str, rank: int) -> float:
    """The factor of B A as PEFT computes it. Raises ShapeError when the tensors' rank is not the config's."""
    rank_pattern, alpha_pattern = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    expected = rank_pattern.get(pattern_key(rank_pattern, module), config.get("r", 8))
    alpha = alpha_pattern.get(pattern_key(alpha_pattern, module), config.get("lora_alpha", 8))
    if expected != rank:
        raise ShapeError(
            f"{module}: expected rank {expected} by adapter_config.json, got rank {rank} in the weights.",
            hint="The config belongs to another adapter, or its rank_pattern was lost; restore it.",
        )
    return float(alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)


def pattern_key(patterns: Mapping[str, Any], module: str) -> str:
    """The first key that matches the end of the module's path, as PEFT's `get_pattern_key` does."""
    for key in patterns:
        if re.match(rf"(.*\.)?({key})$", module):
            return key
    return module


def _plan_module(context: Context, factors: Factors) -> list[Change]:
    """The changes of one module; empty when the base does not have it."""
    target = locate(context, f"{factors.module}.weight")
    if not isinstance(target, OnDisk):
        return []
    low_rank = _low_rank(context, factors, target.tensor)
    consumes = [low_rank.left, low_rank.right]
    if low_rank.magnitude is not None:
        consumes.append(low_rank.magnitude)
    kind = Kind.ADDITIVE if low_rank.magnitude is None else Kind.MULTIPLICATIVE
    changes: list[Change] = [RowChange(target.tensor, factors.module, tuple(consumes), kind, low_rank)]
    bias = factors.parts.get("lora_B.bias")
    if bias is not None:
        changes.append(_plan_bias(context, factors, bias, low_rank.scale))
    return changes


def _low_rank(context: Context, factors: Factors, tensor: TensorSpec) -> LowRank:
    """The arithmetic of a module's weight, its shapes checked against the base."""
    a, b = _pair(factors)
    rank = a.shape[0]
    if len(b.shape) < 2 or b.shape[1] != rank:
        raise ShapeError(
            f"{factors.module}: expected lora_B of rank {rank}, got shape {list(b.shape)}.",
            hint="Save the adapter again; its two factors do not belong together.",
        )
    scale = scale_of(context.config, factors.module, rank)
    transposed = factors.embedding or context.names.kind(factors.module) is ModuleKind.CONV1D
    rows, columns = tensor.shape[0], math.prod(tensor.shape[1:])
    out, into = b.shape[0], math.prod(a.shape[1:])
    check_shape(f"{factors.module}.weight", (rows, columns), (into, out) if transposed else (out, into))
    magnitude = factors.parts.get("lora_magnitude_vector")
    if magnitude is not None and math.prod(magnitude.shape) != (columns if transposed else rows):
        check_shape(f"{magnitude.name}", (columns if transposed else rows,), magnitude.shape)
    left, right = (a, b) if transposed else (b, a)
    return LowRank(
        left=left.name,
        right=right.name,
        rank=rank,
        scale=scale,
        transposed=transposed,
        magnitude=magnitude.name if magnitude else None,
        magnitude_of_columns=transposed,
        rows=rows,
        columns=columns,
    )


def _pair(factors: Factors) -> tuple[TensorSpec, TensorSpec]:
    names = ("lora_embedding_A", "lora_embedding_B") if factors.embedding else ("lora_A", "lora_B")
    lost = [name for name in names if name not in factors.parts]
    if lost:
        raise AccountingError(
            f"{factors.module}: {' and '.join(lost)} missing beside {', '.join(factors.names)}.",
            tensors=factors.names,
            hint="The adapter's file is incomplete; save it again.",
        )
    a, b = (factors.parts[name] for name in names)
    if len(a.shape) < 2 or 0 in a.shape:
        raise ShapeError(
            f"{a.name}: expected [rank, inputs], got {list(a.shape)}.",
            hint="Weights were saved ungathered (DeepSpeed ZeRO-3, FSDP); gather them and save again.",
        )
    return a, b


def _plan_bias(context: Context, factors: Factors, bias: TensorSpec, scale: float) -> Change:
    target = locate(context, f"{factors.module}.bias")
    if not isinstance(target, OnDisk):
        raise MethodError(
            f"{factors.module}: the adapter has a bias (lora_bias=True), the base has none to add it to.",
            hint="This architecture cannot hold the bias; keep the adapter unmerged.",
        )
    check_shape(bias.name, target.tensor.shape, bias.shape)
    return RowChange(
        target.tensor, f"{factors.module}.bias", (bias.name,), Kind.ADDITIVE, ScaledSum(bias.name, scale)
    )
