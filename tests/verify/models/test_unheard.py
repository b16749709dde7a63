"""An update that base + adapter does not make, since nothing calls the adapted module, does not pass for merged."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from merge_adapter.hub import Hub
from merge_adapter.pipeline import Merged, MergeRequest, merge_to_folder
from merge_adapter.resolve import SourceRequest
from merge_adapter.types import Silent, Verdict
from merge_adapter.verify import VerifySettings

VISION = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8,
    "patch_size": 4, "num_channels": 3,
}  # fmt: skip
AUDIO = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64,
    "conv_dim": [16, 16], "conv_stride": [20, 20], "conv_kernel": [20, 20], "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip
LED = {
    "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "vocab_size": 64, "max_encoder_position_embeddings": 32,
    "max_decoder_position_embeddings": 32, "attention_window": 4,
}  # fmt: skip
MODELS: dict[str, tuple[str, str, Mapping[str, Any], list[str], str]] = {
    "torch's attention": (
        "siglip_vision_model", "AutoModel", VISION, ["q_proj", "out_proj"], "head.attention.out_proj",
    ),
    "attention of its own": ("wavlm", "AutoModelForCTC", AUDIO, ["q_proj", "intermediate_dense"], "attention.q_proj"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_an_update_that_nothing_calls_leaves_the_answer_open(
    model: tuple[str, str, Mapping[str, Any], list[str], str], tmp_path: Path
) -> None:
    """As training leaves it, at zero, it is no matter."""
    around = model[-1]
    noisy = merged(model, tmp_path / "noisy", zero="").verification
    said = " ".join(noisy.reasons)
    assert noisy.verdict is Verdict.INCONCLUSIVE, said
    assert around in said
    assert "never calls" in said
    trained = merged(model, tmp_path / "trained", zero=around)
    assert trained.verification.verdict is Verdict.PASS, trained.verification.reasons


@pytest.mark.filterwarnings("ignore")
def test_a_module_that_nothing_needs_is_no_matter(tmp_path: Path) -> None:
    """Its weight is not read either: base + adapter and the merged model go without alike."""
    model = ("led", "AutoModelForSeq2SeqLM", LED, ["query", "query_global"], "query_global")
    found = merged(model, tmp_path, zero="").verification
    assert found.verdict is Verdict.PASS, found.reasons


def merged(model: tuple[str, str, Mapping[str, Any], list[str], str], place: Path, *, zero: str) -> Merged:
    """A merge with random factors everywhere but in the modules of paths that end in `zero`, unless it is empty."""
    import peft
    import transformers

    model_type, auto, config, targets, _ = model
    torch.manual_seed(1)
    base = getattr(transformers, auto).from_config(transformers.CONFIG_MAPPING[model_type](**config))
    base.save_pretrained(place / "base")
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=targets))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name and not (zero and f"{zero}." in name):
                parameter.normal_(std=0.1)
    adapted.save_pretrained(place / "adapter")
    request = MergeRequest(
        SourceRequest((str(place / "adapter"),), base_model=str(place / "base")),
        gate=VerifySettings(isolated=False),
    )
    return merge_to_folder(
        request, place / "merged", hub=Hub(endpoint="http://127.0.0.1:9"), progress=Silent()
    )
