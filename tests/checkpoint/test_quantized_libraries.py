"""Checkpoints that the real libraries quantised are dequantised bit for bit as these libraries do it.

bitsandbytes, compressed-tensors and transformers' own FP8 and MXFP4 operations make the checkpoints, most of them from
the trained model that ships; the reference is what transformers loads from them, as the gate has it.
"""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from merge_adapter.checkpoint.base import read_base
from merge_adapter.checkpoint.folder import Folder
from merge_adapter.hub import Hub
from merge_adapter.pipeline import Merged, MergeRequest, merge_to_folder
from merge_adapter.resolve import SourceRequest, resolve
from merge_adapter.types import BaseModel, MergeSettings, QuantizedBase, Silent, Strategy, Verdict
from merge_adapter.verify import VerifySettings, verify
from merge_adapter.verify.models.kinds import Kind
from merge_adapter.verify.models.quantized import dequantized_folder

Make = Callable[[Path, Path], None]
"""Makes a quantised checkpoint from the one in the first folder, in the second."""


def bitsandbytes(**settings: Any) -> Make:
    def make(source: Path, target: Path) -> None:
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        chosen = BitsAndBytesConfig(**settings)
        model = AutoModelForCausalLM.from_pretrained(source, quantization_config=chosen, device_map="cpu")
        model.save_pretrained(target)

    return make


def compressed(form: str, *, activations: dict[str, Any] | None = None, **weights: Any) -> Make:
    """A checkpoint of compressed-tensors whose scales are those of each block's smallest and largest weight."""

    def make(source: Path, target: Path) -> None:
        from compressed_tensors.compressors import ModelCompressor
        from compressed_tensors.quantization import (
            QuantizationArgs,
            QuantizationConfig,
            QuantizationScheme,
            apply_quantization_config,
        )
        from compressed_tensors.quantization.utils import calculate_qparams
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(source)
        args = QuantizationArgs(**weights)
        scheme = QuantizationScheme(
            targets=["Linear"],
            weights=args,
            format=form,
            input_activations=QuantizationArgs(**activations) if activations else None,
        )
        apply_quantization_config(
            model, QuantizationConfig(config_groups={"all": scheme}, ignore=["lm_head"], format=form)
        )
        for module in model.modules():
            if hasattr(module, "weight_scale"):
                scale, zero = calculate_qparams(*extremes(module.weight.detach(), weights), args)
                module.weight_scale.data = scale.to(module.weight_scale).reshape_as(module.weight_scale)
                if hasattr(module, "weight_zero_point"):
                    module.weight_zero_point.data = zero.to(module.weight_zero_point).reshape_as(
                        module.weight_zero_point
                    )
        compressor = ModelCompressor.from_pretrained_model(model)
        compressor.compress_model(model)
        model.save_pretrained(target)
        compressor.update_config(target)

    return make


