"""Tied parameters and resized vocabularies: the merged model answers as the trained one did, whatever parted."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from merge_adapter.checkpoint.folder import Folder
from merge_adapter.errors import AccountingError, BaseModelError, MethodError, ShapeError
from merge_adapter.merge import merge
from merge_adapter.plan import MergePlan, make_plan
from merge_adapter.types import Adapter, BaseModel, MergeSettings, Resolved, Silent, Strategy
from merge_adapter.verify import VerifySettings, verify

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT and transformers advise people who train

TOLERANCE = 1e-4
"""Relative to the largest output, float32: merged and apart, sums are taken in another order."""
CAUSAL, MASKED, SEQ2SEQ = "AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModelForSeq2SeqLM"
SIZES: Mapping[str, Any] = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 48,
    "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": True,
}  # fmt: skip
CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "llama": {**SIZES, "num_key_value_heads": 2},
    "gemma3_text": {**SIZES, "num_key_value_heads": 2, "head_dim": 8},
    "bert": SIZES,
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "vocab_size": 48},
    "bart": {
        "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "vocab_size": 48,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 32,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2,
    },
    "t5": {
        "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2,
        "vocab_size": 48, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0,
    },
}  # fmt: skip


def load(auto: str, folder: Path, **keywords: Any) -> Any:
    import transformers

    return getattr(transformers, auto).from_pretrained(folder, **keywords).eval()


def save_base(folder: Path, model_type: str, auto: str, **changes: Any) -> Path:
    import transformers

    torch.manual_seed(1)
    config = transformers.CONFIG_MAPPING[model_type](**{**CONFIGS[model_type], **changes})
    model = getattr(transformers, auto).from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    return folder


def train(model: Any, config: Any, folder: Path, resize: int | None = None) -> Any:
    """The trained model, live, its adapter saved in `folder`."""
    import peft

    torch.manual_seed(2)
    if resize is not None:
        model.resize_token_embeddings(resize)
    made = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    made.save_pretrained(folder)
    return made


def sources(base: Path, adapter: Path) -> Resolved:
    config = json.loads((adapter / "adapter_config.json").read_text())
    return Resolved(
        (Adapter(Folder(adapter), config, config["peft_type"]),),
        BaseModel(Folder(base), json.loads((base / "config.json").read_text())),
        None,
    )


def deploy(base: Path, adapter: Path, output: Path, strategy: Strategy = Strategy.AUTO) -> MergePlan:
    settings, found = MergeSettings(strategy=strategy), sources(base, adapter)
    plan = make_plan(found, settings)
    output.mkdir()
    merge(plan, found, output, settings=settings, progress=Silent())
    (output / "config.json").write_text(json.dumps({**found.base.config, **plan.config_changes}))
    return plan


def answers(model: Any, tokens: int) -> torch.Tensor:
    ids = torch.arange(3, tokens)[None, -12:]
    more = {"decoder_input_ids": ids[:, :5]} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        found = model(input_ids=ids, **more)
    return torch.cat(
        [found[key].flatten() for key in ("logits", "start_logits", "last_hidden_state") if key in found]
    )


def assert_same_answers(auto: str, output: Path, trained: Any, tokens: int = 48) -> None:
    import transformers

    merged, info = getattr(transformers, auto).from_pretrained(output, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"] and not info["unexpected_keys"]
    expected = answers(trained, tokens)
    got = answers(merged.eval(), tokens)
    assert got.shape == expected.shape
    assert float((got - expected).abs().max()) <= TOLERANCE * float(expected.abs().max())


def assert_judged_right(base: Path, adapter: Path, output: Path) -> None:
    """The gate, without the outputs, which are compared above, finds nothing."""
    settings = VerifySettings(outputs=False)
    found = verify(output, sources(base, adapter), settings=settings, progress=Silent())
    told = [reason for reason in found.reasons if not reason.startswith(("note: ", "warning: "))]
    assert told == ["the outputs were not compared, as asked"], found.reasons


TIED: tuple[tuple[str, str, Mapping[str, Any], bool], ...] = (
    ("llama", CAUSAL, {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}, False),
    ("llama", CAUSAL, {"target_modules": ["lm_head"], "ensure_weight_tying": True}, False),
    ("llama", CAUSAL, {"target_modules": ["embed_tokens"], "ensure_weight_tying": True, "use_dora": True}, True),
    ("gpt2", CAUSAL, {"target_modules": ["wte"], "ensure_weight_tying": True}, True),
    ("gpt2", CAUSAL, {"target_modules": ["c_attn"], "modules_to_save": ["wte"], "ensure_weight_tying": True}, True),
    ("gpt2", CAUSAL, {"target_modules": ["c_attn"], "modules_to_save": ["te"]}, True),
    ("llama", CAUSAL, {"target_modules": ["q_proj"], "modules_to_save": ["head"]}, True),
    ("bert", MASKED, {"target_modules": ["decoder", "query"]}, True),
    ("bert", MASKED, {"target_modules": ["decoder", "query"], "bias": "all"}, True),
    ("bart", SEQ2SEQ, {"target_modules": ["embed_tokens", "q_proj"]}, True),
    ("bart", SEQ2SEQ, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, True),
    ("llama", CAUSAL,
     {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3, 4], "lm_head": [5]}}, True),
    ("llama", CAUSAL, {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3, 4]}}, False),
)  # fmt: skip


@pytest.mark.parametrize("strategy", [Strategy.AUTO, Strategy.MEMORY])
@pytest.mark.parametrize(("model_type", "auto", "config", "parts"), TIED)
def test_tied_parameters_part_exactly_when_training_parted_them(
    tmp_path: Path, model_type: str, auto: str, config: Mapping[str, Any], *, parts: bool, strategy: Strategy
) -> None:
    """Every tensor that the config then no longer ties is there, biases of the head included."""
    import peft

    base = save_base(tmp_path / "base", model_type, auto)
    trained = train(load(auto, base), peft.LoraConfig(r=2, **config), tmp_path / "adapter")
    plan = deploy(base, tmp_path / "adapter", tmp_path / "merged", strategy)
    if strategy is Strategy.AUTO:
        assert ("tie_word_embeddings" in plan.config_changes) is parts
    assert plan.consumed == plan.adapter_tensors
    assert_same_answers(auto, tmp_path / "merged", trained)
    assert_judged_right(base, tmp_path / "adapter", tmp_path / "merged")


def test_tokens_trained_below_an_adapted_head(tmp_path: Path) -> None:
    """PEFT sets the embedding's trained rows in the tied head too, and adds the head's LoRA on top."""
    import peft

    base = save_base(tmp_path / "base", "llama", CAUSAL)
    config = peft.LoraConfig(
        r=2, target_modules=["lm_head"], trainable_token_indices={"embed_tokens": [3, 4]}
    )
    trained = train(load(CAUSAL, base), config, tmp_path / "adapter")
    deploy(base, tmp_path / "adapter", tmp_path / "merged")
    assert_same_answers(CAUSAL, tmp_path / "merged", trained)


RESIZED: tuple[tuple[str, str, str, Mapping[str, Any], int], ...] = (
    ("llama", CAUSAL, CAUSAL, {"target_modules": ["lm_head", "q_proj"]}, 46),
    ("llama", CAUSAL, CAUSAL, {"target_modules": ["embed_tokens", "q_proj"]}, 51),
    ("llama", CAUSAL, CAUSAL, {"target_modules": ["q_proj"], "trainable_token_indices": [3, 48, 50]}, 51),
    ("llama", CAUSAL, CAUSAL,
     {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}, 51),
    ("gpt2", CAUSAL, CAUSAL, {"target_modules": ["c_attn"], "trainable_token_indices": {"wte": [50]}}, 51),
    ("gemma3_text", CAUSAL, CAUSAL, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, 51),
    ("gpt2", CAUSAL, CAUSAL, {"target_modules": ["c_attn"]}, 51),
    ("bart", SEQ2SEQ, SEQ2SEQ, {"target_modules": ["q_proj"]}, 51),
    ("bart", SEQ2SEQ, SEQ2SEQ, {"target_modules": ["q_proj"]}, 46),
    ("llama", CAUSAL, "AutoModel", {"target_modules": ["q_proj"], "task_type": "FEATURE_EXTRACTION"}, 51),
    ("bert", MASKED, "AutoModelForQuestionAnswering", {"target_modules": ["query"], "task_type": "QUESTION_ANS"}, 51),
)  # fmt: skip


@pytest.mark.parametrize(("model_type", "base_auto", "auto", "config", "tokens"), RESIZED)
def test_a_resized_vocabulary_is_followed_everywhere(
    tmp_path: Path, model_type: str, base_auto: str, auto: str, config: Mapping[str, Any], tokens: int
) -> None:
    """By tied partners, by the wrapper of trained tokens, by frozen biases; a head of another class is left out."""
    import peft

    tied = auto != "AutoModel"
    base = save_base(tmp_path / "base", model_type, base_auto, tie_word_embeddings=tied)
    trained = train(load(auto, base), peft.LoraConfig(r=2, **config), tmp_path / "adapter", resize=tokens)
    plan = deploy(base, tmp_path / "adapter", tmp_path / "merged")
    assert plan.config_changes["vocab_size"] == tokens
    assert_same_answers(auto, tmp_path / "merged", trained, tokens)
    assert_judged_right(base, tmp_path / "adapter", tmp_path / "merged")


@pytest.mark.parametrize("peft_type", ["OFTConfig", "LoraConfig"])
def test_a_resized_tied_embedding_stays_tied_under_pefts_own_layers(tmp_path: Path, peft_type: str) -> None:
    """The saved embedding replaces both; neither is left to be made up at loading."""
    import peft

    base = save_base(tmp_path / "base", "llama", CAUSAL)
    sizes = {"oft_block_size": 4, "r": 0} if peft_type == "OFTConfig" else {"r": 2}
    config = getattr(peft, peft_type)(target_modules=["q_proj"], **sizes)
    trained = train(load(CAUSAL, base), config, tmp_path / "adapter", resize=51)
    plan = deploy(base, tmp_path / "adapter", tmp_path / "merged", Strategy.MEMORY)
    assert "tie_word_embeddings" not in plan.config_changes
    assert_same_answers(CAUSAL, tmp_path / "merged", trained, 51)


def test_a_tensor_saved_twice_is_counted_under_pefts_own_layers(tmp_path: Path) -> None:
    """With bias="all" PEFT saves the biases of saved modules under their wrapper as well, and the originals."""
    import peft

    base = save_base(tmp_path / "base", "gpt2", CAUSAL)
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], modules_to_save=["ln_2"], bias="all")
    trained = train(load(CAUSAL, base), config, tmp_path / "adapter")
    plan = deploy(base, tmp_path / "adapter", tmp_path / "merged", Strategy.MEMORY)
    assert plan.consumed == plan.adapter_tensors
    assert_same_answers(CAUSAL, tmp_path / "merged", trained)
    assert_judged_right(base, tmp_path / "adapter", tmp_path / "merged")


def test_a_checkpoint_that_holds_two_values_is_not_tied_whatever_its_config_says(tmp_path: Path) -> None:
    """As flan-t5 is stored: transformers loads both, so a LoRA on the head changes the head alone."""
    import peft

    base = save_base(tmp_path / "base", "t5", SEQ2SEQ)
    stored = load_file(base / "model.safetensors")
    stored["lm_head.weight"] = torch.randn_like(stored["shared.weight"])
    save_file(stored, base / "model.safetensors", metadata={"format": "pt"})
    trained = train(
        load(SEQ2SEQ, base), peft.LoraConfig(r=2, target_modules=["lm_head", "q"]), tmp_path / "adapter"
    )
    plan = deploy(base, tmp_path / "adapter", tmp_path / "merged")
    assert "tie_word_embeddings" not in plan.config_changes
    assert_same_answers(SEQ2SEQ, tmp_path / "merged", trained)
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert torch.equal(merged["shared.weight"], stored["shared.weight"])


@pytest.mark.parametrize("apart", [True, False])
def test_one_value_between_the_samples_unties(tmp_path: Path, *, apart: bool) -> None:
    """Two copies of 4 MB that differ in a single element: transformers loads both, so each is its own."""
    import peft
    import transformers

    torch.manual_seed(1)
    base = tmp_path / "base"
    config = transformers.T5Config(
        d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=65536, decoder_start_token_id=0
    )
    transformers.T5ForConditionalGeneration(config).save_pretrained(base)
    stored = load_file(base / "model.safetensors")
    stored["lm_head.weight"] = stored["shared.weight"].clone()
    if apart:
        stored["lm_head.weight"][2100, 3] += 1.0
    save_file(stored, base / "model.safetensors", metadata={"format": "pt"})
    train(load(SEQ2SEQ, base), peft.LoraConfig(r=2, target_modules=["lm_head", "q"]), tmp_path / "adapter")
    found = sources(base, tmp_path / "adapter")
    if not apart:
        with pytest.raises(MethodError, match="ties for good"):
            make_plan(found, MergeSettings())
        return
    plan = make_plan(found, MergeSettings())
    assert "lm_head.weight" in {name for change in plan.changes for name in change.tensors}
    assert "shared.weight" not in {name for change in plan.changes for name in change.tensors}


def test_a_head_that_nobody_saved_is_refused(tmp_path: Path) -> None:
    """BART's classification head is no module that PEFT saves by itself; untrained or adapted, it was random."""
    import peft

    auto = "AutoModelForSequenceClassification"
    base = save_base(tmp_path / "base", "bart", SEQ2SEQ)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS")
    train(load(auto, base), config, tmp_path / "adapter")
    with pytest.raises(BaseModelError, match=r"classification_head\.dense\.weight.*random"):
        make_plan(sources(base, tmp_path / "adapter"), MergeSettings())
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "dense"], task_type="SEQ_CLS")
    train(load(auto, base), config, tmp_path / "other")
    with pytest.raises(AccountingError, match=r"classification_head\.dense\.weight.*random") as caught:
        make_plan(sources(base, tmp_path / "other"), MergeSettings())
    assert "modules_to_save" in caught.value.hint


