"""A merge into a quantised base, dequantised, has the bytes of the merge into the 16-bit tensors it stands for.

The formats here are written by hand, codes and scales at random, with the reference from the format's definition: what
the libraries of test_quantized_libraries.py do not write, or would not read. Then what must be refused.
"""

from __future__ import annotations

import json
import resource
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from merge_adapter.checkpoint.folder import Folder
from merge_adapter.checkpoint.quantization import described, quantization_of
from merge_adapter.errors import BaseModelError, MalformedError, StorageError
from merge_adapter.merge import merge
from merge_adapter.plan import make_plan
from merge_adapter.types import (
    Adapter,
    BaseModel,
    DType,
    FileOrigin,
    MergeSettings,
    QuantizedBase,
    Resolved,
    Silent,
)
from merge_adapter.verify.models.kinds import Kind
from merge_adapter.verify.models.quantized import dequantized_folder

LLAMA = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "vocab_size": 48, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "dtype": "bfloat16",
}  # fmt: skip
GPT_OSS = {
    "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 48, "num_local_experts": 4, "num_experts_per_tok": 2,
    "max_position_embeddings": 4096, "pad_token_id": 0, "eos_token_id": 2, "dtype": "bfloat16",
}  # fmt: skip

Tensors = dict[str, torch.Tensor]
Encoded = tuple[Tensors, torch.Tensor]
"""The stored tensors of one weight, and the weight they stand for, in float32."""


def spread(scale: torch.Tensor, size: int, shape: torch.Size) -> torch.Tensor:
    """Scales of blocks of `size` x `size`, one per element; the last blocks may be cut."""
    tall = scale.repeat_interleave(size, -2)[..., : shape[-2], :]
    return tall.repeat_interleave(size, -1)[..., : shape[-1]]


