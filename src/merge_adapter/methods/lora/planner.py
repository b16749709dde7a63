"""LoRA's family in closed form: what the adapter's tensors are, and what they do to each parameter."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from merge_adapter.errors import AccountingError, MethodError, ShapeError
from merge_adapter.methods.adapter_file import PREFIX
from merge_adapter.methods.change import FLOATING, Context, Kind, ModuleKind, Planned, TensorSpec
from merge_adapter.methods.edits.heads import head_changes
from merge_adapter.methods.edits.placing import Edit, check_shape, place, shape_of
from merge_adapter.methods.edits.replacements import replacement_edits
from merge_adapter.methods.edits.resizing import vocabularies
from merge_adapter.methods.edits.tying import Same
from merge_adapter.methods.lora.arithmetic import LowRank, LowRankStack, ScaledSum
from merge_adapter.methods.lora.convolutions import check_convolution
from merge_adapter.methods.lora.targets import OUT_PROJ_TIMES, attention_of, named_parameters, parameter_of
from merge_adapter.methods.lora.tokens import split_tokens, token_edits

_PART = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?P<leaf>\.weight|\.bias)?"
)
_TRAINING_ONLY = re.compile(r".+\.(lora_velora_embed|lora_monteclora_sampler)(\..+)?")
"""State of training-time samplers, which PEFT's merge ignores too: VeLoRA, MonteCLoRA."""


@dataclass(frozen=True)
class Factors:
    """The tensors of one adapted module, by what they are."""

    module: str
    """Path in the adapter's names; for several parameters of one module with `.base_layer` inside."""
    parts: Mapping[str, TensorSpec] = field(default_factory=dict)
    """`lora_A`, `lora_B`, `lora_B.bias`, `lora_embedding_A`, `lora_embedding_B`, `lora_magnitude_vector`."""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(spec.name for spec in self.parts.values())

    @property
    def embedding(self) -> bool:
        return "lora_embedding_A" in self.parts


@dataclass(frozen=True)
class Sorted:
    """An adapter's tensors by what they are."""

    factors: tuple[Factors, ...]
    training_only: tuple[TensorSpec, ...]
    rest: Mapping[str, TensorSpec]
    """Path without PEFT's prefix -> tensor."""


def plan_lora(context: Context) -> Planned:
    """Plan a LoRA adapter. Raises AccountingError, ShapeError, MethodError."""
    found = sort_tensors(context.tensors)
    deltas, parameters = split_tokens(found.rest)
    # Trained tensors take the base's place before anything is added to them.
    edits = replacement_edits(context, parameters)
    replaced = {edit.parameter: edit.shape for edit in edits if edit.shape}
    edits.extend(token_edits(context, deltas, replaced))
    trained = {edit.parameter: edit.shape for edit in edits if edit.arithmetic is None and edit.shape}
    for factors in found.factors:
        edits.extend(_module_edits(context, factors, trained))
    if found.training_only and edits:
        unused = tuple(spec.name for spec in found.training_only)
        edits[-1] = replace(edits[-1], consumes=(*edits[-1].consumes, *unused))
    placed = place(context, edits)
    return head_changes(context, placed)


def sort_tensors(tensors: Mapping[str, TensorSpec]) -> Sorted:
    """Find the adapted modules, and what is not a part of LoRA."""
    modules: dict[str, dict[str, TensorSpec]] = {}
    training_only, rest = [], {}
    for name, spec in tensors.items():
        path = name.removeprefix(PREFIX)
        match = _PART.fullmatch(path)
        if match is not None:
            part = match["part"] + (match["leaf"] or "").replace(".weight", "")
            modules.setdefault(match["module"], {})[part] = spec
        elif _TRAINING_ONLY.fullmatch(path):
            training_only.append(spec)
        else:
            rest[path] = spec
    factors = tuple(Factors(module, parts) for module, parts in modules.items())
    return Sorted(factors, tuple(training_only), rest)


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


def _module_edits(
    context: Context, factors: Factors, trained: Mapping[str, tuple[int, ...]]
) -> Iterator[Edit]:
    """What one adapted module does: to its weight, and with `lora_bias` to its bias."""
    parameter = parameter_of(context, factors.module, factors.embedding)
    module = parameter.rpartition(".")[0]
    a, b = _pair(factors)
    shape = trained.get(parameter) or shape_of(context, parameter)
    if shape is None:  # nothing to change, which `place` says
        yield Edit(parameter, factors.names, Kind.ADDITIVE, Same())
        return
    if len(shape) == 3 and context.names.kind(module) is not ModuleKind.CONV:
        yield _stack_edit(context, factors, parameter, shape)
        return
    check_convolution(context, module, a)
    rank = a.shape[0]
    if len(b.shape) < 2 or b.shape[1] != rank:
        raise ShapeError(
            f"{factors.module}: expected lora_B of rank {rank}, got shape {list(b.shape)}.",
            hint="Save the adapter again; its two factors do not belong together.",
        )
    attention = attention_of(context, factors.module)
    scale = scale_of(context.config, attention or _pattern_path(parameter), rank) * context.adapter.weight
    if attention is not None and factors.module != attention:
        scale *= OUT_PROJ_TIMES
    _check_parts(context, factors)
    yield _weight_edit(context, factors, parameter, shape, scale)
    bias = factors.parts.get("lora_B.bias")
    if bias is not None:
        yield _bias_edit(context, factors, bias, scale)


