"""Greedy text that begins where another's ends."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from merge_adapter.verify.answers import Batch, continued, greedy, taught
from merge_adapter.verify.loading import Kind, load_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(lm_base: Path) -> object:
    return load_model(lm_base, Kind.CAUSAL, dtype=torch.float32).model


@pytest.fixture
def prompts() -> Batch:
    """Two, the second padded on the left."""
    ids = torch.tensor([[20, 21, 22, 23], [0, 0, 24, 25]])
    return Batch(ids, torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]]))


@pytest.mark.parametrize("wrong", [0, 3, 7])
def test_a_model_writes_on_from_where_it_departs(model: object, prompts: Batch, wrong: int) -> None:
    """Another's text that differs from some place on: what comes out is what the model writes by itself."""
    own, _ = greedy(model, prompts, 8, CPU)
    other = own.clone()
    other[1, wrong:] = (other[1, wrong:] + 1) % 2048
    choices = taught(model, prompts, other, CPU)
    assert torch.equal(continued(model, prompts, other, choices, CPU), own)


def test_equal_text_is_not_written_again(prompts: Batch) -> None:
    """No model is asked."""
    text = torch.arange(6).reshape(2, 3)
    assert torch.equal(continued(None, prompts, text, text, CPU), text)
