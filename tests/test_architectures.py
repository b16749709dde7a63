"""Model families of transformers, built tiny from their configs: a LoRA merged by streaming equals base + adapter.

For each family a base is saved by transformers and a LoRA on every linear layer by PEFT, with non-zero effect.
The merge is planned and written from the files; the result is loaded by transformers, each of its parameters is
compared with PEFT's merge in memory, and its outputs with those of base + adapter, all in float32. The gate must agree.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from merge_adapter.checkpoint.folder import Folder
from merge_adapter.errors import AccountingError, MethodError, PolicyError, UnmergeableError
from merge_adapter.merge import merge
from merge_adapter.plan import make_plan
from merge_adapter.types import Adapter, BaseModel, MergeSettings, Resolved, Silent, Strategy, Verdict
from merge_adapter.verify import VerifySettings, verify

TOLERANCE = 1e-5
"""Of a parameter: one sum in float32, made in another order than PEFT's. Of an output: relative to its largest value;
products of thin matrices, then whole layers, round differently merged and apart."""
OUTPUT_TOLERANCE = 2e-4

DECODER = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 64, "max_position_embeddings": 32,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {
    **DECODER, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "n_shared_experts": 1, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "decoder_sparse_step": 1, "mlp_only_layers": [],
}  # fmt: skip
LATENT = {
    **EXPERTS, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
    "num_key_value_heads": 2, "head_dim": 4,
}  # fmt: skip
GPT = {
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 32,
    "vocab_size": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ENCODER = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64,
    "max_position_embeddings": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1,
    "sep_token_id": 2,
}  # fmt: skip
SEQ2SEQ = {
    "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "vocab_size": 64, "max_position_embeddings": 32, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2,
}  # fmt: skip
T5 = {
    "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 2, "vocab_size": 64,
    "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8,
    "patch_size": 4, "num_channels": 3, "projection_dim": 16, "vision_use_head": False,
}  # fmt: skip
AUDIO = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64,
    "conv_dim": [16, 16], "conv_stride": [2, 2], "conv_kernel": [3, 3], "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "pad_token_id": 0,
}  # fmt: skip
QWEN_VISION = {
    "depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 1,
    "temporal_patch_size": 1, "in_chans": 3, "in_channels": 3, "intermediate_size": 32, "mlp_ratio": 2,
    "out_hidden_size": 16, "fullatt_block_indexes": [1], "window_size": 8,
}  # fmt: skip
MROPE = {
    **DECODER,
    "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
}


@dataclass(frozen=True)
class Family:
    """One architecture and how to run it."""

    config: Mapping[str, Any]
    auto: str = "AutoModelForCausalLM"
    inputs: str = "tokens"
    """`tokens`, `seq2seq`, `pixels`, `audio`, `mel` or `pair` (tokens and pixels)."""
    targets: Any = "all-linear"
    arguments: Mapping[str, Any] = field(default_factory=dict)


def _language(*names: str, config: Mapping[str, Any] = DECODER) -> dict[str, Family]:
    return {name: Family(config) for name in names}


def _classifier(*names: str) -> dict[str, Family]:
    return {name: Family(ENCODER, "AutoModelForSequenceClassification") for name in names}


def _sequence(*names: str, config: Mapping[str, Any]) -> dict[str, Family]:
    return {name: Family(config, "AutoModelForSeq2SeqLM", "seq2seq") for name in names}


def _with_images(text: Mapping[str, Any], vision: Mapping[str, Any], **more: Any) -> Family:
    config = {"text_config": dict(text), "vision_config": dict(vision), **more}
    return Family(config, "AutoModelForImageTextToText")


FAMILIES: dict[str, Family] = {
    **_language(
        "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "olmo2", "stablelm",
        "starcoder2", "cohere2", "granite", "glm4", "smollm3", "nemotron", "exaone4", "persimmon", "helium",
    ),
    "gpt2": Family(GPT, targets=["c_attn", "c_proj", "c_fc"]),
    "gpt_neox": Family(ENCODER),
    "gptj": Family({**GPT, "rotary_dim": 4}),
    "gpt_bigcode": Family(GPT),
    "opt": Family({**DECODER, "ffn_dim": 32, "word_embed_proj_dim": 16}),
    "bloom": Family({"hidden_size": 16, "n_layer": 2, "n_head": 2, "vocab_size": 64}),
    "falcon": Family({"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}),
    "mpt": Family({"d_model": 16, "n_layers": 2, "n_heads": 2, "vocab_size": 64, "max_seq_len": 32}),
    **_language(
        "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "gpt_oss", "ernie4_5_moe", "glm4_moe",
        config=EXPERTS,
    ),
    "phimoe": Family(EXPERTS, targets=["q_proj", "k_proj", "v_proj", "o_proj"]),
    **_language("deepseek_v2", "deepseek_v3", config=LATENT),
    **_classifier("bert", "roberta", "electra", "deberta-v2", "modernbert", "nomic_bert", "albert", "mpnet"),
    "distilbert": Family(
        {"dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 2, "vocab_size": 64, "max_position_embeddings": 32},
        "AutoModelForSequenceClassification",
    ),
    **_sequence("bart", "mbart", "pegasus", "marian", config=SEQ2SEQ),
    **_sequence("t5", "umt5", "switch_transformers", config=T5),
    "whisper": Family(
        {**SEQ2SEQ, "num_mel_bins": 8, "max_source_positions": 8, "max_target_positions": 16},
        "AutoModelForSpeechSeq2Seq", "mel",
    ),
    "wav2vec2": Family(AUDIO, "AutoModelForCTC", "audio", targets=["q_proj", "v_proj", "intermediate_dense"]),
    "hubert": Family(AUDIO, "AutoModelForCTC", "audio", targets=["q_proj", "v_proj", "intermediate_dense"]),
    "mamba": Family({"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 64, "state_size": 4},
                    targets=["in_proj", "x_proj", "embeddings"]),
    "mamba2": Family(
        {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 64, "state_size": 4, "num_heads": 4, "head_dim": 8,
         "n_groups": 1, "chunk_size": 8}, targets=["in_proj"],
    ),
    "falcon_mamba": Family({"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 64, "state_size": 4},
                           targets=["in_proj", "x_proj"]),
    "jamba": Family(
        {**EXPERTS, "mamba_d_state": 4, "mamba_dt_rank": 2, "attn_layer_period": 2, "attn_layer_offset": 1,
         "expert_layer_period": 2, "expert_layer_offset": 1},
        targets=["q_proj", "v_proj", "in_proj", "x_proj", "embed_tokens"],
    ),
    "recurrent_gemma": Family({**DECODER, "num_hidden_layers": 3, "lru_width": 16, "attention_window_size": 8}),
    "bamba": Family(
        {**DECODER, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_n_groups": 1,
         "attn_layer_indices": [1]}, targets=["q_proj", "v_proj", "in_proj"],
    ),
    "llava": _with_images({"model_type": "llama", **DECODER}, {"model_type": "clip_vision_model", **VISION},
                          image_token_index=63),
    "llava_next": _with_images({"model_type": "llama", **DECODER}, {"model_type": "clip_vision_model", **VISION},
                               image_token_index=63, image_grid_pinpoints=[[8, 8]]),
    "paligemma": _with_images({"model_type": "gemma", **DECODER}, {"model_type": "siglip_vision_model", **VISION},
                              image_token_index=63, projection_dim=16, hidden_size=16),
    "gemma3": _with_images({"model_type": "gemma3_text", **DECODER}, {"model_type": "siglip_vision_model", **VISION},
                           image_token_index=63, mm_tokens_per_image=4),
    "shieldgemma2": Family(
        {"text_config": {"model_type": "gemma3_text", **DECODER},
         "vision_config": {"model_type": "siglip_vision_model", **VISION}, "image_token_index": 63,
         "mm_tokens_per_image": 4, "yes_token_index": 5, "no_token_index": 6}, "AutoModelForImageClassification",
    ),
    "idefics3": _with_images({"model_type": "llama", **DECODER}, VISION, image_token_id=63, scale_factor=2),
    "qwen2_vl": _with_images(MROPE, QWEN_VISION, image_token_id=63),
    "qwen2_5_vl": _with_images(MROPE, QWEN_VISION, image_token_id=63),
    "vit": Family(VISION, "AutoModelForImageClassification", "pixels", targets=["q_proj", "v_proj", "fc1"]),
    "dinov2": Family(VISION, "AutoModelForImageClassification", "pixels", targets=["q_proj", "v_proj", "fc1"]),
    "clip": Family(
        {"text_config": {**ENCODER, "max_position_embeddings": 16}, "vision_config": VISION, "projection_dim": 16},
        "AutoModel", "pair",
    ),
}  # fmt: skip


@contextmanager
def quietly() -> Iterator[None]:
    """Tiny configs draw advice from transformers and PEFT that says nothing about merging."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def make_base(model_type: str, family: Family, folder: Path) -> None:
    """Save a base whose norms and biases are not trivial."""
    import transformers

    torch.manual_seed(3)
    config = transformers.CONFIG_MAPPING[model_type](**family.config)
    model = getattr(transformers, family.auto).from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)