def test_a_head_of_two_layers_brings_its_labels(tmp_path: Path) -> None:
    """BART's classification head, trained whole with five labels."""
    import peft

    auto = "AutoModelForSequenceClassification"
    base = save_base(tmp_path / "base", "bart", SEQ2SEQ)
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj"], task_type="SEQ_CLS", modules_to_save=["classification_head"]
    )
    train(load(auto, base, num_labels=5), config, tmp_path / "adapter")
    plan = deploy(base, tmp_path / "adapter", tmp_path / "merged")
    assert plan.config_changes["architectures"] == ["BartForSequenceClassification"]
    merged = load(auto, tmp_path / "merged")
    assert merged.config.num_labels == 5
    assert merged.classification_head.out_proj.weight.shape[0] == 5


def test_embeddings_that_were_resized_but_not_saved_are_refused(tmp_path: Path) -> None:
    """PEFT saves only the adapted one of two untied embeddings; the rows of the other are lost."""
    import peft

    base = save_base(tmp_path / "base", "llama", CAUSAL, tie_word_embeddings=False)
    train(
        load(CAUSAL, base), peft.LoraConfig(r=2, target_modules=["lm_head"]), tmp_path / "adapter", resize=51
    )
    with pytest.raises(ShapeError, match=r"embed_tokens\.weight") as caught:
        make_plan(sources(base, tmp_path / "adapter"), MergeSettings())
    assert "save_embedding_layers=True" in caught.value.hint


def test_a_tie_that_holds_for_good_is_refused(tmp_path: Path) -> None:
    """T5 scales its outputs by the tie; no checkpoint of it can say otherwise."""
    import peft

    base = save_base(tmp_path / "base", "t5", SEQ2SEQ)
    train(load(SEQ2SEQ, base), peft.LoraConfig(r=2, target_modules=["lm_head"]), tmp_path / "adapter")
    with pytest.raises(MethodError, match="for good"):
        make_plan(sources(base, tmp_path / "adapter"), MergeSettings())
