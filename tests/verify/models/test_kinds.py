"""Every kind of model the gate can ask: right merges pass, and three faults are caught in each.

Tiny models from configs, random adapters, merges by PEFT itself; fp32 and bf16.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from merge_adapter.hub import Hub
from merge_adapter.pipeline import MergeRequest, merge_to_folder
from merge_adapter.resolve import SourceRequest
from merge_adapter.types import Silent, Verdict
from merge_adapter.verify import VerifySettings

TEXT = {"vocab_size": 2048, "initializer_range": 0.2}
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
ENCODER = {**TEXT, **SMALL, "max_position_embeddings": 64}
DECODER = {**TEXT, **SMALL, "num_key_value_heads": 1, "max_position_embeddings": 256}
SIGHT = {**SMALL, "image_size": 16, "patch_size": 4, "initializer_range": 0.2}


@dataclass(frozen=True)
class Case:
    """One architecture and how it is adapted."""

    auto: str
    config: Callable[[Any], Any]
    targets: Any
    kind: str
    task: str | None = None
    saved: tuple[str, ...] = ()
    tokenizer: bool = True
    parameters: tuple[str, ...] = ()
    processor: dict[str, Any] = field(default_factory=dict)
    """Its image processor's config; without one, pictures come in the shape that the model's config names."""


def llava(t: Any) -> Any:
    return t.LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **SIGHT},
        text_config={"model_type": "llama", **DECODER},
        image_token_index=2000,
        vision_feature_layer=-1,
    )


def qwen2_vl(t: Any) -> Any:
    return t.Qwen2VLConfig(
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4},
        text_config={**DECODER, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}},
        image_token_id=2000,
        video_token_id=2001,
        vision_start_token_id=2002,
        vision_end_token_id=2003,
    )  # fmt: skip


def paligemma(t: Any) -> Any:
    return t.PaliGemmaConfig(
        vision_config={"model_type": "siglip_vision_model", **SIGHT, "vision_use_head": False},
        text_config={"model_type": "gemma", **DECODER, "head_dim": 16},
        image_token_index=2000,
        projection_dim=32,
    )


def llava_next(t: Any) -> Any:
    return t.LlavaNextConfig(
        vision_config={"model_type": "clip_vision_model", **SIGHT},
        text_config={"model_type": "llama", **DECODER},
        image_token_index=2000,
        vision_feature_layer=-1,
        image_grid_pinpoints=[[16, 32], [32, 16], [32, 32]],
    )


def mllama(t: Any) -> Any:
    sight = {name: value for name, value in SIGHT.items() if name != "num_attention_heads"}
    return t.MllamaConfig(
        vision_config={
            **sight, "attention_heads": 2, "num_global_layers": 1, "intermediate_layers_indices": [0, 1],
            "vision_output_dim": 96, "max_num_tiles": 2, "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
        },
        text_config={
            **DECODER, "num_hidden_layers": 3, "cross_attention_layers": [1], "pad_token_id": 0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        image_token_index=2000,
    )  # fmt: skip


def idefics3(t: Any) -> Any:
    return t.Idefics3Config(
        vision_config=SIGHT,
        text_config={"model_type": "llama", **DECODER},
        image_token_id=2000,
        scale_factor=2,
    )


def qwen2_5_vl(t: Any) -> Any:
    return t.Qwen2_5_VLConfig(
        vision_config={
            "depth": 2, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48, "num_heads": 2,
            "patch_size": 4, "fullatt_block_indexes": [1], "window_size": 16,
        },
        text_config={**DECODER, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}},
        image_token_id=2000, video_token_id=2001, vision_start_token_id=2002, vision_end_token_id=2003,
    )  # fmt: skip


def gemma3(t: Any) -> Any:
    return t.Gemma3Config(
        vision_config={"model_type": "siglip_vision_model", **SIGHT, "vision_use_head": False},
        text_config={
            **DECODER, "head_dim": 16, "sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"],
        },
        mm_tokens_per_image=4, image_token_index=2000, boi_token_index=2001, eoi_token_index=2002,
    )  # fmt: skip


PREPARED = {
    "do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
    "image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.5, 0.5],
}  # fmt: skip
SIDES = {"size": {"height": 16, "width": 16}}


def t5(t: Any) -> Any:
    return t.T5Config(
        vocab_size=2048, d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2, initializer_factor=1.0
    )


def bart(t: Any) -> Any:
    sizes = {f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in
             (("layers", 2), ("attention_heads", 2), ("ffn_dim", 48))}  # fmt: skip
    return t.BartConfig(vocab_size=2048, d_model=32, max_position_embeddings=128, init_std=0.2, **sizes)


def whisper(t: Any) -> Any:
    sizes = {f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in
             (("layers", 2), ("attention_heads", 2), ("ffn_dim", 48))}  # fmt: skip
    return t.WhisperConfig(
        vocab_size=2048, d_model=32, num_mel_bins=8, max_source_positions=32, max_target_positions=64,
        init_std=0.2, decoder_start_token_id=1, pad_token_id=0, bos_token_id=1, eos_token_id=2, **sizes,
    )  # fmt: skip


def wav2vec2(t: Any) -> Any:
    return t.Wav2Vec2Config(
        **SMALL, vocab_size=40, conv_dim=(16, 16), conv_kernel=(10, 8), conv_stride=(20, 16),
        num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2, initializer_range=0.2,
    )  # fmt: skip


def segformer(t: Any) -> Any:
    return t.SegformerConfig(
        image_size=32, depths=[1, 1], num_encoder_blocks=2, sr_ratios=[2, 1], hidden_sizes=[16, 32], patch_sizes=[7, 3],
        strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=16, num_labels=5,
        initializer_range=0.2,
    )  # fmt: skip


def videomae(t: Any) -> Any:
    return t.VideoMAEConfig(**SIGHT, num_frames=4, tubelet_size=2, num_labels=3)


def yolos(t: Any) -> Any:
    return t.YolosConfig(**{**SIGHT, "image_size": [16, 16]}, num_detection_tokens=3, num_labels=4)


def mixtral(t: Any) -> Any:
    return t.MixtralConfig(**DECODER, num_local_experts=4, num_experts_per_tok=2)


ATTENTION = ["q_proj", "v_proj"]
BERT = ["query", "value"]
CASES = {
    "t5": Case("AutoModelForSeq2SeqLM", t5, ["q", "v"], "seq2seq-lm", "SEQ_2_SEQ_LM"),
    "bart": Case("AutoModelForSeq2SeqLM", bart, ATTENTION, "seq2seq-lm", "SEQ_2_SEQ_LM"),
    "token classes": Case(
        "AutoModelForTokenClassification",
        lambda t: t.BertConfig(**ENCODER, num_labels=5),
        BERT,
        "token-classifier",
        "TOKEN_CLS",
        ("classifier",),
    ),
    "answers": Case(
        "AutoModelForQuestionAnswering",
        lambda t: t.BertConfig(**ENCODER),
        BERT,
        "question-answering",
        "QUESTION_ANS",
        ("qa_outputs",),
    ),
    "masked": Case("AutoModelForMaskedLM", lambda t: t.BertConfig(**ENCODER), BERT, "masked-lm"),
    "features": Case("AutoModel", lambda t: t.BertConfig(**ENCODER), BERT, "embedding", "FEATURE_EXTRACTION"),
    "llava": Case("AutoModelForImageTextToText", llava, ATTENTION, "image-text-to-text", "CAUSAL_LM"),
    "qwen2-vl": Case(
        "AutoModelForImageTextToText", qwen2_vl, [*ATTENTION, "qkv"], "image-text-to-text", "CAUSAL_LM"
    ),
    "paligemma": Case("AutoModelForImageTextToText", paligemma, ATTENTION, "image-text-to-text"),
    "llava-next": Case(
        "AutoModelForImageTextToText",
        llava_next,
        ATTENTION,
        "image-text-to-text",
        processor={
            **PREPARED,
            "image_processor_type": "LlavaNextImageProcessor",
            "size": {"shortest_edge": 16},
            "crop_size": {"height": 16, "width": 16},
            "image_grid_pinpoints": [[16, 32], [32, 16], [32, 32]],
        },
    ),
    "llava-next by shape": Case("AutoModelForImageTextToText", llava_next, ATTENTION, "image-text-to-text"),
    "mllama": Case(
        "AutoModelForImageTextToText",
        mllama,
        ATTENTION,
        "image-text-to-text",
        processor={**PREPARED, **SIDES, "image_processor_type": "MllamaImageProcessor", "max_image_tiles": 2},
    ),
    "mllama by shape": Case("AutoModelForImageTextToText", mllama, ATTENTION, "image-text-to-text"),
    "idefics3": Case(
        "AutoModelForImageTextToText",
        idefics3,
        ATTENTION,
        "image-text-to-text",
        processor={
            **PREPARED,
            "image_processor_type": "Idefics3ImageProcessor",
            "size": {"longest_edge": 32},
            "max_image_size": {"longest_edge": 16},
            "do_image_splitting": True,
        },
    ),
    "idefics3 by shape": Case("AutoModelForImageTextToText", idefics3, ATTENTION, "image-text-to-text"),
    "qwen2.5-vl": Case(
        "AutoModelForImageTextToText",
        qwen2_5_vl,
        [*ATTENTION, "qkv"],
        "image-text-to-text",
        processor={
            **PREPARED,
            "image_processor_type": "Qwen2VLImageProcessor",
            "patch_size": 4,
            "merge_size": 2,
            "temporal_patch_size": 2,
            "min_pixels": 64,
            "max_pixels": 4096,
        },
    ),
    "gemma3": Case("AutoModelForImageTextToText", gemma3, ATTENTION, "image-text-to-text"),
    "vit": Case(
        "AutoModelForImageClassification",
        lambda t: t.ViTConfig(**SIGHT, num_labels=7),
        ATTENTION,
        "image-classifier",
        saved=("classifier",),
        tokenizer=False,
        processor={**PREPARED, **SIDES, "image_processor_type": "ViTImageProcessor"},
    ),
    "vit features": Case(
        "AutoModel", lambda t: t.ViTConfig(**SIGHT), ATTENTION, "embedding", tokenizer=False
    ),
    "segments": Case(
        "AutoModelForSemanticSegmentation",
        segformer,
        ["q_proj", "v_proj", "query", "value"],
        "other",
        saved=("decode_head",),
        tokenizer=False,
    ),
    "videos": Case("AutoModelForVideoClassification", videomae, ["query", "value"], "other", tokenizer=False),
    "boxes": Case("AutoModelForObjectDetection", yolos, ["query", "value"], "other", tokenizer=False),
    "two heads": Case("AutoModelForPreTraining", lambda t: t.BertConfig(**ENCODER), BERT, "other"),
    "whisper": Case("AutoModelForSpeechSeq2Seq", whisper, ATTENTION, "speech-seq2seq"),
    "wav2vec2": Case("AutoModelForCTC", wav2vec2, ATTENTION, "speech-ctc", tokenizer=False),
    "experts": Case(
        "AutoModelForCausalLM",
        mixtral,
        ["q_proj"],
        "causal-lm",
        "CAUSAL_LM",
        parameters=("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
    ),
    "no tokenizer": Case(
        "AutoModelForCausalLM",
        lambda t: t.LlamaConfig(**DECODER),
        ATTENTION,
        "causal-lm",
        "CAUSAL_LM",
        tokenizer=False,
    ),
}


@dataclass(frozen=True)
class Made:
    """A right merge and what it was made from."""

    folder: Path
    sources: Any
    judged: Callable[..., Any]
    """The gate, whose report is checked against its schema."""

    def judge(self, merged: Path | None = None, **settings: Any) -> Any:
        """The gate's answer at small cost, in this process."""
        chosen = {"isolated": False, "probe_tokens": 256, "greedy_tokens": 4, "greedy_prompts": 2, **settings}
        return self.judged(merged or self.folder / "merged", self.sources, VerifySettings(**chosen))

    def spoiled(self, target: Path, factor: float, *, alone: bool = False) -> Path:
        """A copy of the merge with its updates, or the second one `alone`, `factor` times as strong."""
        shutil.copytree(self.folder / "merged", target)
        merged = load_file(target / "model.safetensors")
        base = load_file(self.folder / "base" / "model.safetensors")
        changed = [
            name
            for name in sorted(merged)
            if name in base and base[name].ndim > 1 and not torch.equal(merged[name], base[name])
        ]
        assert len(changed) > 2
        for name in changed[1:2] if alone else changed:
            update = merged[name].double() - base[name].double()
            merged[name] = (base[name].double() + factor * update).to(merged[name].dtype)
        save_file(merged, target / "model.safetensors", metadata={"format": "pt"})
        return target


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory, lm_base: Path, sources_of: Any, silence: Any, reported: Any
) -> Callable[[str, str], Made]:
    """`made("t5", "bf16")`: each built once."""
    kept: dict[tuple[str, str], Made] = {}

    def build(name: str, dtype: str) -> Made:
        if (name, dtype) not in kept:
            folder = tmp_path_factory.mktemp("kind")
            with silence():
                _build(CASES[name], {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype], folder, lm_base)
            kept[name, dtype] = Made(folder, sources_of(folder / "adapter", folder / "base"), reported)
        return kept[name, dtype]

    return build


