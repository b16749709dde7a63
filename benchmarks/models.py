"""The benchmark's models and adapters: random weights of the right shapes, made once and kept in a folder.

Random weights cost a merge exactly what trained ones cost. Checkpoints are written shard by shard, so that
making one needs little memory.
"""

from __future__ import annotations

import json
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

_BLOCK = 1 << 20
"""Random elements drawn once per tensor and repeated: drawing billions would take longer than the benchmark."""


@dataclass(frozen=True)
class Size:
    """A Llama-shaped model in bf16."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    shards: int
    vocab: int = 32000
    sparse: bool = False
    """Zeros that take no room on the disk, where only the sizes matter."""

    @property
    def config(self) -> dict[str, Any]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocab,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "dtype": "bfloat16",
        }

    def linears(self) -> Iterator[tuple[str, int, int]]:
        """Every linear layer inside the blocks: module, rows (out), columns (in)."""
        kv = self.hidden // self.heads * self.kv_heads
        shapes = {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (kv, self.hidden),
            "self_attn.v_proj": (kv, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }
        for layer in range(self.layers):
            for module, (rows, columns) in shapes.items():
                yield f"model.layers.{layer}.{module}", rows, columns

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every tensor on disk: name, shape."""
        yield "model.embed_tokens.weight", (self.vocab, self.hidden)
        for module, rows, columns in self.linears():
            yield f"{module}.weight", (rows, columns)
        for layer in range(self.layers):
            yield f"model.layers.{layer}.input_layernorm.weight", (self.hidden,)
            yield f"model.layers.{layer}.post_attention_layernorm.weight", (self.hidden,)
        yield "model.norm.weight", (self.hidden,)
        yield "lm_head.weight", (self.vocab, self.hidden)


SIZES = {
    size.name: size
    for size in (
        Size("0.1B", 640, 1728, 14, 10, 2, 2),
        Size("1.1B", 2048, 5632, 22, 32, 4, 5),
        Size("3B", 2560, 8704, 32, 32, 8, 7),
        Size("8B", 4096, 14336, 32, 32, 8, 4, vocab=128256, sparse=True),
    )
}


def base_model(size: Size, folder: Path) -> Path:
    """The checkpoint of `size` in `folder`, made when it is missing."""
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    names = list(size.tensors())
    per_shard = -(-len(names) // size.shards)
    weight_map: dict[str, str] = {}
    total = 0
    for shard in range(size.shards):
        file = f"model-{shard + 1:05d}-of-{size.shards:05d}.safetensors"
        shapes = dict(names[shard * per_shard : (shard + 1) * per_shard])
        weight_map.update(dict.fromkeys(shapes, file))
        total += sum(2 * torch.Size(shape).numel() for shape in shapes.values())
        if size.sparse:
            _save_sparse(shapes, folder / file)
        else:
            tensors = {name: _random(shape, seed=hash_of(name)) for name, shape in shapes.items()}
            save_file(tensors, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(size.config))
    return folder


def _save_sparse(shapes: dict[str, tuple[int, ...]], path: Path) -> None:
    """A safetensors file of bf16 zeros, as a hole in the disk."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def lora(size: Size, base: Path, folder: Path, *, rank: int, dora: bool = False) -> Path:
    """LoRA, or DoRA, of `rank` on every linear layer, in fp32, its effect about 1 % of the weights."""
    tensors: dict[str, torch.Tensor] = {}
    for module, rows, columns in size.linears():
        prefix = f"base_model.model.{module}"
        tensors[f"{prefix}.lora_A.weight"] = _random((rank, columns), hash_of(module), torch.float32)
        tensors[f"{prefix}.lora_B.weight"] = _random((rows, rank), hash_of(module) + 1, torch.float32) * 0.06
        if dora:
            tensors[f"{prefix}.lora_magnitude_vector"] = torch.full((rows,), 0.02 * columns**0.5)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "use_dora": dora, "lora_dropout": 0.0}
    return _adapter(folder, base, tensors, config)


def loha(size: Size, base: Path, folder: Path, *, rank: int) -> Path:
    """LoHa of `rank` on every linear layer."""
    tensors: dict[str, torch.Tensor] = {}
    for module, rows, columns in size.linears():
        for index, (part, shape) in enumerate(
            (
                ("w1_a", (rows, rank)),
                ("w1_b", (rank, columns)),
                ("w2_a", (rows, rank)),
                ("w2_b", (rank, columns)),
            )
        ):
            tensors[f"base_model.model.{module}.hada_{part}"] = (
                _random(shape, hash_of(module) + index, torch.float32) * 3.5
            )
    config = {"peft_type": "LOHA", "r": rank, "alpha": rank, "rank_dropout": 0.0, "module_dropout": 0.0}
    return _adapter(folder, base, tensors, config)


def moe(folder: Path) -> tuple[Path, Path]:
    """A mixture of experts of 0.2B, per-expert on disk, and a LoRA on attention and on the fused experts."""
    base, adapter = folder / "base", folder / "adapter"
    if not (adapter / "adapter_config.json").exists():
        from peft import LoraConfig, get_peft_model
        from transformers import MixtralConfig, MixtralForCausalLM

        torch.manual_seed(0)
        config = MixtralConfig(
            vocab_size=8000, hidden_size=512, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=8,
            num_key_value_heads=2, num_local_experts=16, num_experts_per_tok=2,
        )  # fmt: skip
        model = MixtralForCausalLM(config).to(torch.bfloat16)
        model.save_pretrained(base)
        wrapped = get_peft_model(
            model,
            LoraConfig(
                r=16, lora_alpha=32, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
                target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            ),
        )  # fmt: skip
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.002)
        wrapped.peft_config["default"].base_model_name_or_path = str(base)
        wrapped.save_pretrained(adapter)
    return base, adapter


def _adapter(folder: Path, base: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    targets = sorted({name.split(".")[-1] for name, _, _ in SIZES["0.1B"].linears()})
    config = {
        **config,
        "base_model_name_or_path": str(base),
        "task_type": "CAUSAL_LM",
        "target_modules": targets,
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def _random(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """A tensor of standard deviation 0.02: a random block, repeated."""
    elements = torch.Size(shape).numel()
    generator = torch.Generator().manual_seed(seed)
    block = (torch.randn(min(elements, _BLOCK), generator=generator) * 0.02).to(dtype)
    return block.repeat(-(-elements // len(block)))[:elements].reshape(shape).contiguous()


def hash_of(name: str) -> int:
    """A seed that is the same in every process."""
    return zlib.crc32(name.encode())


def make(row: str, folder: Path) -> None:
    """Base and adapter of a row of the benchmark, in `folder`."""
    if row.endswith("MoE"):
        moe(folder)
        return
    size = SIZES[row.split()[0]]
    base = base_model(size, folder / "base")
    if row.endswith("LoHa"):
        loha(size, base, folder / "adapter", rank=16)
    else:
        rank = 256 if "r=256" in row else 16
        lora(size, base, folder / "adapter", rank=rank, dora=row.endswith("DoRA"))


if __name__ == "__main__":
    make(sys.argv[1], Path(sys.argv[2]))
