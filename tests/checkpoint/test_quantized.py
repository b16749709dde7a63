"""A merge into a quantised base, dequantised, has the bytes of the merge into the 16-bit tensors it stands for.

Each format is written here by hand: codes and scales at random, and the reference from the format's definition. The
bitsandbytes layout (names, nibble order, nested scales) is that of bitsandbytes 0.50, whose own kernels
agreed bit for bit with these recipes.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from merge_adapter.checkpoint.folder import Folder
from merge_adapter.errors import BaseModelError, MalformedError
from merge_adapter.merge import merge
from merge_adapter.plan import make_plan
from merge_adapter.types import Adapter, BaseModel, FileOrigin, MergeSettings, QuantizedBase, Resolved, Silent

LLAMA = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "vocab_size": 48, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "dtype": "bfloat16",
}  # fmt: skip
GPT_OSS = {
    "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 48, "num_local_experts": 4, "num_experts_per_tok": 2,
    "max_position_embeddings": 4096, "pad_token_id": 0, "eos_token_id": 2, "dtype": "bfloat16",
}  # fmt: skip

Tensors = dict[str, torch.Tensor]
Encoded = tuple[Tensors, torch.Tensor]
"""The stored tensors of one weight, and the bf16 weight they stand for."""


def fp8_blocks(name: str, weight: torch.Tensor) -> Encoded:
    codes = (weight.float() * 8).to(torch.float8_e4m3fn)
    rows, columns = (-(-size // 48) for size in weight.shape)
    scale = torch.rand(rows, columns) + 0.1
    spread = scale.repeat_interleave(48, 0)[: weight.shape[0]].repeat_interleave(48, 1)[:, : weight.shape[1]]
    return {name: codes, f"{name}_scale_inv": scale}, (codes.float() * spread).bfloat16()


def float_rows(name: str, weight: torch.Tensor) -> Encoded:
    codes, scale = (weight.float() * 8).to(torch.float8_e4m3fn), torch.rand(weight.shape[0], 1) + 0.1
    return {name: codes, f"{name}_scale": scale.bfloat16()}, (
        codes.float() * scale.bfloat16().float()
    ).bfloat16()


def packed_int4(name: str, weight: torch.Tensor) -> Encoded:
    codes = torch.randint(-8, 8, weight.shape)
    scale = (torch.rand(weight.shape[0], weight.shape[1] // 32) + 0.1).bfloat16()
    words = torch.zeros(weight.shape[0], weight.shape[1] // 8, dtype=torch.int64)
    for place in range(8):
        words |= (codes[:, place::8] + 8) << (4 * place)
    words = torch.where(words >= 1 << 31, words - (1 << 32), words).int()
    stored = {f"{name}_packed": words, f"{name}_scale": scale, f"{name}_shape": torch.tensor(weight.shape)}
    return stored, (codes * scale.float().repeat_interleave(32, 1)).bfloat16()


def bits8(name: str, weight: torch.Tensor) -> Encoded:
    codes, scale = torch.randint(-127, 128, weight.shape).to(torch.int8), torch.rand(weight.shape[0]) + 0.1
    module = name.removesuffix(".weight")
    stored = {
        name: codes,
        f"{module}.SCB": scale,
        f"{module}.weight_format": torch.tensor(0, dtype=torch.uint8),
    }
    return stored, (codes.float() * scale[:, None] * 7.874015718698502e-3).bfloat16()


def bits4(name: str, weight: torch.Tensor, *, nested: bool) -> Encoded:
    codes, table = torch.randint(0, 16, (weight.numel(),)), torch.linspace(-1, 1, 16)
    blocks = weight.numel() // 64
    state: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": 64,
        "dtype": "bfloat16",
        "shape": list(weight.shape),
    }
    stored = {name: ((codes[0::2] << 4) | codes[1::2]).to(torch.uint8)[:, None], f"{name}.quant_map": table}
    if nested:
        inner, outer = torch.randint(0, 256, (blocks,)), torch.rand(-(-blocks // 256)) + 0.1
        inner_table = torch.linspace(-1, 1, 256)
        absmax = inner_table[inner] * outer[torch.arange(blocks) // 256] + 1.25
        state |= {"nested_blocksize": 256, "nested_offset": 1.25, "nested_dtype": "float32"}
        stored |= {
            f"{name}.absmax": inner.to(torch.uint8),
            f"{name}.nested_absmax": outer,
            f"{name}.nested_quant_map": inner_table,
        }
    else:
        absmax = torch.rand(blocks) + 0.1
        stored[f"{name}.absmax"] = absmax
    text = json.dumps(state).encode()
    stored[f"{name}.quant_state.bitsandbytes__nf4"] = torch.tensor(list(text), dtype=torch.uint8)
    return stored, (table[codes] * absmax.repeat_interleave(64)).reshape(weight.shape).bfloat16()


def mxfp4(name: str, weight: torch.Tensor) -> Encoded:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    experts, columns, rows = weight.shape
    blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
    scales = torch.randint(118, 126, (experts, rows, columns // 32), dtype=torch.uint8)
    reference = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
    return {f"{name}_blocks": blocks, f"{name}_scales": scales}, reference.contiguous()


@dataclass(frozen=True)
class Format:
    config: dict[str, Any]
    encode: Callable[[str, torch.Tensor], Encoded]


FP8 = {"quant_method": "fp8", "weight_block_size": [48, 48], "activation_scheme": "dynamic"}
COMPRESSED = {
    "quant_method": "compressed-tensors", "format": "pack-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "symmetric": True}}},
}  # fmt: skip
BNB4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}

FORMATS = {
    "fp8 blocks": Format(FP8, fp8_blocks),
    "compressed floats": Format(
        {"quant_method": "compressed-tensors", "format": "float-quantized"}, float_rows
    ),
    "compressed int4": Format(COMPRESSED, packed_int4),
    "bitsandbytes 8 bit": Format({"quant_method": "bitsandbytes", "load_in_8bit": True}, bits8),
    "bitsandbytes 4 bit": Format(BNB4, lambda name, weight: bits4(name, weight, nested=False)),
    "bitsandbytes 4 bit, nested": Format(BNB4, lambda name, weight: bits4(name, weight, nested=True)),
}


def write(folder: Path, config: dict[str, Any], tensors: Tensors) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(
        {name: value.contiguous() for name, value in tensors.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    return folder


def make(
    tmp_path: Path,
    model_type: str,
    config: dict[str, Any],
    form: Format,
    chosen: Callable[[str], bool],
    **lora: Any,
) -> tuple[Path, Path, Path]:
    """A quantised base, the plain base it stands for, and a LoRA for both."""
    import transformers
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.CONFIG_MAPPING[model_type](**config), dtype=torch.bfloat16
        )
        model.save_pretrained(tmp_path / "made")
        adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, **lora))
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_" in name:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        adapted.save_pretrained(tmp_path / "adapter")
    written = json.loads((tmp_path / "made" / "config.json").read_text())
    stored: Tensors = {}
    plain: Tensors = {}
    for name, value in load_file(tmp_path / "made" / "model.safetensors").items():
        if chosen(name):
            parts, plain[name] = form.encode(name, value)
            stored.update(parts)
        else:
            stored[name] = plain[name] = value
    quantised = write(tmp_path / "quantised", {**written, "quantization_config": form.config}, stored)
    return quantised, write(tmp_path / "plain", written, plain), tmp_path / "adapter"


def merged(base: Path, adapter: Path, output: Path, choice: QuantizedBase) -> tuple[Tensors, Any]:
    config = json.loads((adapter / "adapter_config.json").read_text())
    sources = Resolved(
        (Adapter(Folder(adapter), config, "LORA"),),
        BaseModel(Folder(base), json.loads((base / "config.json").read_text())),
        None,
    )
    settings = MergeSettings(quantized_base=choice)
    plan = make_plan(sources, settings)
    output.mkdir()
    merge(plan, sources, output, settings=settings, progress=Silent())
    return dict(load_file(output / "model.safetensors")), plan


def linear(name: str) -> bool:
    return "_proj" in name


@pytest.mark.parametrize("label", FORMATS)
def test_the_merge_is_that_of_the_plain_weights(label: str, tmp_path: Path) -> None:
    quantised, plain, adapter = make(
        tmp_path, "llama", LLAMA, FORMATS[label], linear, target_modules=["q_proj", "down_proj"]
    )
    got, plan = merged(quantised, adapter, tmp_path / "one", QuantizedBase.DEQUANTIZE)
    expected, _ = merged(plain, adapter, tmp_path / "two", QuantizedBase.REFUSE)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in got)
    assert {value.dtype for value in got.values()} == {torch.bfloat16}
    assert plan.config_changes["quantization_config"] is None
    assert {shard.origin for shard in plan.outputs} == {FileOrigin.MERGED}
    assert any("dequantised" in note for note in plan.notes)


def test_mxfp4_experts(tmp_path: Path) -> None:
    """Blocks and scales become the fused expert parameters, which a LoRA may change."""
    quantised, plain, adapter = make(
        tmp_path, "gpt_oss", GPT_OSS, Format({"quant_method": "mxfp4"}, mxfp4),
        lambda name: name.endswith(("experts.gate_up_proj", "experts.down_proj")),
        target_modules=["q_proj"], target_parameters=["experts.down_proj"],
    )  # fmt: skip
    got, _ = merged(quantised, adapter, tmp_path / "one", QuantizedBase.DEQUANTIZE)
    expected, _ = merged(plain, adapter, tmp_path / "two", QuantizedBase.REFUSE)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in got)


def test_refused_unless_asked_for(tmp_path: Path) -> None:
    quantised, _, adapter = make(
        tmp_path, "llama", LLAMA, FORMATS["fp8 blocks"], linear, target_modules=["q_proj"]
    )
    with pytest.raises(BaseModelError, match="fp8") as caught:
        merged(quantised, adapter, tmp_path / "out", QuantizedBase.REFUSE)
    assert "--quantized-base dequantize" in caught.value.hint


@pytest.mark.parametrize("method", ["gptq", "awq", "nobody_knows"])
def test_other_formats_are_refused_with_the_way_out(method: str, tmp_path: Path) -> None:
    quantised, _, adapter = make(
        tmp_path, "llama", LLAMA, FORMATS["fp8 blocks"], linear, target_modules=["q_proj"]
    )
    file = quantised / "config.json"
    file.write_text(
        json.dumps({**json.loads(file.read_text()), "quantization_config": {"quant_method": method}})
    )
    with pytest.raises(BaseModelError, match=method) as caught:
        merged(quantised, adapter, tmp_path / "out", QuantizedBase.DEQUANTIZE)
    assert "--base-model" in caught.value.hint


def test_a_lost_scale_is_an_error(tmp_path: Path) -> None:
    """Codes without their scale would read as weights of another size."""
    quantised, _, adapter = make(
        tmp_path, "llama", LLAMA, FORMATS["fp8 blocks"], linear, target_modules=["q_proj"]
    )
    tensors = dict(load_file(quantised / "model.safetensors"))
    del tensors["model.layers.0.mlp.up_proj.weight_scale_inv"]
    save_file(tensors, quantised / "model.safetensors", {"format": "pt"})
    with pytest.raises(BaseModelError, match=r"up_proj\.weight is stored in FP8 without a scale"):
        merged(quantised, adapter, tmp_path / "out", QuantizedBase.DEQUANTIZE)


def test_a_broken_state_is_malformed(tmp_path: Path) -> None:
    quantised, _, adapter = make(
        tmp_path, "llama", LLAMA, FORMATS["bitsandbytes 4 bit"], linear, target_modules=["q_proj"]
    )
    tensors = dict(load_file(quantised / "model.safetensors"))
    name = "model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4"
    tensors[name] = torch.tensor(list(b'{"shape": [0]}'), dtype=torch.uint8)
    save_file(tensors, quantised / "model.safetensors", {"format": "pt"})
    with pytest.raises(MalformedError, match="up_proj"):
        merged(quantised, adapter, tmp_path / "out", QuantizedBase.DEQUANTIZE)