def extremes(weight: torch.Tensor, settings: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Smallest and largest weight of each block that shares a scale."""
    if settings["strategy"] == "group":
        blocks = weight.unflatten(-1, (-1, settings["group_size"]))
        return blocks.amin(-1), blocks.amax(-1)
    if settings["strategy"] == "channel":
        return weight.amin(-1, keepdim=True), weight.amax(-1, keepdim=True)
    if settings["strategy"] == "block":
        tall, wide = settings["block_structure"]
        blocks = weight.unflatten(1, (-1, wide)).unflatten(0, (-1, tall))
        return blocks.amin((1, 3)), blocks.amax((1, 3))
    return weight.amin().reshape(1), weight.amax().reshape(1)


def fp8_blocks(source: Path, target: Path) -> None:
    """In blocks of 64 x 64, as DeepSeek's and Qwen's checkpoints are in blocks of 128 x 128."""
    from types import SimpleNamespace

    from transformers import FineGrainedFP8Config
    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    config = FineGrainedFP8Config(weight_block_size=(64, 64))
    quantize = Fp8Quantize(SimpleNamespace(quantization_config=config))
    stored = {}
    for name, value in load_file(source / "model.safetensors").items():
        made = quantize.convert({name: [value]}) if "_proj." in name else {name: value}
        stored |= {key: (one[0] if isinstance(one, list) else one).contiguous() for key, one in made.items()}
    config_of(source, target, {"quant_method": "fp8", "weight_block_size": [64, 64]})
    save_file(stored, target / "model.safetensors", {"format": "pt"})


def mxfp4_experts(source: Path, target: Path) -> None:
    """Random blocks and exponents: as many different values as there are codes."""
    stored = {}
    for name, value in load_file(source / "model.safetensors").items():
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, columns, rows = value.shape
            blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
            stored[f"{name}_blocks"] = blocks
            stored[f"{name}_scales"] = torch.randint(118, 126, blocks.shape[:3], dtype=torch.uint8)
        else:
            stored[name] = value
    config_of(source, target, {"quant_method": "mxfp4"})
    save_file(stored, target / "model.safetensors", {"format": "pt"})


def config_of(source: Path, target: Path, quantization: dict[str, Any]) -> None:
    target.mkdir()
    config = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))


def int4(**settings: Any) -> dict[str, Any]:
    return {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, **settings}


FORMATS: dict[str, Make] = {
    "nf4": bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "nf4, nested scales": bitsandbytes(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    ),
    "fp4": bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=True),
    "nf4, stored as bf16": bitsandbytes(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_quant_storage=torch.bfloat16
    ),
    "llm.int8": bitsandbytes(load_in_8bit=True),
    "fp8 blocks": fp8_blocks,
    "int4 groups": compressed("pack-quantized", **int4()),
    "int4 groups, zero points": compressed("pack-quantized", **int4(symmetric=False)),
    "int3 groups": compressed("pack-quantized", **int4(num_bits=3)),
    "int8 packed rows": compressed("pack-quantized", num_bits=8, type="int", strategy="channel"),
    "int8 rows": compressed(
        "int-quantized",
        num_bits=8,
        type="int",
        strategy="channel",
        activations={"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True},
    ),
    "int8 rows, zero points": compressed(
        "naive-quantized", num_bits=8, type="int", strategy="channel", symmetric=False
    ),
    "fp8 rows": compressed("float-quantized", num_bits=8, type="float", strategy="channel"),
    "fp8 tensors": compressed("naive-quantized", num_bits=8, type="float", strategy="tensor"),
    "fp8 blocks, compressed": compressed(
        "float-quantized", num_bits=8, type="float", strategy="block", block_structure=[64, 64]
    ),
}

TINY: dict[str, dict[str, Any]] = {
    "llama": {
        "hidden_size": 44, "intermediate_size": 36, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 22, "vocab_size": 70,
    },
    "gpt2": {"n_embd": 64, "n_layer": 1, "n_head": 2, "vocab_size": 64, "n_positions": 32},
    "gpt_oss": {
        "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 64, "num_local_experts": 3, "num_experts_per_tok": 2,
    },
    "qwen3_moe": {
        "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 64, "num_experts": 3,
        "num_experts_per_tok": 2, "decoder_sparse_step": 1,
    },
}  # fmt: skip


def quantised(make: Make, source: Path, target: Path) -> BaseModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the libraries say of their own choices
        make(source, target)
    return BaseModel(Folder(target), json.loads((target / "config.json").read_text()))


def tiny(model_type: str, folder: Path) -> Path:
    import transformers

    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[model_type](
        **TINY[model_type], bos_token_id=0, eos_token_id=0, pad_token_id=None
    )
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def assert_as_the_library(base: BaseModel, place: Path) -> dict[str, torch.Tensor]:
    """Every tensor, whole and in uneven runs of rows, against transformers' own; returns them."""
    folder = base.repository.origin.folder
    assert folder is not None
    place.mkdir()
    reference = load_file(
        dequantized_folder(folder, place, Kind.CAUSAL, trust_remote_code=False) / "model.safetensors"
    )
    files = read_base(base, MergeSettings(quantized_base=QuantizedBase.DEQUANTIZE))
    assert set(files.specs) == set(reference)
    with files.open() as weights:
        for name, expected in reference.items():
            assert files.specs[name].shape == tuple(expected.shape), name
            assert torch.equal(weights.read(name).view(torch.uint8), expected.view(torch.uint8)), name
            rows = range(0, expected.shape[0], 7)
            parts = [weights.read_rows(name, at, min(at + 7, expected.shape[0])) for at in rows]
            assert torch.equal(torch.cat(parts), expected), name
    return reference


@pytest.mark.parametrize("form", FORMATS)
def test_every_tensor_is_the_librarys(form: str, lm_base: Path, tmp_path: Path) -> None:
    base = quantised(FORMATS[form], lm_base, tmp_path / "quantised")
    made = assert_as_the_library(base, tmp_path / "plain")
    original = load_file(lm_base / "model.safetensors")
    assert {value.dtype for value in made.values()} == {torch.bfloat16}
    changed = [name for name in made if not torch.equal(made[name], original[name])]
    assert changed == [name for name in made if "_proj." in name], "quantising changed what it should not"
    for name in changed:  # near enough to the original to be it, read rightly
        error = (made[name].float() - original[name].float()).norm() / original[name].float().norm()
        assert error < 0.25, name


@pytest.mark.parametrize("settings", [{"load_in_4bit": True}, {"load_in_8bit": True}])
def test_layers_stored_the_other_way_round(settings: dict[str, Any], tmp_path: Path) -> None:
    """GPT-2 keeps `[in, out]`, bitsandbytes `[out, in]`; square layers would hide a mix-up."""
    source = tiny("gpt2", tmp_path / "made")
    base = quantised(bitsandbytes(**settings), source, tmp_path / "quantised")
    made = assert_as_the_library(base, tmp_path / "plain")
    original = load_file(source / "model.safetensors")["transformer.h.0.attn.c_proj.weight"]
    found = made["transformer.h.0.attn.c_proj.weight"]
    assert (found.float() - original.float()).norm() < 0.25 * original.float().norm()


@pytest.mark.parametrize("form", ["nf4, nested scales", "fp4", "llm.int8"])
def test_sizes_that_blocks_do_not_divide(form: str, tmp_path: Path) -> None:
    """bitsandbytes goes another way there, down to the sign of FP4's zeros."""
    base = quantised(FORMATS[form], tiny("llama", tmp_path / "plain"), tmp_path / "base")
    assert_as_the_library(base, tmp_path / "reference")


def test_experts_one_by_one_in_fp8(tmp_path: Path) -> None:
    base = quantised(fp8_blocks, tiny("qwen3_moe", tmp_path / "made"), tmp_path / "quantised")
    made = assert_as_the_library(base, tmp_path / "plain")
    assert "model.layers.0.mlp.experts.2.down_proj.weight" in made


def test_experts_in_mxfp4(tmp_path: Path) -> None:
    base = quantised(mxfp4_experts, tiny("gpt_oss", tmp_path / "made"), tmp_path / "quantised")
    made = assert_as_the_library(base, tmp_path / "plain")
    assert made["model.layers.0.mlp.experts.gate_up_proj"].shape == (3, 64, 64)


# ------------------------------------------------------------------------------------------- under the gate


def judged_merge(base: Path, adapter: Path, output: Path, strategy: Strategy = Strategy.AUTO) -> Merged:
    request = MergeRequest(
        SourceRequest((str(adapter),), base_model=str(base)),
        MergeSettings(strategy=strategy, quantized_base=QuantizedBase.DEQUANTIZE),
        VerifySettings(probe_tokens=64, greedy_tokens=0, isolated=False),
    )
    return merge_to_folder(request, output, hub=Hub(endpoint="http://127.0.0.1:9"), progress=Silent())


@pytest.mark.parametrize("form", ["llm.int8", "fp8 blocks", "int4 groups, zero points", "fp8 rows"])
def test_the_gate_passes_the_merge(form: str, lm_base: Path, lm_adapter: Path, tmp_path: Path) -> None:
    quantised(FORMATS[form], lm_base, tmp_path / "base")
    merged = judged_merge(tmp_path / "base", lm_adapter, tmp_path / "merged")
    assert merged.verification.verdict is Verdict.PASS, merged.verification.reasons


def test_the_gate_passes_a_new_head_and_a_merge_in_memory(
    lm_base: Path, classifier_adapter: Path, tmp_path: Path
) -> None:
    """Every way that a merge can take reads the same dequantised weights."""
    quantised(FORMATS["nf4"], lm_base, tmp_path / "base")
    merged = judged_merge(tmp_path / "base", classifier_adapter, tmp_path / "merged", Strategy.MEMORY)
    assert merged.verification.verdict is Verdict.PASS, merged.verification.reasons


def test_the_gate_catches_one_wrong_scale(lm_base: Path, lm_adapter: Path, tmp_path: Path) -> None:
    """A block of 64 weights, dequantised twice as large."""
    quantised(FORMATS["fp4"], lm_base, tmp_path / "base")
    shutil.copytree(tmp_path / "base", tmp_path / "tampered")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    tensors["model.layers.3.mlp.up_proj.weight.absmax"][5] ^= 0x80
    save_file(tensors, tmp_path / "tampered" / "model.safetensors", {"format": "pt"})
    merged = judged_merge(tmp_path / "tampered", lm_adapter, tmp_path / "merged")
    assert merged.accepted
    sources = resolve(
        SourceRequest((str(lm_adapter),), base_model=str(tmp_path / "base")),
        hub=Hub(endpoint="http://127.0.0.1:9"),
        quantized_base=QuantizedBase.DEQUANTIZE,
    )
    verification = verify(
        merged.folder, sources, settings=VerifySettings(outputs=False, isolated=False), progress=Silent()
    )
    assert verification.verdict is Verdict.FAIL
    assert "model.layers.3.mlp.up_proj" in " ".join(verification.reasons)