def _weight_edit(
    context: Context, factors: Factors, parameter: str, shape: tuple[int, ...], scale: float
) -> Edit:
    a, b = _pair(factors)
    module = parameter.rpartition(".")[0]
    by_name = parameter in named_parameters(context, module)
    conv1d = not by_name and context.names.kind(module) is ModuleKind.CONV1D
    transposed = factors.embedding or conv1d
    out, into = b.shape[0], math.prod(a.shape[1:])
    rows, columns = (into, out) if transposed else (out, into)
    _check_weight(context, parameter, shape, rows, columns)
    magnitude = factors.parts.get("lora_magnitude_vector")
    if magnitude is not None:
        _check_magnitude(context, magnitude, columns if transposed else rows)
    left, right = (a, b) if transposed else (b, a)
    consumes = (left.name, right.name, *((magnitude.name,) if magnitude else ()))
    arithmetic = LowRank(
        left=left.name,
        right=right.name,
        rank=a.shape[0],
        scale=scale,
        transposed=transposed,
        magnitude=magnitude.name if magnitude else None,
        magnitude_of_columns=transposed,
        rows=rows,
        columns=columns,
    )
    return Edit(parameter, consumes, Kind.MULTIPLICATIVE if magnitude else Kind.ADDITIVE, arithmetic)


def _check_weight(context: Context, parameter: str, shape: tuple[int, ...], rows: int, columns: int) -> None:
    """The delta must have the base's shape; a vocabulary that differs is said as such."""
    if (shape[0], math.prod(shape[1:])) == (rows, columns):
        return
    hint = ""
    if (
        shape[0] != rows
        and math.prod(shape[1:]) == columns
        and shape[0] in vocabularies(context.sources.base.config)
    ):
        hint = (
            f"The adapter was trained with a vocabulary of {rows} tokens, the base has {shape[0]}: the embeddings"
            " were resized for training but not saved. Save the adapter with save_embedding_layers=True."
        )
    check_shape(parameter, shape, (rows, columns), hint=hint)


def _check_magnitude(context: Context, magnitude: TensorSpec, expected: int) -> None:
    if not context.config.get("use_dora"):
        raise MethodError(
            f"{magnitude.name} is a magnitude vector of DoRA, but adapter_config.json does not set use_dora.",
            hint="Set use_dora to true in adapter_config.json if the adapter was trained with DoRA.",
        )
    if math.prod(magnitude.shape) != expected:
        check_shape(magnitude.name, (expected,), magnitude.shape)


def _stack_edit(context: Context, factors: Factors, parameter: str, shape: tuple[int, ...]) -> Edit:
    """LoRA on a stack of experts `[experts, …, …]`: both factors hold one block per expert."""
    a, b = _pair(factors)
    experts = shape[0]
    if a.shape[0] % experts or b.shape[1] != a.shape[0]:
        raise ShapeError(
            f"{parameter}: expected factors of rank times {experts} experts, got {list(a.shape)} and "
            f"{list(b.shape)}.",
            hint="The adapter was trained on a base with another number of experts.",
        )
    module = context.names.module(parameter.rpartition(".")[0])
    into_first = bool(getattr(module, "is_transposed", False))
    rank = a.shape[0] // experts
    out, into = b.shape[0], a.shape[1]
    check_shape(parameter, shape, (experts, into, out) if into_first else (experts, out, into))
    scale = scale_of(context.config, parameter, rank) * context.adapter.weight
    arithmetic = LowRankStack(a.name, b.name, experts, rank, scale, into_first, elements=math.prod(shape))
    return Edit(parameter, (a.name, b.name), Kind.ADDITIVE, arithmetic)


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
    for spec in (a, b):
        if spec.dtype not in FLOATING and not spec.dtype.startswith("F8_"):
            raise ShapeError(
                f"{spec.name}: expected floating-point factors, got {spec.dtype}.",
                hint="The adapter was quantised after training; merge the one that PEFT saved.",
            )
        if len(spec.shape) < 2 or 0 in spec.shape:
            raise ShapeError(
                f"{spec.name}: expected a matrix, got {list(spec.shape)}.",
                hint="Weights were saved ungathered (DeepSpeed ZeRO-3, FSDP); gather them and save again.",
            )
    return a, b


def _check_parts(context: Context, factors: Factors) -> None:
    """Raise AccountingError where the config calls for a part beside the two factors, and the file lacks it."""
    wanted = {"use_dora": "lora_magnitude_vector", "lora_bias": "lora_B.bias"}
    for key, part in wanted.items():
        if context.config.get(key) and part not in factors.parts:
            raise AccountingError(
                f"{factors.module}: {part} is missing beside {', '.join(factors.names)}, though adapter_config.json"
                f" sets {key}.",
                tensors=factors.names,
                hint="The adapter's file is incomplete; save it again.",
            )


def _bias_edit(context: Context, factors: Factors, bias: TensorSpec, scale: float) -> Edit:
    parameter = f"{factors.module.replace('.base_layer', '')}.bias"
    shape = shape_of(context, parameter)
    if shape is None:
        raise MethodError(
            f"{factors.module}: the adapter has a bias (lora_bias=True), the base has none to add it to.",
            hint="This architecture cannot hold the bias; keep the adapter unmerged.",
        )
    check_shape(bias.name, shape, bias.shape)
    return Edit(parameter, (bias.name,), Kind.ADDITIVE, ScaledSum(bias.name, scale))


def _pattern_path(parameter: str) -> str:
    """What PEFT matches patterns against: the module's path, for a weight."""
    return parameter.removesuffix(".weight")