def _build(case: Case, dtype: torch.dtype, folder: Path, tokenizer: Path) -> None:
    """Base, adapter and PEFT's merge in `folder`."""
    import peft
    import transformers

    torch.manual_seed(3)
    auto = getattr(transformers, case.auto)
    base, merged = folder / "base", folder / "merged"
    auto.from_config(case.config(transformers)).to(dtype).save_pretrained(base)
    adapted = peft.get_peft_model(
        auto.from_pretrained(base, dtype=dtype),
        peft.LoraConfig(
            r=4,
            lora_alpha=8,
            target_modules=case.targets,
            task_type=case.task,
            modules_to_save=list(case.saved) or None,
            target_parameters=list(case.parameters) or None,
        ),
    )
    for value in adapted.parameters():
        if value.requires_grad:
            value.data.add_(torch.randn(value.shape).to(value.dtype) * 0.1)
    adapted.save_pretrained(folder / "adapter")
    adapted.merge_and_unload().save_pretrained(merged)
    if case.processor:
        for place in (base, merged):
            (place / "preprocessor_config.json").write_text(json.dumps(case.processor))
    if case.tokenizer:
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(tokenizer / name, base / name)
            shutil.copy(tokenizer / name, merged / name)


GRID = [(name, dtype) for name in CASES for dtype in ("fp32", "bf16")]
IDS = [f"{name}-{dtype}" for name, dtype in GRID]


