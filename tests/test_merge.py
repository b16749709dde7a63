"""The merge as a whole: same bytes whatever the threads, layout of the base kept, nothing left when it fails."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from merge_adapter.checkpoint import writer as writing
from merge_adapter.checkpoint.folder import Folder
from merge_adapter.errors import InputError, MalformedError, StorageError
from merge_adapter.merge import merge
from merge_adapter.methods.row_blocks import cutting as blocks
from merge_adapter.plan import MergePlan, make_plan
from merge_adapter.types import (
    Adapter,
    BaseModel,
    DType,
    FileOrigin,
    MergeResult,
    MergeSettings,
    Resolved,
    Silent,
)

LAYERS, WIDTH, INNER, TOKENS, RANK = 2, 96, 256, 1500, 4
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": WIDTH, "intermediate_size": INNER,
    "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": TOKENS,
    "tie_word_embeddings": False,
}  # fmt: skip
SCALE = 16 / RANK


def base_tensors(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A Llama's tensors in an order of their own; the down projection spans several blocks."""
    generator = torch.Generator().manual_seed(0)

    def weight(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * 0.05).to(dtype)

    tensors = {"model.norm.weight": weight(WIDTH), "model.embed_tokens.weight": weight(TOKENS, WIDTH)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            tensors[f"{prefix}.self_attn.{name}.weight"] = weight(WIDTH, WIDTH)
        for name in ("gate_proj", "up_proj"):
            tensors[f"{prefix}.mlp.{name}.weight"] = weight(INNER, WIDTH)
        tensors[f"{prefix}.mlp.down_proj.weight"] = weight(WIDTH, INNER)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{name}.weight"] = weight(WIDTH)
        tensors[f"{prefix}.self_attn.rotary_emb.inv_freq"] = torch.arange(4.0)
    tensors["lm_head.weight"] = weight(TOKENS, WIDTH)
    return tensors


def adapter_tensors(names: list[str], tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    made = {}
    for name in names:
        out, into = tensors[name].shape
        module = f"base_model.model.{name.removesuffix('.weight')}"
        made[f"{module}.lora_A.weight"] = torch.randn(RANK, into, generator=generator) * 0.1
        made[f"{module}.lora_B.weight"] = torch.randn(out, RANK, generator=generator) * 0.1
    return made


class Case:
    """A base in shards and an adapter on some of its layers, on disk."""

    def __init__(self, root: Path, *, dtype: torch.dtype = torch.bfloat16, shards: int = 3) -> None:
        self.root = root
        self.tensors = base_tensors(dtype)
        self.targets = [name for name in self.tensors if ".layers.0." in name and "proj" in name]
        self.lora = adapter_tensors(self.targets, self.tensors)
        (root / "base").mkdir()
        (root / "adapter").mkdir()
        (root / "base" / "config.json").write_text(json.dumps(CONFIG))
        self._write(shards)
        save_file(self.lora, root / "adapter" / "adapter_model.safetensors")
        config = {
            "peft_type": "LORA",
            "r": RANK,
            "lora_alpha": 16,
            "target_modules": [name.removesuffix(".weight") for name in self.targets],
            "bias": "none",
        }
        (root / "adapter" / "adapter_config.json").write_text(json.dumps(config))

    def _write(self, shards: int) -> None:
        names = list(self.tensors)
        if shards == 1:
            save_file(
                self.tensors, self.root / "base" / "model.safetensors", metadata={"format": "pt", "x": "y"}
            )
            return
        weight_map = {}
        step = -(-len(names) // shards)
        for number in range(shards):
            file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
            mine = names[number * step : (number + 1) * step]
            save_file(
                {name: self.tensors[name] for name in mine},
                self.root / "base" / file,
                metadata={"format": "pt"},
            )
            weight_map.update(dict.fromkeys(mine, file))
        index = {
            "metadata": {"total_size": 1, "total_parameters": 1, "kept": "yes"},
            "weight_map": weight_map,
        }
        (self.root / "base" / "model.safetensors.index.json").write_text(json.dumps(index))

    @property
    def sources(self) -> Resolved:
        adapter, base = Folder(self.root / "adapter"), Folder(self.root / "base")
        config = json.loads(adapter.read("adapter_config.json"))
        return Resolved((Adapter(adapter, config, "LORA"),), BaseModel(base, dict(CONFIG)), None)

    def run(
        self,
        name: str = "out",
        *,
        threads: int | None = None,
        dtype: DType = DType.AUTO,
        progress: Any = None,
    ) -> tuple[MergePlan, MergeResult]:
        settings = MergeSettings(dtype=dtype)
        plan = make_plan(self.sources, settings)
        (self.root / name).mkdir()
        result = merge(
            plan,
            self.sources,
            self.root / name,
            settings=settings,
            threads=threads,
            progress=progress or Silent(),
        )
        return plan, result

    def output(self, name: str = "out") -> dict[str, torch.Tensor]:
        return {
            key: t for file in (self.root / name).glob("*.safetensors") for key, t in load_file(file).items()
        }

    def expected(self, name: str) -> torch.Tensor:
        if name not in self.targets:
            return self.tensors[name]
        module = f"base_model.model.{name.removesuffix('.weight')}"
        a, b = (self.lora[f"{module}.lora_{part}.weight"].double() for part in "AB")
        return self.tensors[name].double() + SCALE * (b @ a)


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_the_layout_of_the_base_is_kept(case: Case) -> None:
    """Same files, names, order, dtypes, header metadata; the index counts bytes; hashes and origins are true."""
    plan, result = case.run()
    for shard in (case.root / "base").glob("*.safetensors"):
        with safe_open(shard, "pt") as old, safe_open(case.root / "out" / shard.name, "pt") as new:
            assert list(new.keys()) == list(old.keys())
            assert list(new.offset_keys()) == list(old.offset_keys())
            assert new.metadata() == old.metadata()
    found = case.output()
    assert {name: t.dtype for name, t in found.items()} == {name: t.dtype for name, t in case.tensors.items()}
    index = json.loads((case.root / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {
        "total_size": sum(tensor.nbytes for tensor in found.values()),
        "total_parameters": sum(tensor.numel() for tensor in found.values()),
        "kept": "yes",
    }
    assert (
        index["weight_map"]
        == json.loads((case.root / "base" / "model.safetensors.index.json").read_text())["weight_map"]
    )
    assert {file.path: file.sha256 for file in result.files} == digests(case.root / "out")
    assert {file.path: file.bytes for file in result.files} == {
        path.name: path.stat().st_size for path in (case.root / "out").iterdir()
    }
    touched = {index["weight_map"][name] for name in case.targets}
    for file in result.files[:-1]:
        assert file.origin is (FileOrigin.MERGED if file.path in touched else FileOrigin.COPIED)
    assert result.files[-1].origin is FileOrigin.WRITTEN
    assert 0 < len(touched) < 3
    assert plan.bytes_written == result.bytes_written == plan.disk_bytes
    assert plan.bytes_changed == sum(case.tensors[name].nbytes for name in case.targets)
    assert (result.tensors_changed, result.tensors_copied) == (7, len(found) - 7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_weights_are_the_rounded_sums(tmp_path: Path, dtype: torch.dtype) -> None:
    """W + scale * B A in every dtype of a base; what no tensor of the adapter touches stays bit for bit."""
    case = Case(tmp_path, dtype=dtype)
    case.run()
    found = case.output()
    assert found.keys() == case.tensors.keys()
    for name, value in found.items():
        if name not in case.targets:
            assert torch.equal(value, case.tensors[name])
            continue
        exact = case.expected(name)
        if dtype in (torch.float32, torch.float64):
            torch.testing.assert_close(value.double(), exact, rtol=1e-6, atol=1e-7)
        else:
            assert (value != exact.to(dtype)).double().mean() < 0.001
        assert not torch.equal(value, case.tensors[name])


def test_any_number_of_threads_makes_the_same_bytes(case: Case, tmp_path: Path) -> None:
    """Also over a single file, whose tensors several workers write at once."""
    for threads in (1, 2, 5):
        case.run(f"out{threads}", threads=threads)
    assert digests(tmp_path / "out1") == digests(tmp_path / "out2") == digests(tmp_path / "out5")


def test_any_cut_into_shards_makes_the_same_tensors(tmp_path: Path) -> None:
    """One file or many: the arithmetic sees tensors only."""
    outputs = []
    for shards in (1, 4):
        (tmp_path / str(shards)).mkdir()
        case = Case(tmp_path / str(shards), shards=shards)
        case.run(threads=2)
        outputs.append(case.output())
    assert outputs[0].keys() == outputs[1].keys()
    assert all(torch.equal(outputs[0][name], outputs[1][name]) for name in outputs[0])


@pytest.mark.parametrize("elements", [10 * WIDTH, 1 << 24])
def test_any_block_size_makes_the_same_bytes(
    case: Case, monkeypatch: pytest.MonkeyPatch, elements: int
) -> None:
    """The cut into blocks follows from the shape alone; products of other cuts agree all the same."""
    case.run("fixed")
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", elements)
    case.run("other")
    assert digests(case.root / "fixed") == digests(case.root / "other")


@pytest.mark.parametrize("dtype", [DType.FLOAT32, DType.BFLOAT16, DType.FLOAT16])
def test_another_dtype_converts_every_floating_tensor(case: Case, dtype: DType) -> None:
    """One rounding, from the exact sum; sizes in plan and index follow."""
    plan, result = case.run(dtype=dtype)
    target = getattr(torch, dtype.value)
    for name, value in case.output().items():
        assert value.dtype == target
        if name not in case.targets:
            assert torch.equal(value, case.tensors[name].to(target))
        elif dtype is not DType.FLOAT32:
            assert (value != case.expected(name).to(target)).double().mean() < 0.001
    assert plan.bytes_written == result.bytes_written


def test_pickled_bases_come_out_as_safetensors(tmp_path: Path) -> None:
    """Sharded `pytorch_model.bin`, one tensor of it shared under two names."""
    case = Case(tmp_path)
    for path in (tmp_path / "base").glob("model*"):
        path.unlink()
    names = list(case.tensors)
    weight_map = {}
    for number, mine in enumerate((names[:9], names[9:]), start=1):
        file = f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save({name: case.tensors[name] for name in mine}, tmp_path / "base" / file)
        weight_map.update(dict.fromkeys(mine, file))
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (tmp_path / "base" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    _, result = case.run()
    assert [file.path for file in result.files] == [
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json",
    ]  # fmt: skip
    found = case.output()
    assert found.keys() == case.tensors.keys()
    for name, value in found.items():
        assert (value != case.expected(name).to(value.dtype)).double().mean() < 0.001


def test_pickled_adapters_are_read(case: Case) -> None:
    """With `weights_only=True`; same bytes as from safetensors."""
    case.run("first")
    (case.root / "adapter" / "adapter_model.safetensors").unlink()
    torch.save(case.lora, case.root / "adapter" / "adapter_model.bin")
    case.run("second")
    assert digests(case.root / "first") == digests(case.root / "second")


def test_the_retained_part_is_measured(tmp_path: Path) -> None:
    """Whole in float32; for an update far below the base's steps hardly any of it in bfloat16."""
    case = Case(tmp_path)
    for name in list(case.lora):
        if "lora_B" in name and "q_proj" in name:
            case.lora[name] = case.lora[name] * 1e-4
    save_file(case.lora, tmp_path / "adapter" / "adapter_model.safetensors")
    _, result = case.run()
    assert result.retained.keys() == set(case.targets)
    for name, value in result.retained.items():
        delta = case.expected(name) - case.tensors[name].double()
        kept = case.output()[name].double() - case.tensors[name].double()
        assert value == pytest.approx(float((kept * delta).sum() / (delta * delta).sum()), rel=1e-3, abs=1e-4)
        assert (value < 0.5) == ("q_proj" in name)
    _, whole = case.run("float32", dtype=DType.FLOAT32)
    assert all(value == pytest.approx(1, abs=1e-3) for value in whole.retained.values())


# ------------------------------------------------------------------------------------- when it goes wrong


class Interrupting(Silent):
    """A progress that does something at the first byte."""

    def __init__(self, action: Any) -> None:
        self._action = action

    @contextmanager
    def task(self, label: str, total: int | None, *, unit: str = "bytes") -> Iterator[Any]:
        yield self

    def advance(self, amount: int, /) -> None:
        action, self._action = self._action, None
        if action:
            action()


def assert_nothing_is_left(folder: Path) -> None:
    assert not list(folder.iterdir())


def test_an_interrupt_stops_the_workers_and_leaves_nothing(case: Case) -> None:
    """Ctrl-C reaches the main thread while workers write."""
    progress = Interrupting(lambda: os.kill(os.getpid(), signal.SIGINT))
    inherited = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # ignored where a shell runs us behind
    try:
        with pytest.raises(KeyboardInterrupt):
            case.run(progress=progress, threads=2)
    finally:
        signal.signal(signal.SIGINT, inherited)
    assert_nothing_is_left(case.root / "out")


def test_an_error_in_a_worker_is_raised_and_leaves_nothing(case: Case) -> None:
    """Whatever it is, it comes to the caller; the other workers stop."""

    def fail() -> None:
        raise ValueError("boom")

    with pytest.raises(ValueError, match="boom"):
        case.run(progress=Interrupting(fail), threads=3)
    assert_nothing_is_left(case.root / "out")


def test_a_disk_that_fills_up_is_a_storage_error(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of writing; the partial files are gone."""
    written = 0
    real = os.pwrite

    def pwrite(descriptor: int, data: Any, offset: int) -> int:
        nonlocal written
        written += len(data)
        if written > 50_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, data, offset)

    monkeypatch.setattr(writing.os, "pwrite", pwrite)
    with pytest.raises(StorageError, match="is full") as caught:
        case.run(threads=2)
    assert "merge-adapter plan" in caught.value.hint
    assert_nothing_is_left(case.root / "out")


def test_a_base_cut_after_planning_is_malformed(case: Case) -> None:
    """The headers were whole when the plan was made."""
    settings = MergeSettings()
    plan = make_plan(case.sources, settings)
    sources = case.sources
    (case.root / "out").mkdir()
    shard = case.root / "base" / "model-00001-of-00003.safetensors"
    os.truncate(shard, shard.stat().st_size - 5000)
    with pytest.raises(MalformedError):
        merge(plan, sources, case.root / "out", settings=settings, progress=Silent())
    assert_nothing_is_left(case.root / "out")


def test_sources_are_never_changed(case: Case) -> None:
    """Not even through the copies."""
    before = digests(case.root / "base") | digests(case.root / "adapter")
    case.run()
    for path in (case.root / "out").iterdir():
        path.write_bytes(b"gone")
    assert digests(case.root / "base") | digests(case.root / "adapter") == before


def test_a_device_that_is_not_there_is_an_input_error(case: Case) -> None:
    """Said before anything is written."""
    plan = make_plan(case.sources, MergeSettings())
    (case.root / "out").mkdir()
    with pytest.raises(InputError, match="'warp:3' cannot be used"):
        merge(
            plan,
            case.sources,
            case.root / "out",
            settings=MergeSettings(),
            device="warp:3",
            progress=Silent(),
        )
    assert_nothing_is_left(case.root / "out")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_makes_nearly_the_same_weights(case: Case) -> None:
    """Sums in another order: hardly an element differs, and then by one step of bfloat16."""
    case.run("cpu")
    plan = make_plan(case.sources, MergeSettings())
    (case.root / "gpu").mkdir()
    merge(plan, case.sources, case.root / "gpu", settings=MergeSettings(), device="cuda", progress=Silent())
    ours, theirs = case.output("cpu"), case.output("gpu")
    for name in ours:
        assert (ours[name] != theirs[name]).double().mean() < 0.001
        torch.testing.assert_close(ours[name], theirs[name], rtol=2**-7, atol=1e-6)
