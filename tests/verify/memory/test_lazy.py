"""Lazy fp32 weights give the bits of `.float()` and hold no fp32 copy."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from merge_adapter.verify.memory.lazy import LazyFloat, lazy, set_tensor, widen
from merge_adapter.verify.models.kinds import Kind
from merge_adapter.verify.models.loading import load_model

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_linear_embedding_and_attention_arithmetic_have_the_bits_of_float(dtype: torch.dtype) -> None:
    """Matrix products, lookups, transposes and sums of a lazy tensor equal those of its fp32 copy."""
    generator = torch.Generator().manual_seed(0)
    stored = torch.randn(12, 8, generator=generator).to(dtype)
    made, wide = lazy(stored, CPU), stored.float()
    vectors = torch.randn(3, 8, generator=generator)
    assert isinstance(made, LazyFloat)
    assert made.dtype == torch.float32
    assert torch.equal(nn.functional.linear(vectors, made), nn.functional.linear(vectors, wide))
    ids = torch.tensor([[0, 11], [5, 5]])
    assert torch.equal(nn.functional.embedding(ids, made), nn.functional.embedding(ids, wide))
    assert torch.equal(made.t() @ made, wide.t() @ wide)
    assert torch.equal(made[2:5].sum(0), wide[2:5].sum(0))


def test_a_tensor_that_is_fp32_already_is_left_alone() -> None:
    """Nothing to widen."""
    stored = torch.randn(3)
    assert lazy(stored, CPU) is stored


def test_a_whole_model_answers_as_its_fp32_copy_does(lm_base: Path) -> None:
    """The bf16 Llama, widened lazily and converted whole; ties stay ties."""
    left = load_model(lm_base, Kind.CAUSAL, dtype=torch.bfloat16).model
    right = load_model(lm_base, Kind.CAUSAL, dtype=torch.float32).model
    widen(left, CPU)
    assert left.lm_head.weight is left.model.embed_tokens.weight
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        assert torch.equal(left(input_ids=ids).logits, right(input_ids=ids).logits)


def test_a_tensor_can_be_put_in_a_parameter_s_place() -> None:
    """Lazy or plain, parameter or buffer."""
    layer = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    set_tensor(layer, "0.weight", lazy(torch.eye(2).bfloat16() * 3, CPU))
    set_tensor(layer, "1.running_mean", torch.tensor([1.0, 2.0]))
    with torch.no_grad():
        assert torch.equal(layer[0](torch.ones(1, 2)) - layer[0].bias, torch.full((1, 2), 3.0))
    assert layer[1].running_mean.tolist() == [1, 2]