def make_adapter(model: Any, family: Family, folder: Path) -> None:
    """Save a LoRA on the family's targets; ranks and factors large enough to move the outputs."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(4)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=family.targets)
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    adapted.save_pretrained(folder)


def inputs_of(family: Family) -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    tokens = torch.arange(3, 11)[None]
    return {
        "tokens": lambda: {"input_ids": tokens},
        "seq2seq": lambda: {"input_ids": tokens, "decoder_input_ids": tokens[:, :4]},
        "pixels": lambda: {"pixel_values": torch.randn(1, 3, 8, 8)},
        "audio": lambda: {"input_values": torch.randn(1, 64)},
        "mel": lambda: {"input_features": torch.randn(1, 8, 16), "decoder_input_ids": tokens[:, :4]},
        "pair": lambda: {"input_ids": tokens, "pixel_values": torch.randn(1, 3, 8, 8)},
    }[family.inputs]()


def first_output(model: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        made = model(**inputs)
    return made.logits if getattr(made, "logits", None) is not None else made[0]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_streamed_merge_equals_base_and_adapter(model_type: str, tmp_path: Path) -> None:
    import transformers
    from peft import PeftModel

    family = FAMILIES[model_type]
    base, adapter, output = tmp_path / "base", tmp_path / "adapter", tmp_path / "merged"
    load: Callable[[Path], Any] = lambda folder: (  # noqa: E731
        getattr(transformers, family.auto).from_pretrained(folder, dtype=torch.float32).eval()
    )
    with quietly():
        make_base(model_type, family, base)
        make_adapter(load(base), family, adapter)
        sources = resolved(base, adapter)
        settings = MergeSettings()
        plan = make_plan(sources, settings)
    assert plan.strategy is Strategy.STREAM
    assert plan.consumed == plan.adapter_tensors > 0
    output.mkdir()
    merge(plan, sources, output, settings=settings, progress=Silent())
    write_config(base, output, plan.config_changes)

    with quietly():
        inputs = inputs_of(family)
        merged, plain = load(output), load(base)
        before = first_output(plain, inputs)
        adapted = PeftModel.from_pretrained(plain, adapter).eval()
        expected = first_output(adapted, inputs)
        got = first_output(merged, inputs)
        reference = adapted.merge_and_unload()
    scale = float(expected.abs().max())
    assert float((expected - before).abs().max()) > 1e-2 * scale, "the adapter must change the output"
    assert float((got - expected).abs().max()) <= OUTPUT_TOLERANCE * scale
    # PEFT's merge of one of two tied parameters changes both; there the outputs decide.
    parted = tied_names(load(base)) if "tie_word_embeddings" in plan.config_changes else set()
    state = merged.state_dict()
    for name, value in reference.state_dict().items():
        if name not in parted:
            assert float((state[name] - value).abs().max()) <= TOLERANCE, name
    with quietly():
        judged = verify(output, sources, settings=VerifySettings(outputs=False), progress=Silent())
    assert judged.verdict is not Verdict.FAIL, judged.reasons


@pytest.mark.parametrize("model_type", ["qwen2", "bert", "mixtral"])
def test_an_encoder_on_a_language_models_checkpoint(model_type: str, tmp_path: Path) -> None:
    """Embedding adapters are trained on AutoModel: their paths lack the prefix that names on disk have."""
    import transformers
    from peft import LoraConfig, PeftModel, get_peft_model

    auto = "AutoModelForMaskedLM" if model_type == "bert" else "AutoModelForCausalLM"
    config = ENCODER if model_type == "bert" else EXPERTS
    base, adapter, output = tmp_path / "base", tmp_path / "adapter", tmp_path / "merged"
    targets = ["query", "value"] if model_type == "bert" else ["q_proj", "v_proj"]
    with quietly():
        make_base(model_type, Family(config, auto), base)
        model = transformers.AutoModel.from_pretrained(base, dtype=torch.float32)
        lora = LoraConfig(
            r=2, target_modules=targets, task_type="FEATURE_EXTRACTION", init_lora_weights=False
        )
        torch.manual_seed(6)
        get_peft_model(model, lora).save_pretrained(adapter)
        sources = resolved(base, adapter)
        plan = make_plan(sources, MergeSettings())
    output.mkdir()
    merge(plan, sources, output, settings=MergeSettings(), progress=Silent())
    write_config(base, output, plan.config_changes)
    assert plan.consumed == plan.adapter_tensors == 8
    assert {spec.name for shard in plan.outputs for spec in shard.tensors} == set(
        load_file(base / "model.safetensors")
    )
    with quietly():
        tokens = {"input_ids": torch.arange(3, 11)[None]}
        plain = transformers.AutoModel.from_pretrained(base, dtype=torch.float32).eval()
        merged = transformers.AutoModel.from_pretrained(output, dtype=torch.float32).eval()
        with torch.no_grad():
            got = merged(**tokens).last_hidden_state
            expected = PeftModel.from_pretrained(plain, adapter).eval()(**tokens).last_hidden_state
    assert float((got - expected).abs().max()) <= OUTPUT_TOLERANCE * float(expected.abs().max())


_TOWERS = (
    ("model.language_model.", "language_model.model."),
    ("model.vision_tower.", "vision_tower.vision_model."),
)
OLD_PATHS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "llava": _TOWERS,
    "gemma3": _TOWERS,
    "qwen2_vl": (("model.language_model.", "model."), ("model.visual.", "visual.")),
}
"""Where modules are in transformers 5, and where they were in 4."""


@pytest.mark.parametrize("model_type", OLD_PATHS)
def test_an_adapter_of_transformers_4(model_type: str, tmp_path: Path) -> None:
    """Its modules are found where transformers' own list for checkpoints says that they went; the report says so."""
    import transformers

    family = replace(FAMILIES[model_type], targets=r".*\.(q_proj|v_proj|qkv)")
    base, adapter, output = tmp_path / "base", tmp_path / "adapter", tmp_path / "merged"
    with quietly():
        make_base(model_type, family, base)
        model = getattr(transformers, family.auto).from_pretrained(base, dtype=torch.float32).eval()
        make_adapter(model, family, adapter)
        now = make_plan(resolved(base, adapter), MergeSettings())
        file = adapter / "adapter_model.safetensors"
        save_file(
            {_as_it_was(name, OLD_PATHS[model_type]): tensor for name, tensor in load_file(file).items()},
            file,
        )
        sources = resolved(base, adapter)
        plan = make_plan(sources, MergeSettings())
        assert plan.consumed == plan.adapter_tensors > 0
        assert [change.tensors for change in plan.changes] == [change.tensors for change in now.changes]
        assert any("older form" in note for note in plan.notes)
        output.mkdir()
        merge(plan, sources, output, settings=MergeSettings(), progress=Silent())
        write_config(base, output, plan.config_changes)
        judged = verify(output, sources, settings=VerifySettings(outputs=False), progress=Silent())
    assert judged.verdict is not Verdict.FAIL, judged.reasons
    assert judged.evidence["weights"]["updated"] == len(plan.changes)


