"""The modules part on single layers: right merges within their prediction, wrong ones beyond it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, TrainableTokensConfig, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from merge_adapter.verify.rounding import rounded
from merge_adapter.verify.weights.layers import VECTORS, LayerEvidence, judge_layer
from merge_adapter.verify.weights.low_rank import LowRank

KINDS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(96, 512),
    "transposed": lambda: Conv1D(512, 96),
    "convolution": lambda: nn.Conv2d(24, 512, 2, bias=False),
    "embedding": lambda: nn.Embedding(512, 96),
}


class Model(nn.Module):
    """One layer, for PEFT to adapt."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, inputs: Tensor) -> Any:
        return self.layer(inputs)


class Judged:
    """A layer with a LoRA on it, and what the modules part says of a merged weight."""

    def __init__(self, kind: str, *, dtype: torch.dtype, change: Callable[[Tensor], None]) -> None:
        torch.manual_seed(0)
        model = Model(KINDS[kind]())
        weight: Any = model.layer.weight
        with torch.no_grad():
            weight.mul_(0.05 / weight.std())
            change(weight)
        adapted: Any = get_peft_model(
            model.to(dtype),
            LoraConfig(
                r=4,
                target_modules=["layer"],
                init_lora_weights=False,
                fan_in_fan_out=kind == "transposed",
            ),
        )
        self.layer = adapted.base_model.model.layer.float()
        self.base = self.layer.base_layer.weight.detach().to(dtype)
        left, right = self._factors(kind)
        self.update = LowRank(self.base, left * self.layer.scaling["default"], right)

    def _factors(self, kind: str) -> tuple[Tensor, Tensor]:
        if kind == "embedding":
            a, b = (self.layer.lora_embedding_A["default"], self.layer.lora_embedding_B["default"])
            return a.detach().T.double(), b.detach().T.double()
        a, b = (side["default"].weight.detach().double() for side in (self.layer.lora_A, self.layer.lora_B))
        if kind == "transposed":
            return a.T, b.T
        return b.flatten(1), a.flatten(1)

    def merged(self, strength: float = 1) -> Tensor:
        """The update `strength` times over, rounded once."""
        whole = self.update.target_rows(0, self.base.shape[0], torch.float64)
        before = self.update.base_rows(0, self.base.shape[0], torch.float64)
        return rounded(before + strength * (whole - before), self.base.dtype).reshape(self.base.shape)

    def ask(self, merged: Tensor, seed: int = 0) -> LayerEvidence:
        bias = self.layer.base_layer.__dict__["_parameters"].get("bias")
        found = judge_layer("layer", self.layer, merged, bias, self.update, seed=seed, allow_cast=False)
        assert found is not None
        return found


def _alike(weight: Tensor) -> None:
    """All rows of one size."""


def _large_row(weight: Tensor) -> None:
    weight[77 % weight.shape[0]] *= 1000


def _large_column(weight: Tensor) -> None:
    weight[:, 7] *= 1000


def _few_rows(weight: Tensor) -> None:
    """The others are zeros, as those of tokens that nobody trained."""
    kept = torch.zeros(weight.shape[0], dtype=torch.bool)
    kept[torch.randperm(weight.shape[0])[: weight.shape[0] // 20]] = True
    weight[~kept] = 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("change", [_alike, _large_row, _large_column, _few_rows])
@pytest.mark.parametrize("kind", KINDS)
def test_a_right_merge_stays_within_its_prediction(
    kind: str, change: Callable[[Tensor], None], dtype: torch.dtype
) -> None:
    """Whatever rows or columns carry the layer, and whether or not they are among those that are looked at."""
    case = Judged(kind, dtype=dtype, change=change)
    for seed in range(5):
        assert case.ask(case.merged(), seed).ratio <= 1


@pytest.mark.parametrize("strength", [0, 0.5, 2, -1])
@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_merge_stands_out(kind: str, strength: float) -> None:
    """Not merged, half, twice, subtracted."""
    case = Judged(kind, dtype=torch.bfloat16, change=_alike)
    found = case.ask(case.merged(strength))
    assert found.telling
    assert found.ratio > 2


def test_what_is_added_to_every_answer_hides_no_fault() -> None:
    """A bias that dwarfs the weight is no part of what rounding the weight may leave."""
    case = Judged("linear", dtype=torch.bfloat16, change=_alike)
    with torch.no_grad():
        case.layer.base_layer.bias.fill_(100)
    assert case.ask(case.merged()).ratio <= 1
    assert case.ask(case.merged(0.5)).ratio > 2


def test_the_prediction_is_near_the_error() -> None:
    """It predicts the average, not the worst: the limit above it is what scatter of few vectors needs."""
    case = Judged("linear", dtype=torch.bfloat16, change=_large_row)
    found = [case.ask(case.merged(), seed) for seed in range(VECTORS)]
    average = sum(entry.error**2 for entry in found) / sum(entry.predicted**2 for entry in found)
    assert 0.25 < average < 2


@pytest.mark.parametrize("rows", [[7], [3, 500]])
def test_single_trained_tokens_are_looked_up(rows: list[int]) -> None:
    """A random choice of ids hits none of them, and a merge that left them out answered as well as a right one."""
    torch.manual_seed(0)
    wrapped = Model(nn.Embedding(512, 96))
    config = TrainableTokensConfig(token_indices=rows, target_modules=["layer"])
    layer: Any = get_peft_model(wrapped, config).base_model.model.layer
    base = layer.get_base_layer().weight.detach()
    with torch.no_grad():
        layer.trainable_tokens_delta["default"].add_(1)
    left = torch.zeros(512, 1)
    left[rows] = 1
    update = LowRank(base, left, torch.ones(1, 96))
    right = judge_layer("weight", layer, base + left, None, update, seed=0, allow_cast=False)
    assert right is not None
    assert right.telling
    assert right.ratio <= 1
    wrong = judge_layer("weight", layer, base, None, update, seed=0, allow_cast=False)
    assert wrong is not None
    assert wrong.ratio > 1