def fp8_uneven_blocks(name: str, weight: torch.Tensor) -> Encoded:
    codes = (weight.float() * 8).to(torch.float8_e4m3fn)
    scale = torch.rand([-(-size // 48) for size in weight.shape]) + 0.1
    return {name: codes, f"{name}_scale_inv": scale}, codes.float() * spread(scale, 48, weight.shape)


def fp8_exponents(name: str, weight: torch.Tensor, *, typed: bool) -> Encoded:
    """Scales that are powers of two, stored as their exponents plus 127: MXFP8, or DeepSeek's ue8m0."""
    codes = (weight.float() * 8).to(torch.float8_e4m3fn)
    powers = torch.randint(120, 130, [size // 32 for size in weight.shape], dtype=torch.uint8)
    scale = powers.view(torch.float8_e8m0fnu) if typed else powers
    exact = codes.float() * spread(torch.exp2(powers.float() - 127), 32, weight.shape)
    return {name: codes, f"{name}_scale_inv": scale}, exact


def float_rows(name: str, weight: torch.Tensor) -> Encoded:
    """With what a serving engine wants to know beside it, which means nothing for the weights."""
    codes = (weight.float() * 8).to(torch.float8_e4m3fn)
    scale = (torch.rand(weight.shape[0], 1) + 0.1).bfloat16()
    module = name.removesuffix(".weight")
    beside = {f"{module}.input_scale": torch.rand(1)}
    if "k_proj" in name:
        beside[f"{module.rpartition('.')[0]}.k_scale"] = torch.rand(1)
    return {name: codes, f"{name}_scale": scale, **beside}, codes.float() * scale.float()


def bits4(name: str, weight: torch.Tensor) -> Encoded:
    """Blocks that end inside a row, a table of no known kind."""
    codes, table = torch.randint(0, 16, (weight.numel(),)), torch.linspace(-1, 1, 16)
    absmax = torch.rand(-(-weight.numel() // 96)) + 0.1
    state = {"quant_type": "nf4", "blocksize": 96, "dtype": "bfloat16", "shape": list(weight.shape)}
    text = json.dumps(state).encode()
    exact = table[codes] * absmax.repeat_interleave(96)[: weight.numel()]
    return {
        name: ((codes[0::2] << 4) | codes[1::2]).to(torch.uint8)[:, None],
        f"{name}.absmax": absmax,
        f"{name}.quant_map": table,
        f"{name}.quant_state.bitsandbytes__nf4": torch.tensor(list(text), dtype=torch.uint8),
    }, exact.reshape(weight.shape)


def mxfp4(name: str, weight: torch.Tensor) -> Encoded:
    experts, columns, rows = weight.shape
    blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
    scales = torch.randint(118, 126, (experts, rows, columns // 32), dtype=torch.uint8)
    magnitudes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    codes = torch.stack((blocks & 15, blocks >> 4), -1).flatten(-2).long()
    values = magnitudes[codes & 7] * (1 - 2 * (codes >> 3)) * torch.exp2(scales.float() - 127)[..., None]
    return {f"{name}_blocks": blocks, f"{name}_scales": scales}, values.flatten(-2).transpose(1, 2)


@dataclass(frozen=True)
class Format:
    config: dict[str, Any]
    encode: Callable[[str, torch.Tensor], Encoded]


FP8 = {"quant_method": "fp8", "weight_block_size": [48, 48], "activation_scheme": "dynamic"}
BNB4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
PACKED = {
    "quant_method": "compressed-tensors", "format": "pack-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "symmetric": True}}},
}  # fmt: skip
FORMATS = {
    "fp8, blocks that do not divide": Format(FP8, fp8_uneven_blocks),
    "fp8, exponents in bytes": Format(
        {"quant_method": "mxfp8"}, lambda name, weight: fp8_exponents(name, weight, typed=False)
    ),
    "fp8, exponents": Format(
        {"quant_method": "fp8"}, lambda name, weight: fp8_exponents(name, weight, typed=True)
    ),
    "compressed floats": Format(
        {"quant_method": "compressed-tensors", "format": "float-quantized"}, float_rows
    ),
    "fbgemm rows": Format({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, float_rows),
    "4 bit": Format(BNB4, bits4),
}


@dataclass(frozen=True)
class Source:
    """A model in 16 bit and a LoRA for it."""

    model: Path
    adapter: Path


def made(place: Path, model_type: str, config: dict[str, Any], **lora: Any) -> Source:
    import transformers
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.CONFIG_MAPPING[model_type](**config), dtype=torch.bfloat16
        )
        model.save_pretrained(place / "made")
        adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, **lora))
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_" in name:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        adapted.save_pretrained(place / "adapter")
    return Source(place / "made", place / "adapter")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return made(
        tmp_path_factory.mktemp("llama"), "llama", LLAMA, target_modules=["q_proj", "down_proj", "k_proj"]
    )


def write(folder: Path, config: dict[str, Any], tensors: Tensors) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    kept = {name: value.contiguous() for name, value in tensors.items()}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    return folder


def quantised(
    source: Source, place: Path, form: Format, ends: tuple[str, ...] = ("_proj.weight",)
) -> tuple[Path, Path]:
    """A quantised base, and the plain base it stands for."""
    torch.manual_seed(5)
    written = json.loads((source.model / "config.json").read_text())
    stored: Tensors = {}
    plain: Tensors = {}
    for name, value in load_file(source.model / "model.safetensors").items():
        if name.endswith(ends):
            parts, exact = form.encode(name, value)
            plain[name] = exact.bfloat16()
            stored.update(parts)
        else:
            stored[name] = plain[name] = value
    base = write(place / "quantised", {**written, "quantization_config": form.config}, stored)
    return base, write(place / "plain", written, plain)


def merged(
    base: Path, adapter: Path, output: Path, choice: QuantizedBase, dtype: DType = DType.AUTO
) -> tuple[Tensors, Any]:
    config = json.loads((adapter / "adapter_config.json").read_text())
    sources = Resolved(
        (Adapter(Folder(adapter), config, "LORA"),),
        BaseModel(Folder(base), json.loads((base / "config.json").read_text())),
        None,
    )
    settings = MergeSettings(dtype=dtype, quantized_base=choice)
    plan = make_plan(sources, settings)
    output.mkdir()
    merge(plan, sources, output, settings=settings, progress=Silent())
    return dict(load_file(output / "model.safetensors")), plan


def assert_same_merge(base: Path, plain: Path, adapter: Path, place: Path, dtype: DType = DType.AUTO) -> Any:
    got, plan = merged(base, adapter, place / "one", QuantizedBase.DEQUANTIZE, dtype)
    expected, _ = merged(plain, adapter, place / "two", QuantizedBase.REFUSE, dtype)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in got)
    assert {name: v.dtype for name, v in got.items()} == {name: v.dtype for name, v in expected.items()}
    return plan


@pytest.mark.parametrize("label", FORMATS)
def test_the_merge_is_that_of_the_plain_weights(label: str, llama: Source, tmp_path: Path) -> None:
    base, plain = quantised(llama, tmp_path, FORMATS[label])
    plan = assert_same_merge(base, plain, llama.adapter, tmp_path)
    assert plan.config_changes["quantization_config"] is None
    assert {shard.origin for shard in plan.outputs} == {FileOrigin.MERGED}
    assert any("dequantised" in note and "BF16" in note for note in plan.notes)


@pytest.mark.parametrize("label", ["fp8, blocks that do not divide", "fbgemm rows"])
def test_the_gate_reads_by_definition_what_no_library_does(label: str, llama: Source, tmp_path: Path) -> None:
    base, plain = quantised(llama, tmp_path, FORMATS[label])
    (tmp_path / "place").mkdir()
    folder = dequantized_folder(base, tmp_path / "place", Kind.CAUSAL, trust_remote_code=False)
    found, expected = load_file(folder / "model.safetensors"), load_file(plain / "model.safetensors")
    found = {name: value for name, value in found.items() if not name.endswith("k_scale")}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("label", ["fp8, blocks that do not divide", "fp8, exponents"])
def test_a_full_disk_is_no_fault_of_the_base(label: str, llama: Source, tmp_path: Path) -> None:
    """The kernel refuses what goes beyond a file-size limit as it does on a full disk."""
    base, _ = quantised(llama, tmp_path, FORMATS[label])
    (tmp_path / "place").mkdir()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(StorageError, match="cannot be written") as caught:
            dequantized_folder(base, tmp_path / "place", Kind.CAUSAL, trust_remote_code=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "TMPDIR" in caught.value.hint


@pytest.mark.parametrize("dtype", [DType.FLOAT32, DType.FLOAT16])
def test_another_dtype_is_that_of_the_plain_weights_too(dtype: DType, llama: Source, tmp_path: Path) -> None:
    """The reference stays the same; only the sum is rounded otherwise."""
    base, plain = quantised(llama, tmp_path, FORMATS["4 bit"])
    assert_same_merge(base, plain, llama.adapter, tmp_path, dtype)


def test_a_pickled_base(llama: Source, tmp_path: Path) -> None:
    """As bitsandbytes' early 4-bit checkpoints are."""
    base, plain = quantised(llama, tmp_path, FORMATS["4 bit"])
    for folder in (base, plain):
        torch.save(dict(load_file(folder / "model.safetensors")), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    assert_same_merge(base, plain, llama.adapter, tmp_path)


def test_shards_without_codes_are_copied(llama: Source, tmp_path: Path) -> None:
    """Those with codes are written anew, under the same names, with the index that fits."""
    base, _ = quantised(llama, tmp_path, FORMATS["4 bit"])
    tensors = dict(load_file(base / "model.safetensors"))
    parts = {
        "model-00001-of-00002.safetensors": {n: v for n, v in tensors.items() if "layers" not in n},
        "model-00002-of-00002.safetensors": {n: v for n, v in tensors.items() if "layers" in n},
    }
    (base / "model.safetensors").unlink()
    for path, part in parts.items():
        save_file(part, base / path, {"format": "pt"})
    places = {name: path for path, part in parts.items() for name in part}
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((llama.adapter / "adapter_config.json").read_text())
    sources = Resolved(
        (Adapter(Folder(llama.adapter), config, "LORA"),),
        BaseModel(Folder(base), json.loads((base / "config.json").read_text())),
        None,
    )
    settings = MergeSettings(quantized_base=QuantizedBase.DEQUANTIZE)
    plan = make_plan(sources, settings)
    assert [shard.origin for shard in plan.outputs] == [FileOrigin.COPIED, FileOrigin.MERGED]
    (tmp_path / "out").mkdir()
    merge(plan, sources, tmp_path / "out", settings=settings, progress=Silent())
    written = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(written["weight_map"]) == set(load_file(llama.model / "model.safetensors"))
    assert not any(
        "absmax" in name for name in load_file(tmp_path / "out" / "model-00002-of-00002.safetensors")
    )


def test_mxfp4_experts(tmp_path: Path) -> None:
    """Blocks and scales become the fused expert parameters, which a LoRA may change."""
    source = made(
        tmp_path, "gpt_oss", GPT_OSS, target_modules=["q_proj"], target_parameters=["experts.down_proj"]
    )
    ends = ("experts.gate_up_proj", "experts.down_proj")
    base, plain = quantised(source, tmp_path, Format({"quant_method": "mxfp4"}, mxfp4), ends)
    assert_same_merge(base, plain, source.adapter, tmp_path)


def test_stacked_experts_with_a_grid_of_scales_each(llama: Source, tmp_path: Path) -> None:
    from merge_adapter.checkpoint.base import read_base

    codes = torch.randn(3, 80, 64).to(torch.float8_e4m3fn)
    scale = torch.rand(3, 2, 2) + 0.1
    config = {"dtype": "float16", "quantization_config": FP8}
    folder = write(tmp_path / "base", config, {"e.down_proj": codes, "e.down_proj_scale_inv": scale})
    files = read_base(
        BaseModel(Folder(folder), config), MergeSettings(quantized_base=QuantizedBase.DEQUANTIZE)
    )
    expected = (codes.float() * spread(scale, 48, codes.shape)).half()
    with files.open() as weights:
        assert torch.equal(weights.read("e.down_proj"), expected)
        assert torch.equal(weights.read_rows("e.down_proj", 1, 3), expected[1:])


# ------------------------------------------------------------------------------------------------- refusals


def broken(source: Source, place: Path, label: str, change: Callable[[Tensors], None]) -> None:
    """Merge into a quantised base whose tensors `change` has spoilt."""
    base, _ = quantised(source, place, FORMATS[label])
    tensors = dict(load_file(base / "model.safetensors"))
    change(tensors)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    merged(base, source.adapter, place / "out", QuantizedBase.DEQUANTIZE)


def test_refused_unless_asked_for(llama: Source, tmp_path: Path) -> None:
    base, _ = quantised(llama, tmp_path, FORMATS["fp8, blocks that do not divide"])
    with pytest.raises(BaseModelError, match="fp8") as caught:
        merged(base, llama.adapter, tmp_path / "out", QuantizedBase.REFUSE)
    assert "--quantized-base dequantize" in caught.value.hint


@pytest.mark.parametrize("method", ["gptq", "awq", "nobody_knows"])
def test_other_formats_are_refused_with_the_way_out(method: str, llama: Source, tmp_path: Path) -> None:
    config = {
        **json.loads((llama.model / "config.json").read_text()),
        "quantization_config": {"quant_method": method},
    }
    base = write(tmp_path / "base", config, load_file(llama.model / "model.safetensors"))
    with pytest.raises(
        BaseModelError, match=method.upper() if method != "nobody_knows" else method
    ) as caught:
        merged(base, llama.adapter, tmp_path / "out", QuantizedBase.DEQUANTIZE)
    assert "--base-model" in caught.value.hint


UP = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("label", "lost", "said"),
    [
        ("fp8, blocks that do not divide", f"{UP}_scale_inv", "in FP8 without a scale"),
        ("4 bit", f"{UP}.absmax", r"absmax is missing beside"),
        ("4 bit", f"{UP}.quant_state.bitsandbytes__nf4", r"in codes \(U8\)"),
        ("compressed floats", f"{UP}_scale", "in FP8 without a scale"),
    ],
)
def test_codes_without_their_scales_are_an_error(
    label: str, lost: str, said: str, llama: Source, tmp_path: Path
) -> None:
    """They would read as weights of another size."""
    with pytest.raises(BaseModelError, match=said):
        broken(llama, tmp_path, label, lambda tensors: tensors.__delitem__(lost))


def test_scales_of_another_shape_are_an_error(llama: Source, tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        tensors[f"{UP}_scale_inv"] = torch.rand(5, 7)

    with pytest.raises(BaseModelError, match="do not fit"):
        broken(llama, tmp_path, "fp8, blocks that do not divide", change)


@pytest.mark.parametrize(
    "state",
    [
        b"no json",
        b"[]",
        b'{"shape": [0, 4], "blocksize": 64}',
        b'{"shape": [128, 64], "blocksize": 0}',
        b'{"shape": [128, 64], "blocksize": 64, "dtype": "int8"}',
    ],
)
def test_a_broken_state_is_malformed(state: bytes, llama: Source, tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        tensors[f"{UP}.quant_state.bitsandbytes__nf4"] = torch.tensor(list(state), dtype=torch.uint8)

    with pytest.raises(MalformedError, match="up_proj"):
        broken(llama, tmp_path, "4 bit", change)


def test_a_state_of_another_tensor_is_an_error(llama: Source, tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        state = json.dumps({"shape": [1 << 20, 1 << 20], "blocksize": 96}).encode()
        tensors[f"{UP}.quant_state.bitsandbytes__nf4"] = torch.tensor(list(state), dtype=torch.uint8)

    with pytest.raises(BaseModelError, match="do not make"):
        broken(llama, tmp_path, "4 bit", change)


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"weight_g_idx": torch.zeros(64, dtype=torch.int32)}, "order of its activations"),
        ({"weight_zero_point": torch.zeros(3, 2, dtype=torch.int32)}, "not packed as its weights"),
        ({"weight_scale": torch.rand(128, 5).bfloat16()}, "do not fit"),
        ({"weight_packed": torch.zeros(128, 8, dtype=torch.uint8)}, "whole integers of one width"),
    ],
)
def test_packed_integers_of_other_kinds(extra: Tensors, said: str, llama: Source, tmp_path: Path) -> None:
    tensors = dict(load_file(llama.model / "model.safetensors"))
    del tensors[UP]
    module = UP.removesuffix(".weight")
    packed = {
        "weight_packed": torch.zeros(128, 8, dtype=torch.int32),
        "weight_scale": torch.rand(128, 2).bfloat16(),
        **extra,
    }
    tensors |= {f"{module}.{name}": value for name, value in packed.items()}
    config = {**json.loads((llama.model / "config.json").read_text()), "quantization_config": PACKED}
    base = write(tmp_path / "base", config, tensors)
    with pytest.raises(BaseModelError, match=said):
        merged(base, llama.adapter, tmp_path / "out", QuantizedBase.DEQUANTIZE)


def test_a_config_that_no_tensor_follows(llama: Source, tmp_path: Path) -> None:
    config = {**json.loads((llama.model / "config.json").read_text()), "quantization_config": FP8}
    base = write(tmp_path / "base", config, load_file(llama.model / "model.safetensors"))
    with pytest.raises(BaseModelError, match="none of its tensors is stored so"):
        merged(base, llama.adapter, tmp_path / "out", QuantizedBase.DEQUANTIZE)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"quantization_config": BNB4}, "bitsandbytes, 4 bit nf4"),
        ({"quantization_config": {"load_in_8bit": True}}, "bitsandbytes, 8 bit"),
        ({"text_config": {"quantization_config": PACKED}}, "compressed-tensors, pack-quantized"),
        ({"quantization_config": {"quant_method": "x\n# title"}}, "a method without a name"),
        ({"quantization_config": "fp8"}, "a method without a name"),
    ],
)
def test_the_words_for_it(config: dict[str, Any], words: str) -> None:
    """They stand in errors, notes and cards, so that nothing of a stranger's config may reach them unchecked."""
    found = quantization_of(config)
    assert found is not None
    assert described(found) == words