def test_a_pattern_of_paths_of_transformers_4_is_told(tmp_path: Path) -> None:
    """The base is the right one, and its modules are found; PEFT's own loading would not find them by this pattern."""
    import transformers

    family = replace(FAMILIES["llava"], targets=r".*language_model.*\.(q_proj|v_proj)")
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    with quietly():
        make_base("llava", family, base)
        make_adapter(getattr(transformers, family.auto).from_pretrained(base), family, adapter)
        file, config = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
        save_file(
            {_as_it_was(name, OLD_PATHS["llava"]): tensor for name, tensor in load_file(file).items()}, file
        )
        pattern = r"^(language_model)(?!.*lm_head).*\.(q_proj|v_proj)"
        config.write_text(json.dumps({**json.loads(config.read_text()), "target_modules": pattern}))
        with pytest.raises(AccountingError, match=r"targets: model\.language_model") as caught:
            make_plan(resolved(base, adapter), MergeSettings())
    assert "pattern" in caught.value.hint


def _as_it_was(name: str, paths: tuple[tuple[str, str], ...]) -> str:
    for new, old in paths:
        if name.startswith(f"base_model.model.{new}"):
            return f"base_model.model.{old}{name.removeprefix(f'base_model.model.{new}')}"
    return name


def tied_names(model: Any) -> set[str]:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name for same in names.values() if len(same) > 1 for name in same}