@pytest.mark.parametrize(("name", "dtype"), GRID, ids=IDS)
def test_a_right_merge_passes_with_its_outputs(
    name: str, dtype: str, made: Callable[[str, str], Made]
) -> None:
    """PEFT's own merge; what the models were asked stands in the report."""
    result = made(name, dtype).judge()
    assert result.verdict is Verdict.PASS, result.reasons
    assert result.evidence["outputs"]["kind"] == CASES[name].kind
    assert result.evidence["outputs"]["verdict"] == "pass"
    assert result.evidence["outputs"]["effect"]["mean"] > 0


@pytest.mark.parametrize(("name", "dtype"), GRID, ids=IDS)
def test_faults_are_caught_in_every_kind(
    name: str, dtype: str, made: Callable[[str, str], Made], tmp_path: Path
) -> None:
    """Nothing merged, all of it twice, one module left out: weights and modules tell, whatever the model answers."""
    right = made(name, dtype)
    for fault, options in {
        "no-op": {"factor": 0.0},
        "twice": {"factor": 2.0},
        "one missing": {"factor": 0.0, "alone": True},
    }.items():
        result = right.judge(right.spoiled(tmp_path / fault, **options), outputs=False)
        assert result.verdict is Verdict.FAIL, fault
        assert result.evidence["weights"]["verdict"] == "fail", (fault, result.reasons)


