"""Names in adapter files: what PEFT writes stays, what tools around it leave is repaired, nothing is guessed."""

from __future__ import annotations

import pytest

from merge_adapter.errors import AccountingError
from merge_adapter.methods.adapter_file import PREFIX, repair_names

CLEAN = (
    f"{PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight",
    f"{PREFIX}model.layers.0.self_attn.q_proj.lora_B.weight",
    f"{PREFIX}model.layers.0.self_attn.q_proj.lora_B.bias",
    f"{PREFIX}model.layers.0.self_attn.q_proj.lora_magnitude_vector",
    f"{PREFIX}model.embed_tokens.lora_embedding_A",
    f"{PREFIX}model.embed_tokens.base_layer.weight",
    f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta",
    f"{PREFIX}model.layers.0.mlp.experts.base_layer.lora_A.weight",
    f"{PREFIX}score.weight",
    f"{PREFIX}model.norm.bias",
)


def test_what_peft_writes_is_left_alone() -> None:
    """Every form of name that `save_pretrained` makes."""
    repaired, notes = repair_names(CLEAN)
    assert repaired == {name: name for name in CLEAN}
    assert notes == ()


@pytest.mark.parametrize(
    ("wild", "clean"),
    [
        ("model.x.lora_A.weight", f"{PREFIX}model.x.lora_A.weight"),
        (f"{PREFIX}{PREFIX}{PREFIX}x.lora_A.weight", f"{PREFIX}x.lora_A.weight"),
        (f"{PREFIX}x.lora_A.default.weight", f"{PREFIX}x.lora_A.weight"),
        (f"{PREFIX}x.lora_A.default.default.weight", f"{PREFIX}x.lora_A.weight"),
        (f"{PREFIX}x.lora_embedding_B.default", f"{PREFIX}x.lora_embedding_B"),
        (f"{PREFIX}x.lora_magnitude_vector.default.weight", f"{PREFIX}x.lora_magnitude_vector.weight"),
        (f"{PREFIX}x.lora_magnitude_vector.weight", f"{PREFIX}x.lora_magnitude_vector.weight"),
        (
            f"{PREFIX}_fsdp_wrapped_module.x._fsdp_wrapped_module.y.lora_B.weight",
            f"{PREFIX}x.y.lora_B.weight",
        ),
        (f"module.{PREFIX}x.lora_B.weight", f"{PREFIX}x.lora_B.weight"),
        (f"_fsdp_wrapped_module.{PREFIX}x.lora_B.weight", f"{PREFIX}x.lora_B.weight"),
        (f"{PREFIX}x._checkpoint_wrapped_module.y.lora_B.weight", f"{PREFIX}x.y.lora_B.weight"),
        (f"{PREFIX}score.modules_to_save.default.weight", f"{PREFIX}score.modules_to_save.weight"),
        (f"{PREFIX}score.modules_to_save.weight", f"{PREFIX}score.modules_to_save.weight"),
    ],
)
def test_names_from_the_wild(wild: str, clean: str) -> None:
    """One name in, one name out, and a note exactly when it changed."""
    repaired, notes = repair_names([wild])
    assert repaired == {clean: wild}
    assert bool(notes) == (wild != clean)


def test_parts_of_a_trained_head_are_no_adapter_names() -> None:
    """`dense` and `out_proj` after `modules_to_save` are modules: there is more than one of them."""
    names = [f"{PREFIX}classifier.modules_to_save.{part}.weight" for part in ("dense", "out_proj")]
    repaired, _ = repair_names(names)
    assert list(repaired) == names


def test_two_adapters_in_one_file_are_refused() -> None:
    """Without their names they would be the same tensor."""
    with pytest.raises(AccountingError, match="the same one") as caught:
        repair_names([f"{PREFIX}x.lora_A.first.weight", f"{PREFIX}x.lora_A.second.weight"])
    assert len(caught.value.tensors) == 2