def test_a_family_that_ties_for_good_is_refused(tmp_path: Path) -> None:
    """T5 scales its outputs when embeddings are tied: no checkpoint holds a changed head apart."""
    family = Family(T5, "AutoModelForSeq2SeqLM", "seq2seq", targets=["lm_head"])
    with quietly():
        make_base("t5", family, tmp_path / "base")
        import transformers

        model = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "base")
        make_adapter(model, family, tmp_path / "adapter")
        with pytest.raises(MethodError, match="ties") as caught:
            make_plan(resolved(tmp_path / "base", tmp_path / "adapter"), MergeSettings())
    assert caught.value.hint


def test_a_family_unknown_to_transformers_is_refused(tmp_path: Path) -> None:
    """Its own code is not run unasked; without code the type is named."""
    family = FAMILIES["gpt2"]
    with quietly():
        make_base("gpt2", family, tmp_path / "base")
        import transformers

        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        make_adapter(model, family, tmp_path / "adapter")
    file = tmp_path / "base" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "model_type": "nobody_knows"}))
    with pytest.raises(UnmergeableError, match="nobody_knows"):
        make_plan(resolved(tmp_path / "base", tmp_path / "adapter"), MergeSettings())
    file.write_text(
        json.dumps({**config, "model_type": "nobody_knows", "auto_map": {"AutoModelForCausalLM": "m.M"}})
    )
    with pytest.raises(PolicyError, match="nobody_knows") as caught:
        make_plan(resolved(tmp_path / "base", tmp_path / "adapter"), MergeSettings())
    assert "--trust-remote-code" in caught.value.hint


def test_there_are_forty_families() -> None:
    assert len(FAMILIES) >= 40


def resolved(base: Path, adapter: Path) -> Resolved:
    config = json.loads((adapter / "adapter_config.json").read_text())
    return Resolved(
        (Adapter(Folder(adapter), config, config["peft_type"]),),
        BaseModel(Folder(base), json.loads((base / "config.json").read_text())),
        None,
    )


def write_config(base: Path, output: Path, changes: Mapping[str, Any]) -> None:
    """What packaging does, as far as loading needs it."""
    config = json.loads((base / "config.json").read_text())
    (output / "config.json").write_text(json.dumps({**config, **changes}))
    for file in base.glob("generation_config.json"):
        shutil.copy(file, output)