@pytest.mark.parametrize("name", list(CASES))
def test_outputs_alone_see_a_merge_that_did_nothing(
    name: str, made: Callable[[str, str], Made], tmp_path: Path
) -> None:
    """The outputs part of every kind fails a no-op on its own account."""
    right = made(name, "fp32")
    result = right.judge(right.spoiled(tmp_path / "no-op", 0.0))
    assert result.evidence["outputs"]["verdict"] == "fail", result.reasons


@pytest.mark.parametrize("name", ["llava", "whisper"])
def test_media_reach_the_process_of_the_merged_model(name: str, made: Callable[[str, str], Made]) -> None:
    """Alone, without PEFT, it is given the same pictures and sounds, and the report says what they were."""
    result = made(name, "bf16").judge(isolated=True)
    assert result.verdict is Verdict.PASS, result.reasons
    said = {"llava": "after a picture made by code", "whisper": "spectrograms made by code"}[name]
    assert said in result.evidence["probes"]["source"]
    assert any(said in reason for reason in result.reasons)


def test_an_encoder_decoder_writes_what_the_reference_writes(made: Callable[[str, str], Made]) -> None:
    """Greedy text of prompts of unequal length, over its own cache, against the teacher-forced choices."""
    greedy = made("t5", "fp32").judge(greedy_tokens=12, greedy_prompts=4).evidence["greedy"]
    assert greedy["equal"] == greedy["of"] == 4
    assert greedy["tokens"] == 12


