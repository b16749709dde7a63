"""Weights that lie on disk in another form than in memory: experts one by one, fused projections, tied embeddings."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import gaps
from safetensors.torch import load_file, save_file

ATTENTION = ["q_proj", "v_proj"]


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_attention_beside_experts(model_type: str, bench: Callable[..., Any], tmp_path: Path) -> None:
    """A method that changes attention leaves the per-expert tensors as they lie on disk."""
    made = bench("LOHA", model_type=model_type, r=4, alpha=8, target_modules=ATTENTION)
    merged, stored = made.merge(tmp_path / "out"), made.stored()
    assert any(".experts.3." in name for name in merged)
    assert gaps(merged, made.expected()) == {}
    assert {name for name in merged if not torch.equal(merged[name], stored[name])} == {
        f"model.layers.{layer}.self_attn.{name}.weight" for layer in (0, 1) for name in ATTENTION
    }


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_experts_of_transformers_4(model_type: str, bench: Callable[..., Any], tmp_path: Path) -> None:
    """A LoRA on every expert, saved when experts were modules, gives W + B A alpha / r for each expert on disk."""
    made = bench("LORA", model_type=model_type, r=4, lora_alpha=8, target_modules=ATTENTION)
    file = made.adapter / "adapter_model.safetensors"
    tensors, stored = dict(load_file(file)), made.stored()
    experts = sorted(name for name in stored if ".experts." in name)
    torch.manual_seed(4)
    deltas = {}
    for name in experts:
        module = f"base_model.model.{name.removesuffix('.weight')}"
        down, up = torch.randn(4, stored[name].shape[1]), torch.randn(stored[name].shape[0], 4)
        tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"] = down, up
        deltas[name] = up.double() @ down.double() * 2
    save_file(tensors, file, metadata={"format": "pt"})
    config_file = made.adapter / "adapter_config.json"
    config = json.loads(config_file.read_text())
    config["target_modules"] = [*ATTENTION, *sorted({name.split(".")[-2] for name in experts})]
    config_file.write_text(json.dumps(config))

    plan, merged = made.plan(), made.merge(tmp_path / "out")
    assert plan.consumed == plan.adapter_tensors == len(tensors)
    assert list(merged) == list(stored)
    for name, delta in deltas.items():
        expected = stored[name].double() + delta
        assert float((merged[name].double() - expected).abs().max()) < 1e-5, name
    assert gaps(merged, made.expected()) == {}


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_experts_by_parameter_name(model_type: str, bench: Callable[..., Any], tmp_path: Path) -> None:
    """LoRA on the fused expert parameters comes out expert by expert."""
    made = bench(
        "LORA",
        model_type=model_type,
        r=2,
        lora_alpha=4,
        target_modules=ATTENTION,
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )
    merged, expected, stored = made.merge(tmp_path / "out"), made.expected(), made.stored()
    worst = gaps(merged, expected)
    assert max(worst.values(), default=0.0) < 1e-6, worst
    changed = {name for name in merged if not torch.equal(merged[name], stored[name])}
    assert {name for name in stored if ".experts." in name} <= changed


@pytest.mark.parametrize(
    ("peft_type", "config"),
    [
        ("LOHA", {"r": 4, "alpha": 8}),
        ("OFT", {"r": 0, "oft_block_size": 4, "use_cayley_neumann": False}),
        ("IA3", {"feedforward_modules": []}),
    ],
)
def test_one_projection_of_a_fused_tensor(
    peft_type: str, config: dict[str, Any], bench: Callable[..., Any], tmp_path: Path
) -> None:
    """Query and value of a Wqkv that is one tensor on disk: its key part stays bit for bit."""
    made = bench(peft_type, model_type="nomic_bert", target_modules=ATTENTION, **config)
    merged, stored = made.merge(tmp_path / "out"), made.stored()
    assert gaps(merged, made.expected()) == {}
    fused = [name for name in stored if "qkv" in name.lower() and name.endswith("weight")]
    assert len(fused) == 2
    for name in fused:
        query, key, value = merged[name].chunk(3)
        assert torch.equal(key, stored[name].chunk(3)[1])
        assert not torch.equal(query, stored[name].chunk(3)[0])
        assert not torch.equal(value, stored[name].chunk(3)[2])


def test_trained_tokens_of_tied_embeddings_stay_tied(bench: Callable[..., Any], tmp_path: Path) -> None:
    """PEFT trains the rows of both; one tensor is written and the config keeps its tie."""
    made = bench("TRAINABLE_TOKENS", model_type="gpt2", token_indices=[3, 5], target_modules=["wte"])
    plan, merged, stored = made.plan(), made.merge(tmp_path / "out"), made.stored()
    assert dict(plan.config_changes) == {}
    assert list(merged) == list(stored)
    rows = (
        (merged["transformer.wte.weight"] != stored["transformer.wte.weight"]).any(dim=1).nonzero().flatten()
    )
    assert rows.tolist() == [3, 5]


def test_a_tied_embedding_that_changes_alone_is_untied(bench: Callable[..., Any], tmp_path: Path) -> None:
    """The head keeps the values it had in training, in a tensor of its own, and the config says so."""
    made = bench(
        "VBLORA",
        changes={"tie_word_embeddings": True},
        r=2,
        num_vectors=8,
        vector_length=4,
        target_modules=["lm_head"],
    )
    plan, merged, stored = made.plan(), made.merge(tmp_path / "out"), made.stored()
    assert "lm_head.weight" not in stored
    assert plan.config_changes["tie_word_embeddings"] is False
    assert torch.equal(merged["model.embed_tokens.weight"], stored["model.embed_tokens.weight"])
    assert not torch.equal(merged["lm_head.weight"], stored["model.embed_tokens.weight"])
    config_file = tmp_path / "out" / "config.json"
    config = json.loads((made.base / "config.json").read_text())
    config_file.write_text(json.dumps({**config, **plan.config_changes}))
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    tokens = torch.arange(1, 9)[None]
    with torch.no_grad():
        gap = (model(input_ids=tokens).logits - made.adapted()(input_ids=tokens).logits).abs().max()
    assert float(gap) < 1e-5
