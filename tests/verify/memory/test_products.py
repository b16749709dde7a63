"""Products in pieces, by several workers, are the products; and the same ones whatever the number of workers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from merge_adapter.verify.memory.lazy import LazyFloat, lazy, widen
from merge_adapter.verify.memory.products import RESIDENT, fast_products
from merge_adapter.verify.models.kinds import Kind
from merge_adapter.verify.models.loading import load_model

CPU = torch.device("cpu")


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def products(vectors: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    with torch.no_grad(), fast_products(CPU):
        return nn.functional.linear(vectors, weight, bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(3, 640), (2, 5, 640), (640,), (0, 640)])
@pytest.mark.parametrize("biased", [False, True])
def test_they_are_those_of_torch(dtype: torch.dtype, shape: tuple[int, ...], biased: bool) -> None:
    """Lazy weights and plain ones, any number of dimensions, to the rounding of fp32 sums."""
    generator = torch.Generator().manual_seed(0)
    stored = torch.randn(2001, 640, generator=generator).to(dtype)
    vectors = torch.randn(shape, generator=generator)
    bias = torch.randn(2001, generator=generator) if biased else None
    found = products(vectors, lazy(stored, CPU), bias)
    expected = nn.functional.linear(
        vectors.double(), stored.double(), None if bias is None else bias.double()
    )
    assert found.shape == expected.shape
    # 640 products, each rounded once and summed in fp32
    assert torch.allclose(found.double(), expected, atol=640 * 2.0**-24 * 30, rtol=0)


@pytest.mark.usefixtures("threads")
def test_the_bits_do_not_depend_on_the_number_of_threads() -> None:
    """One worker and three."""
    generator = torch.Generator().manual_seed(0)
    weight = lazy(torch.randn(3000, 700, generator=generator).bfloat16(), CPU)
    vectors = torch.randn(40, 700, generator=generator)
    found = []
    for count in (1, 3):
        torch.set_num_threads(count)
        found.append(products(vectors, weight, None))
        assert torch.get_num_threads() == count
    assert torch.equal(*found)


def test_pages_beyond_those_that_may_stay_are_let_go(tmp_path: Path) -> None:
    """Many vectors leave no weight in memory; few leave some, for the next step of a text."""
    save_file({"weight": torch.ones(2048, 1024).bfloat16()}, tmp_path / "weights.safetensors")
    stored = load_file(tmp_path / "weights.safetensors")["weight"]
    assert stored.nbytes < RESIDENT
    weight = lazy(stored, CPU)
    assert isinstance(weight, LazyFloat)
    few, many = torch.ones(1, 1024), torch.ones(64, 1024)
    assert bool((products(few, weight, None) == 1024).all())
    assert bool((products(many, weight, None) == 1024).all())
    assert bool((stored == 1).all())


def test_a_whole_model_answers_the_same_with_them(lm_base: Path) -> None:
    """Up to the order of fp32 sums."""
    model = load_model(lm_base, Kind.CAUSAL, dtype=torch.bfloat16).model
    widen(model, CPU)
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        with fast_products(CPU):
            fast = model(input_ids=ids).logits
    assert torch.allclose(plain, fast, atol=1e-4)
