"""What LoRA must make of parameters that it adapts by their names (`target_parameters`), fused experts among them.

PEFT puts one layer around another, one for each parameter. The factors of all experts of a stack lie side by side in
one pair of matrices: A (experts * r, inputs), expert by expert; B (outputs, r * experts), rank by rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from merge_adapter.types import Resolved
from merge_adapter.verify.models.adapters import AdapterFile
from merge_adapter.verify.weights.low_rank import LowRank, LowRankStack
from merge_adapter.verify.weights.oracle import Update
from merge_adapter.verify.weights.recipe import recipe


@dataclass(frozen=True)
class Parameter:
    """One parameter that is adapted by its name."""

    update: Update
    disagreements: tuple[str, ...]
    """Where PEFT's layer and the raw config differ."""


@dataclass(frozen=True)
class _Factors:
    """What one adapter brings, as PEFT's layer lays it out."""

    down: Tensor
    """A."""
    up: Tensor
    """B."""
    scale: float
    raw: bool
    """Whether they are the file's own tensors; else PEFT made them of others."""


def by_parameter(
    name: str, module: Any, sources: Resolved, files: tuple[AdapterFile, ...]
) -> dict[str, Parameter]:
    """Each parameter of the layer at `name` that PEFT's `module` adapts; {} for layers of every other kind."""
    from peft.tuners.lora.layer import ParamWrapper
    from peft.tuners.tuners_utils import BaseTunerLayer

    found: dict[str, Parameter] = {}
    path, layer = name, module
    while isinstance(layer, ParamWrapper):
        leaf = layer.parameter_name
        brought = [_factors(layer, adapter, path, files) for adapter in layer.active_adapters]
        factors = [each for each in brought if each is not None]
        update = _update(layer, factors)
        if update is None or leaf in found:
            return {}
        texts = [text for each in factors for text in _cross_check(f"{name}.{leaf}", each, sources)]
        found[leaf] = Parameter(update, tuple(texts))
        path, layer = f"{path}.base_layer", layer.base_layer
    # a layer of another kind inside changes what these add to
    return {} if isinstance(layer, BaseTunerLayer) else found


def _factors(layer: Any, adapter: str, path: str, files: tuple[AdapterFile, ...]) -> _Factors | None:
    """What `adapter` brings; None where it leaves the parameter alone.

    The tensors are those of its file where that holds them so. A file of transformers 4 has them expert by expert:
    then they are read as PEFT has put them together.
    """
    if adapter not in layer.lora_A:
        return None
    down, up = layer.lora_A[adapter].weight.detach(), layer.lora_B[adapter].weight.detach()
    scale = float(layer.scaling[adapter])
    if len(files) == 1:
        own_down, own_up = (files[0].module(path, f"lora_{side}.weight") for side in "AB")
        if own_down is not None and own_up is not None:
            return _Factors(own_down, own_up, scale, raw=True)
    return _Factors(down, up, scale, raw=False)


def _update(layer: Any, factors: list[_Factors]) -> Update | None:
    """W + sum of s B A; None for shapes that this is not."""
    weight = layer.get_param().detach()
    if not factors or weight.ndim not in (2, 3):
        return None
    stack = weight.ndim == 3
    if stack and weight.shape[0] == 1:
        return None  # PEFT takes it for a single matrix, whichever way it is stored
    pairs = [_stacked(layer, weight, each) if stack else (each.up, each.down) for each in factors]
    left, right = (torch.cat(side, dim) for side, dim in zip(zip(*pairs, strict=True), (-1, -2), strict=True))
    if (*left.shape[:-1], right.shape[-1]) != tuple(weight.shape) or left.shape[-1] != right.shape[-2]:
        return None
    widths = tuple(int(up.shape[-1]) for up, _ in pairs)
    scales = torch.cat(
        [
            torch.full((width,), each.scale, dtype=torch.float64)
            for width, each in zip(widths, factors, strict=True)
        ]
    )
    ranks = widths if len(widths) > 1 else ()
    if not stack:
        return LowRank(weight, left, right, ranks=ranks, scales=scales)
    form = "closed form, W + s B A of each matrix"
    return LowRankStack(weight, left.flatten(0, 1), right, form=form, ranks=ranks, scales=scales)


def _stacked(layer: Any, weight: Tensor, factors: _Factors) -> tuple[Tensor, Tensor]:
    """Both factors matrix by matrix: (matrices, rows, r) and (matrices, r, columns)."""
    count = weight.shape[0]
    down = factors.down.reshape(count, -1, factors.down.shape[-1])  # (experts, r, in)
    up = factors.up.reshape(factors.up.shape[0], -1, count).permute(2, 0, 1)  # (experts, out, r)
    if getattr(layer.get_base_layer(), "is_transposed", False):  # stored as (experts, in, out)
        return down.transpose(1, 2), up.transpose(1, 2)
    return up, down


def _cross_check(name: str, factors: _Factors, sources: Resolved) -> list[str]:
    """PEFT's own scaling must agree with what the raw config says, where the factors are the file's."""
    if not factors.raw:
        return []
    config, weight = sources.adapter.config, sources.adapter.weight
    said = [recipe(config, path).scale * weight for path in (name, name.rpartition(".")[0])]
    if any(abs(factors.scale - ours) <= 1e-6 * abs(ours) for ours in said):
        return []
    return [f"{name}: PEFT scales by {factors.scale:g}, the adapter's config says {said[0]:g}"]
