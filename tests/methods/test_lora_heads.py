"""Heads, vocabularies and experts: what an adapter adds to its base, and what the config then says."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from merge_adapter.checkpoint.folder import Folder
from merge_adapter.errors import AccountingError, BaseModelError, ShapeError
from merge_adapter.merge import merge
from merge_adapter.plan import MergePlan, make_plan
from merge_adapter.types import Adapter, BaseModel, MergeSettings, Resolved, Silent

SIZES = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 48,
    "max_position_embeddings": 32, "pad_token_id": 0,
}  # fmt: skip


@contextmanager
def quietly() -> Iterator[None]:
    """PEFT and transformers advise people who train; these tests only build adapters."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def save_base(folder: Path, model_type: str, auto: str, **changes: Any) -> Path:
    import transformers

    torch.manual_seed(1)
    sizes = {**SIZES, **({"num_key_value_heads": 2} if model_type in ("llama", "qwen2") else {}), **changes}
    with quietly():
        config = transformers.CONFIG_MAPPING[model_type](**sizes)
        getattr(transformers, auto).from_config(config).save_pretrained(folder)
    return folder


def save_adapter(folder: Path, model: Any, config: Any, **saving: Any) -> Path:
    """Wrap the model, move every trained weight, save."""
    import peft

    with quietly(), torch.no_grad():
        made = peft.get_peft_model(model, config)
        generator = torch.Generator().manual_seed(3)
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        made.save_pretrained(folder, **saving)
    return folder


def load(auto: str, folder: Path, **keywords: Any) -> Any:
    import transformers

    with quietly():
        return getattr(transformers, auto).from_pretrained(folder, **keywords).eval()


def sources(base: Path, adapter: Path) -> Resolved:
    config = json.loads((adapter / "adapter_config.json").read_text())
    return Resolved(
        (Adapter(Folder(adapter), config, config["peft_type"]),),
        BaseModel(Folder(base), json.loads((base / "config.json").read_text())),
        None,
    )


def deploy(base: Path, adapter: Path, output: Path) -> MergePlan:
    """Merge, and write the config as it must be."""
    output.mkdir()
    found = sources(base, adapter)
    with quietly():
        plan = make_plan(found, MergeSettings())
    merge(plan, found, output, settings=MergeSettings(), progress=Silent())
    config = dict(found.base.config) | dict(plan.config_changes)
    (output / "config.json").write_text(json.dumps(config))
    return plan


def answers(model: Any) -> torch.Tensor:
    ids = torch.arange(1, 21).reshape(2, 10)
    with torch.no_grad():
        found = model(input_ids=ids)
    return torch.cat([value.flatten() for value in found.values() if isinstance(value, torch.Tensor)])


@pytest.mark.parametrize(
    ("model_type", "base_class", "auto", "task", "labels"),
    [
        ("llama", "AutoModelForCausalLM", "AutoModelForSequenceClassification", "SEQ_CLS", 3),
        ("qwen2", "AutoModelForCausalLM", "AutoModelForSequenceClassification", "SEQ_CLS", 1),
        ("bert", "AutoModelForPreTraining", "AutoModelForSequenceClassification", "SEQ_CLS", 5),
        ("roberta", "AutoModelForMaskedLM", "AutoModelForSequenceClassification", "SEQ_CLS", 3),
        ("bert", "AutoModelForMaskedLM", "AutoModelForTokenClassification", "TOKEN_CLS", 7),
        ("bert", "AutoModelForMaskedLM", "AutoModelForQuestionAnswering", "QUESTION_ANS", 2),
        ("bert", "AutoModelForSequenceClassification", "AutoModelForSequenceClassification", "SEQ_CLS", 4),
    ],
)
def test_a_trained_head_comes_with_its_config(
    tmp_path: Path, model_type: str, base_class: str, auto: str, task: str, labels: int
) -> None:
    """The base lacks the head, or has one of another size; the merged model is of the adapter's class."""
    import peft

    base = save_base(tmp_path / "base", model_type, base_class, max_position_embeddings=40)
    keywords = {"num_labels": labels} if task != "QUESTION_ANS" else {}
    fresh = load(auto, base, **keywords, ignore_mismatched_sizes=True)
    names = ["q_proj", "v_proj"] if model_type in ("llama", "qwen2") else ["query", "value"]
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=names, task_type=task)
    adapter = save_adapter(tmp_path / "adapter", fresh, config)
    plan = deploy(base, adapter, tmp_path / "merged")
    assert plan.consumed == plan.adapter_tensors
    import transformers

    with quietly():
        merged, info = getattr(transformers, auto).from_pretrained(
            tmp_path / "merged", output_loading_info=True
        )
        adapted = peft.PeftModel.from_pretrained(
            load(auto, base, **keywords, ignore_mismatched_sizes=True), adapter
        ).eval()
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert merged.config.architectures == [type(merged).__name__]
    assert merged.num_labels == labels
    torch.testing.assert_close(answers(merged.eval()), answers(adapted), rtol=1e-5, atol=1e-5)


def test_a_head_that_nobody_saved_is_refused(tmp_path: Path) -> None:
    """BERT's classifier reads a pooler; this base has none, so training ran on a random one that is lost."""
    import peft

    base = save_base(tmp_path / "base", "bert", "AutoModelForMaskedLM")
    config = peft.LoraConfig(r=4, target_modules=["query"], task_type="SEQ_CLS")
    adapter = save_adapter(tmp_path / "adapter", load("AutoModelForSequenceClassification", base), config)
    with pytest.raises(BaseModelError, match=r"bert\.pooler\.dense\.weight"):
        make_plan(sources(base, adapter), MergeSettings())


