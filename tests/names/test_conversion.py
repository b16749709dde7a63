"""The general name map says where transformers finds each parameter, and brings changed ones back to disk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from merge_adapter.methods.change import ModuleKind
from merge_adapter.names.architecture import Architecture, UnknownArchitecture, build
from merge_adapter.names.conversion import ConvertedNames, converted_names

DECODER = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 48, "max_position_embeddings": 32,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {
    **DECODER, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
}  # fmt: skip
ENCODER = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 48,
    "max_position_embeddings": 32, "pad_token_id": 0,
}  # fmt: skip
GPT2 = {
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 32,
    "vocab_size": 48,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAVA = {
    "text_config": {"model_type": "llama", **DECODER},
    "vision_config": {
        "model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": 8, "patch_size": 4, "projection_dim": 16,
    },
    "image_token_index": 47,
}  # fmt: skip


def legacy_norms(name: str) -> str:
    return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")


CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {**DECODER}),
    ("llama with a tied head", {**DECODER, "model_type": "llama", "tie_word_embeddings": True}),
    ("gpt2", GPT2),
    ("gpt2 as saved without its prefix", {**GPT2, "rename": lambda name: name.removeprefix("transformer.")}),
    ("bert", {**ENCODER, "auto_class": "AutoModelForMaskedLM"}),
    ("bert with gamma and beta", {**ENCODER, "auto_class": "AutoModelForMaskedLM", "rename": legacy_norms}),
    ("bert encoder in a classifier",
     {**ENCODER, "auto_class": "AutoModel", "load_as": "AutoModelForSequenceClassification"}),
    ("llama language model as encoder", {**DECODER, "load_as": "AutoModel"}),
    ("mixtral", EXPERTS),
    ("qwen3_moe", EXPERTS),
    ("nomic_bert", {**ENCODER, "auto_class": "AutoModelForMaskedLM"}),
    ("llava", {**LLAVA, "auto_class": "AutoModelForImageTextToText"}),
]  # fmt: skip


@pytest.mark.parametrize(("label", "case"), CASES, ids=[label for label, _ in CASES])
def test_every_loaded_parameter_is_found_on_disk(
    label: str, case: dict[str, Any], checkpoint: Callable[..., Any]
) -> None:
    """For each parameter of the loaded model the map names tensors on disk that hold exactly its values."""
    options = dict(case)
    options.pop("model_type", None)
    made = checkpoint(label.split()[0], **options)
    names = _names(made)
    new = {name for name in made.model.state_dict() if "classifier" in name}
    for name, value in made.model.named_parameters(remove_duplicate=False):
        disk, group = names.direct(name), names.group(name)
        if disk is not None:
            assert torch.equal(made.tensors[disk], value), name
        elif group is not None:
            loaded = group.load({spec.name: made.tensors[spec.name] for spec in group.tensors})
            assert torch.equal(loaded[name], value), name
            assert {spec.name: spec.shape for spec in group.parameters} == {
                parameter: tuple(tensor.shape) for parameter, tensor in loaded.items()
            }
        else:
            assert name in new or "pooler" in name, f"{name} was not found"


@pytest.mark.parametrize(("label", "case"), CASES, ids=[label for label, _ in CASES])
def test_groups_revert_bit_for_bit(label: str, case: dict[str, Any], checkpoint: Callable[..., Any]) -> None:
    """Loading a group and reverting it gives back the tensors on disk, under their names."""
    options = dict(case)
    options.pop("model_type", None)
    made = checkpoint(label.split()[0], **options)
    names = _names(made)
    for group in {id(group): group for group in names.groups.values()}.values():
        source = {spec.name: made.tensors[spec.name] for spec in group.tensors}
        back = group.revert(group.load(source))
        assert back.keys() == source.keys()
        assert all(torch.equal(back[name], source[name]) for name in source)


def test_one_fused_tensor_is_one_group(checkpoint: Callable[..., Any]) -> None:
    """Query, key and value of a fused Wqkv share a group: they can only be written together."""
    made = checkpoint("nomic_bert", auto_class="AutoModelForMaskedLM", **ENCODER)
    names = _names(made)
    group = next(iter(names.groups.values()))
    assert len(group.parameters) == 3
    assert len(group.tensors) == 1
    assert {names.group(spec.name) is group for spec in group.parameters} == {True}


def test_per_expert_tensors_are_one_group(checkpoint: Callable[..., Any]) -> None:
    """The experts of a layer lie apart on disk and together in memory."""
    made = checkpoint("qwen3_moe", **EXPERTS)
    group = _names(made).group("model.layers.0.mlp.experts.gate_up_proj")
    assert group is not None
    assert len(group.tensors) == 8
    assert [spec.shape for spec in group.parameters] == [(4, 32, 16)]


def test_tied_parameters_know_each_other(checkpoint: Callable[..., Any]) -> None:
    """A tied head has no tensor of its own: it answers with that of the embedding."""
    names = _names(checkpoint("llama", **DECODER, tie_word_embeddings=True))
    assert names.tied("lm_head.weight") == ("model.embed_tokens.weight",)
    assert names.tied("model.embed_tokens.weight") == ("lm_head.weight",)
    assert names.direct("lm_head.weight") == "model.embed_tokens.weight"
    assert names.tied("model.norm.weight") == ()


def test_new_tensors_follow_the_layout_on_disk(checkpoint: Callable[..., Any]) -> None:
    """A bias added to a module lies beside its weight, prefix or not; a new head keeps its own name."""
    made = checkpoint("gpt2", **GPT2, rename=lambda name: name.removeprefix("transformer."))
    assert _names(made).disk_name("transformer.h.0.mlp.c_fc.extra") == "h.0.mlp.c_fc.extra"
    made = checkpoint("llama", **DECODER, load_as="AutoModelForSequenceClassification")
    assert _names(made, "SEQ_CLS").disk_name("score.weight") == "score.weight"


def test_module_kinds(checkpoint: Callable[..., Any]) -> None:
    """Conv1D is told from Linear although both are two-dimensional."""
    names = _names(checkpoint("gpt2", **GPT2))
    assert names.kind("transformer.h.0.attn.c_proj") is ModuleKind.CONV1D
    assert names.kind("lm_head") is ModuleKind.LINEAR
    assert names.kind("transformer.wte") is ModuleKind.EMBEDDING
    assert names.kind("transformer.ln_f") is ModuleKind.OTHER
    assert names.exists("transformer.h.1.mlp")
    assert not names.exists("transformer.h.2.mlp")


def test_the_class_follows_the_task_and_the_modules(checkpoint: Callable[..., Any]) -> None:
    """The adapter's task type picks the class; modules that it lacks rule it out, with a reason."""
    folder = checkpoint("llama", **DECODER).folder
    made = build(folder, {"task_type": "SEQ_CLS"}, ["score"], trust_remote_code=False)
    assert isinstance(made, Architecture)
    assert made.class_name == "LlamaForSequenceClassification"
    made = build(folder, {"task_type": "CAUSAL_LM"}, ["layers.0.self_attn.q_proj"], trust_remote_code=False)
    assert isinstance(made, Architecture)
    assert made.class_name == "LlamaModel"
    made = build(folder, {"task_type": "CAUSAL_LM"}, ["transformer.h.0"], trust_remote_code=False)
    assert isinstance(made, UnknownArchitecture)
    assert "transformer.h.0" in made.reason


def _names(made: Any, task: str = "") -> ConvertedNames:
    """The general map of a checkpoint for the class its model was loaded as."""
    mapping = {"base_model_class": type(made.model).__name__, "parent_library": "transformers.models"}
    architecture = build(
        made.folder, {"auto_mapping": mapping, "task_type": task}, [], trust_remote_code=False
    )
    assert isinstance(architecture, Architecture)
    return converted_names(architecture.model, made.specs)