def test_a_speech_model_writes_down_what_the_reference_hears(
    made: Callable[[str, str], Made], tmp_path: Path
) -> None:
    """Greedy text of sounds; a merge that did nothing writes something else."""
    right = made("whisper", "fp32")
    greedy = right.judge(greedy_tokens=12, greedy_prompts=3).evidence["greedy"]
    assert (greedy["equal"], greedy["of"], greedy["tokens"]) == (3, 3, 12)
    assert [row["prompt"] for row in greedy["texts"]] == ["sound 1", "sound 2", "sound 3"]
    wrong = right.judge(right.spoiled(tmp_path / "no-op", 0.0), greedy_tokens=12, greedy_prompts=3).evidence[
        "greedy"
    ]
    assert wrong["equal"] < 3


def test_sounds_go_through_the_repository_s_feature_extractor(
    made: Callable[[str, str], Made], sources_of: Any, reported: Any, tmp_path: Path
) -> None:
    """Where it has one that works, the model hears what its users' sounds become."""
    import transformers

    folder = Path(shutil.copytree(made("whisper", "fp32").folder, tmp_path / "whisper"))
    extractor = transformers.WhisperFeatureExtractor(feature_size=8, hop_length=250, chunk_length=1)
    for place in ("base", "merged"):
        extractor.save_pretrained(folder / place)
    result = Made(folder, sources_of(folder / "adapter", folder / "base"), reported).judge()
    assert result.verdict is Verdict.PASS, result.reasons
    assert "through the repository's feature extractor" in result.evidence["probes"]["source"]


def test_a_picture_takes_part_in_the_answer(made: Callable[[str, str], Made], tmp_path: Path) -> None:
    """A vision tower that lost a tensor fails the outputs, though every text is read as before."""
    right = made("llava", "fp32")
    merged = Path(shutil.copytree(right.folder / "merged", tmp_path / "merged"))
    tensors = load_file(merged / "model.safetensors")
    [name] = [key for key in tensors if key.endswith("patch_embedding.weight")]
    tensors[name] = torch.zeros_like(tensors[name])
    save_file(tensors, merged / "model.safetensors", metadata={"format": "pt"})
    result = right.judge(merged)
    assert result.verdict is Verdict.FAIL
    assert result.evidence["outputs"]["verdict"] == "fail", result.reasons


def test_segments_learnt_on_a_base_that_classifies(tmp_path: Path, silence: Any) -> None:
    """PEFT's own example: another class, a head of its own with as many labels, and its running means."""
    import peft
    import transformers

    with silence():
        torch.manual_seed(3)
        config = segformer(transformers)
        config.num_labels = 9
        transformers.SegformerForImageClassification(config).save_pretrained(tmp_path / "base")
        trained = peft.get_peft_model(
            transformers.SegformerForSemanticSegmentation.from_pretrained(
                tmp_path / "base", num_labels=4, ignore_mismatched_sizes=True
            ),
            peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["decode_head"]),
        )
        for value in trained.parameters():
            if value.requires_grad:
                value.data.add_(torch.randn(value.shape) * 0.1)
        trained.save_pretrained(tmp_path / "adapter")
    request = MergeRequest(
        SourceRequest((str(tmp_path / "adapter"),), base_model=str(tmp_path / "base")),
        gate=VerifySettings(isolated=False),
    )
    hub = Hub(endpoint="http://127.0.0.1:9", token=None)
    made = merge_to_folder(request, tmp_path / "merged", hub=hub, progress=Silent())
    assert made.verification.verdict is Verdict.PASS, made.verification.reasons
    with silence():
        loaded = transformers.SegformerForSemanticSegmentation.from_pretrained(tmp_path / "merged")
        pictures = torch.rand(2, 3, 32, 32)
        expected = trained.eval()(pictures).logits
    assert loaded.config.num_labels == 4
    torch.testing.assert_close(loaded(pictures).logits, expected, rtol=1e-4, atol=1e-4)
