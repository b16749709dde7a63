"""Ghosts: parameters with a shape and no storage."""

from __future__ import annotations

import pytest
import torch

from merge_adapter.methods.peft_layers.ghost import ghostly, is_ghost


@pytest.mark.parametrize("shape", [(), (1,), (3,), (4, 5), (2, 3, 4)])
def test_every_shape_has_a_ghost(shape: tuple[int, ...]) -> None:
    """Scalars as well: CLIP's temperature is one."""
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(torch.empty(shape, device="meta"))
    made = ghostly(module)
    assert made.weight.shape == shape
    assert made.weight.untyped_storage().nbytes() == 4
    assert is_ghost(made.weight) is (made.weight.numel() > 1)