def test_feature_extraction_keeps_the_base_as_it_is(tmp_path: Path) -> None:
    """An adapter of the encoder alone changes its layers; head and class of the checkpoint stay."""
    import peft

    base = save_base(tmp_path / "base", "bert", "AutoModelForMaskedLM")
    config = peft.LoraConfig(r=4, target_modules=["query"], task_type="FEATURE_EXTRACTION")
    adapter = save_adapter(tmp_path / "adapter", load("AutoModel", base), config)
    plan = deploy(base, adapter, tmp_path / "merged")
    assert "architectures" not in plan.config_changes
    merged = load("AutoModelForMaskedLM", tmp_path / "merged")
    with quietly():
        adapted = peft.PeftModel.from_pretrained(load("AutoModel", base), adapter).eval()
    ids = torch.arange(1, 9).reshape(1, 8)
    with torch.no_grad():
        mine = merged.bert(input_ids=ids).last_hidden_state
        theirs = adapted(input_ids=ids).last_hidden_state
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("saved", ["by size", "modules_to_save"])
def test_a_grown_vocabulary_is_followed(tmp_path: Path, *, tied: bool, saved: str) -> None:
    """Embeddings resized before training, saved by PEFT either way, make the merged model as large."""
    import peft

    base = save_base(tmp_path / "base", "llama", "AutoModelForCausalLM", tie_word_embeddings=tied)
    fresh = load("AutoModelForCausalLM", base)
    fresh.resize_token_embeddings(53, mean_resizing=False)
    trained = {"modules_to_save": ["embed_tokens", "lm_head"]} if saved == "modules_to_save" else {}
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", **trained)
    adapter = save_adapter(tmp_path / "adapter", fresh, config)
    plan = deploy(base, adapter, tmp_path / "merged")
    assert plan.config_changes["vocab_size"] == 53
    merged = load("AutoModelForCausalLM", tmp_path / "merged")
    resized = load("AutoModelForCausalLM", base)
    resized.resize_token_embeddings(53, mean_resizing=False)
    with quietly():
        adapted = peft.PeftModel.from_pretrained(resized, adapter).eval()
    torch.testing.assert_close(answers(merged), answers(adapted), rtol=1e-5, atol=1e-5)
    assert merged.config.tie_word_embeddings is (tied and saved == "by size")


def test_a_vocabulary_saved_in_part_is_refused(tmp_path: Path) -> None:
    """With the head still of the base's size the merged model would not even load."""
    import peft

    base = save_base(tmp_path / "base", "llama", "AutoModelForCausalLM", tie_word_embeddings=False)
    fresh = load("AutoModelForCausalLM", base)
    fresh.resize_token_embeddings(53, mean_resizing=False)
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    adapter = save_adapter(tmp_path / "adapter", fresh, config, save_embedding_layers=False)
    with pytest.raises(ShapeError, match="vocabulary was resized from 48 to 53") as caught:
        make_plan(sources(base, adapter), MergeSettings())
    assert "lm_head.weight" in caught.value.message


def test_lora_on_embeddings_of_another_size_is_said_as_such(tmp_path: Path) -> None:
    """A LoRA on a resized embedding whose new rows were not saved names the vocabulary, not only a shape."""
    import peft

    base = save_base(tmp_path / "base", "llama", "AutoModelForCausalLM", tie_word_embeddings=False)
    fresh = load("AutoModelForCausalLM", base)
    fresh.resize_token_embeddings(53, mean_resizing=False)
    with quietly():
        made = peft.get_peft_model(fresh, peft.LoraConfig(r=4, target_modules=["embed_tokens"]))
        made.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    with pytest.raises(ShapeError, match="expected \\[48, 16\\]") as caught:
        make_plan(sources(base, tmp_path / "adapter"), MergeSettings())
    assert "vocabulary of 53 tokens" in caught.value.hint


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_lora_on_fused_experts_is_written_back_expert_by_expert(
    bench: Callable[..., Any], tmp_path: Path, model_type: str
) -> None:
    """`target_parameters` on parameters that transformers fuses while loading; the disk keeps one tensor each."""
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    made = bench(
        "LORA", model_type=model_type, r=2, lora_alpha=8, target_modules=["q_proj"], target_parameters=names
    )
    plan = made.plan()
    assert plan.consumed == plan.adapter_tensors
    found, expected, stored = made.merge(tmp_path / "merged"), made.expected(), made.stored()
    assert found.keys() == stored.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=2e-6, atol=1e-7)
    experts = [name for name in found if ".experts." in name]
    assert experts
    assert not any(torch.equal(found[name], stored[name]) for name in experts)


def test_tensors_without_a_target_are_all_named(tmp_path: Path) -> None:
    """An adapter of another architecture matches nothing: every tensor is in the error."""
    import peft

    other = save_base(tmp_path / "other", "llama", "AutoModelForCausalLM", num_hidden_layers=3)
    base = save_base(tmp_path / "base", "llama", "AutoModelForCausalLM")
    config = peft.LoraConfig(r=4, target_modules=["q_proj"])
    adapter = save_adapter(tmp_path / "adapter", load("AutoModelForCausalLM", other), config)
    with pytest.raises(AccountingError) as caught:
        make_plan(sources(base, adapter), MergeSettings())
    assert caught.value.tensors == tuple(
        f"base_model.model.model.layers.2.self_attn.q_proj.lora_{part}.weight" for part in "AB"
    )
