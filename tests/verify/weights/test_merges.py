"""What PEFT's own layers merge to is held for a few tensors and made again for the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import nn

from merge_adapter.verify.memory.lazy import LazyFloat, widen
from merge_adapter.verify.weights import expectations
from merge_adapter.verify.weights.merges import OwnMerge

CONFIGS: dict[str, Callable[[], Any]] = {
    "LoHa": lambda: peft.LoHaConfig(
        r=4, alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"
    ),
    "tokens": lambda: peft.LoraConfig(
        r=4,
        target_modules=["q_proj"],
        trainable_token_indices={"embed_tokens": [3, 5]},
        task_type="CAUSAL_LM",
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_merge_made_again_gives_the_same_report(
    name: str, random_merge: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With no room for any of them, and after the layers compute in fp32: every figure of every part is the same."""
    right = random_merge(CONFIGS[name](), "bf16")
    asked = {"outputs": True, "isolated": False, "probe_tokens": 64, "greedy_tokens": 2, "full_mutants": True}
    held = right.judge(**asked)
    monkeypatch.setattr(expectations, "ROOM", 0)
    made = right.judge(**asked)
    assert made.verdict is held.verdict
    assert made.reasons == held.reasons
    for part in ("weights", "modules", "mutants", "outputs", "greedy"):
        assert made.evidence[part] == held.evidence[part], part


def layer() -> Any:
    """A linear layer of bf16 with a LoHa that adds something, as PEFT builds it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8)).bfloat16()
    wrapped = peft.get_peft_model(model, peft.LoHaConfig(r=2, target_modules=["0"], init_weights=False))
    return wrapped.base_model.model[0]


def test_later_changes_of_the_layer_do_not_reach_its_merge() -> None:
    """The gate puts fp32 in the place of a layer's parameters; what the merge is made from stays as it was stored."""
    module = layer()
    own = OwnMerge(module)
    exact = own.exact()
    assert exact is not None
    before = own.merges("weight")
    widen(module, torch.device("cpu"))
    assert isinstance(module.get_base_layer().weight, LazyFloat)
    after = own.merges("weight")
    assert after.target.dtype == torch.float64
    assert torch.equal(exact["weight"], after.target)
    assert after.native is not None
    assert after.native.dtype == torch.bfloat16
    for one, other in ((before.target, after.target), (before.native, after.native)):
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)


def test_too_little_memory_is_no_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A merge in fp64 that does not fit is not replaced by a coarser one in silence."""
    module = layer()

    def short(*_args: Any, **_named: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")

    monkeypatch.setattr(type(module), "merge", short)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        OwnMerge(module).exact()
