"""A merge under a limit of memory: files, and even one tensor, larger than all it may hold."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from merge_adapter.errors import MemoryShortError
from merge_adapter.workspace import memory_errors

WIDTH, TOKENS, RANK = 512, 1_000_000, 2
LIMIT = 900_000_000
"""Bytes of memory of its own that the process may have; torch alone takes a quarter of it."""
LIMITED = """
import os, resource, sys
from merge_adapter.cli import run
limit = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])  # stacks of many workers would count too
raise SystemExit(run(sys.argv[2:]))
"""


@pytest.fixture
def huge(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """An encoder whose embedding has 1 GB, in a sparse file, and a LoRA on it and on one small layer."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    adapter.mkdir()
    shapes = {
        "embeddings.word_embeddings.weight": (TOKENS, WIDTH),
        "embeddings.position_embeddings.weight": (16, WIDTH),
        "embeddings.token_type_embeddings.weight": (2, WIDTH),
        "embeddings.LayerNorm.weight": (WIDTH,),
        "embeddings.LayerNorm.bias": (WIDTH,),
    }
    for part, (rows, columns) in {
        "attention.self.query": (WIDTH, WIDTH),
        "attention.self.key": (WIDTH, WIDTH),
        "attention.self.value": (WIDTH, WIDTH),
        "attention.output.dense": (WIDTH, WIDTH),
        "intermediate.dense": (WIDTH, WIDTH),
        "output.dense": (WIDTH, WIDTH),
    }.items():
        shapes[f"encoder.layer.0.{part}.weight"] = (rows, columns)
        shapes[f"encoder.layer.0.{part}.bias"] = (rows,)
    for part in ("attention.output.LayerNorm", "output.LayerNorm"):
        shapes[f"encoder.layer.0.{part}.weight"] = (WIDTH,)
        shapes[f"encoder.layer.0.{part}.bias"] = (WIDTH,)
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (base / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)  # zeros that take no room on the disk
    (base / "config.json").write_text(
        json.dumps(
            {
                "architectures": ["BertModel"], "model_type": "bert", "hidden_size": WIDTH, "num_hidden_layers": 1,
                "num_attention_heads": 8, "intermediate_size": WIDTH, "max_position_embeddings": 16,
                "vocab_size": TOKENS, "add_pooling_layer": False,
            }
        )
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    module, query = "embeddings.word_embeddings", "encoder.layer.0.attention.self.query"
    save_file(
        {
            f"base_model.model.{module}.lora_embedding_A": torch.randn(RANK, TOKENS, generator=generator),
            f"base_model.model.{module}.lora_embedding_B": torch.randn(WIDTH, RANK, generator=generator),
            f"base_model.model.{query}.lora_A.weight": torch.randn(RANK, WIDTH, generator=generator),
            f"base_model.model.{query}.lora_B.weight": torch.randn(WIDTH, RANK, generator=generator),
        },
        adapter / "adapter_model.safetensors",
    )
    (adapter / "adapter_config.json").write_text(
        json.dumps(
            {
                "peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "task_type": "FEATURE_EXTRACTION",
                "target_modules": ["word_embeddings", "query"], "base_model_name_or_path": str(base),
            }
        )
    )  # fmt: skip
    yield base, adapter
    shutil.rmtree(tmp_path)  # pytest keeps the folders of some runs; not a gigabyte of zeros each


def test_a_tensor_larger_than_the_memory_is_merged(huge: tuple[Path, Path], tmp_path: Path) -> None:
    """Right to the last row, in less memory than the tensor itself would take."""
    base, adapter = huge
    assert (base / "model.safetensors").stat().st_size > LIMIT
    arguments = ["merge", str(adapter), "--output", str(tmp_path / "out"), "--no-verify", "--quiet"]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(LIMIT), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    factors = {}
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a dict
            factors[name.split(".")[-1]] = file.get_tensor(name)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        merged = file.get_slice("embeddings.word_embeddings.weight")
        for start in (0, TOKENS // 2, TOKENS - 100):
            rows = slice(start, start + 100)
            expected = factors["lora_embedding_A"][:, rows].T @ factors["lora_embedding_B"].T
            torch.testing.assert_close(merged[rows].float(), expected, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize(
    "take",
    [lambda: torch.empty(1 << 50), lambda: bytearray(1 << 60), lambda: numpy.empty(1 << 50)],
    ids=["torch", "python", "numpy"],
)
def test_memory_that_runs_out_is_said_in_our_words(take: Callable[[], object]) -> None:
    """Petabytes, which no machine has."""
    with pytest.raises(MemoryShortError, match="too little memory") as raised, memory_errors():
        take()
    assert "merge-adapter plan" in raised.value.hint


def test_other_errors_stay_what_they_are() -> None:
    """A RuntimeError that has nothing to do with memory."""
    with pytest.raises(RuntimeError, match="shapes"), memory_errors():
        raise RuntimeError("shapes do not match")
