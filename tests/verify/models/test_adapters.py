"""Adapter files as people leave them: the gate reads them as PEFT would have written them, or says what it cannot."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from merge_adapter.errors import AccountingError
from merge_adapter.types import Verdict, Verification

PREFIX = "base_model.model."
Rename = Callable[[str], str]
NAMES: dict[str, Rename] = {
    "no prefix": lambda name: name.removeprefix(PREFIX),
    "a doubled prefix": lambda name: PREFIX + name,
    "DistributedDataParallel": lambda name: f"module.{name}",
    "FSDP": lambda name: name.replace("layers.", "_fsdp_wrapped_module.layers."),
    "activation checkpointing": lambda name: re.sub(r"(\d+)\.", r"\1._checkpoint_wrapped_module.", name),
    "torch.compile": lambda name: f"_orig_mod.{name}",
    "the adapter's name": lambda name: name.replace(".weight", ".default.weight"),
    "the adapter's name twice": lambda name: name.replace(".weight", ".default.default.weight"),
    "another part in front": lambda name: name.replace(PREFIX, f"{PREFIX}language_model."),
    "the first part missing": lambda name: name.replace(f"{PREFIX}model.", PREFIX),
}


def rewritten(source: Path, folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    """A copy of an adapter whose tensors went through `change`."""
    shutil.copytree(source, folder)
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})
    return folder


def assert_right(found: Verification) -> None:
    """Nothing was found wrong or left open, but for the outputs, which these tests leave out."""
    told = [reason for reason in found.reasons if not reason.startswith("note: ")]
    assert told == ["the outputs were not compared, as asked"], found.reasons


def named(rename: Rename) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {rename(name): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("rename", NAMES.values(), ids=NAMES)
def test_names_that_are_not_pefts_are_read(
    rename: Rename, good: Callable[[str], Any], tmp_path: Path, lm_adapter: Path
) -> None:
    """A right merge of such an adapter is right, and the judgement says how the names were read."""
    made = good("lm-fp32")
    wild = made.with_sources(made.merged, rewritten(lm_adapter, tmp_path / "wild", named(rename)))
    found = wild.judge()
    assert_right(found)
    assert any("not PEFT's own" in reason for reason in found.reasons)


@pytest.mark.parametrize("name", ["a doubled prefix", "another part in front"])
def test_a_wrong_merge_of_such_an_adapter_fails(
    name: str, workpiece: Callable[[str], Any], tmp_path: Path, lm_adapter: Path
) -> None:
    piece = workpiece("lm-fp32")
    piece.strengthen(lambda tensor: tensor.endswith("layers.1.self_attn.v_proj.weight"), 0.0)
    wild = rewritten(lm_adapter, tmp_path / "wild", named(NAMES[name]))
    found = piece.good.with_sources(piece.folder, wild).judge()
    assert found.verdict is Verdict.FAIL
    assert any("layers.1.self_attn.v_proj: not merged" in reason for reason in found.reasons)


@pytest.mark.parametrize(
    "rename",
    [
        NAMES["a doubled prefix"],
        NAMES["no prefix"],
        lambda name: name.replace("score.", "score.modules_to_save."),
        lambda name: name.replace("score.", "score.modules_to_save.default."),
    ],
)
def test_a_trained_head_under_such_a_name(
    rename: Rename, good: Callable[[str], Any], tmp_path: Path, classifier_adapter: Path
) -> None:
    """Its number of labels sizes the base's head before PEFT sees the file."""
    made = good("cls-fp32")
    wild = rewritten(classifier_adapter, tmp_path / "wild", named(rename))
    found = made.with_sources(made.merged, wild).judge()
    assert_right(found)


def test_names_that_fit_no_base_are_not_guessed(
    good: Callable[[str], Any], tmp_path: Path, lm_adapter: Path
) -> None:
    made = good("lm-fp32")
    wild = rewritten(lm_adapter, tmp_path / "wild", named(lambda name: name.replace("layers", "blocks")))
    found = made.with_sources(made.merged, wild).judge()
    assert found.verdict is Verdict.FAIL
    assert any("match nothing in this base" in reason for reason in found.reasons)


def test_two_adapters_in_one_file_are_refused(
    good: Callable[[str], Any], tmp_path: Path, lm_adapter: Path
) -> None:
    made = good("lm-fp32")
    wild = rewritten(
        lm_adapter,
        tmp_path / "wild",
        lambda tensors: {**tensors, **{name.removeprefix(PREFIX): t.clone() for name, t in tensors.items()}},
    )
    with pytest.raises(AccountingError, match="are the same one"):
        made.with_sources(made.merged, wild).judge()


def test_what_only_training_used_is_not_acted_upon(
    good: Callable[[str], Any], tmp_path: Path, lm_adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT imports the module that `megatron_core` names, and stumbles over patterns that are null."""
    (tmp_path / "imported_by_config.py").write_text("raise AssertionError('a config was obeyed')\n")
    monkeypatch.syspath_prepend(tmp_path)
    adapter = tmp_path / "adapter"
    shutil.copytree(lm_adapter, adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    config |= {
        "megatron_config": {"tensor_model_parallel_size": 1},
        "megatron_core": "imported_by_config",
        "loftq_config": {"loftq_bits": 4},
        "runtime_config": {"ephemeral_gpu_offload": True},
        "rank_pattern": None,
        "alpha_pattern": None,
        "a_key_of_tomorrow": False,
    }
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    made = good("lm-fp32")
    found = made.with_sources(made.merged, adapter).judge()
    assert_right(found)
    assert "imported_by_config" not in sys.modules


def test_what_peft_cannot_read_is_no_crash(
    good: Callable[[str], Any], tmp_path: Path, lm_adapter: Path
) -> None:
    """An index outside the vocabulary, an import that fails: PEFT's own reason, as a refusal."""
    from merge_adapter.errors import MethodError

    adapter = tmp_path / "adapter"
    shutil.copytree(lm_adapter, adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["trainable_token_indices"] = [10**6]
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    made = good("lm-fp32")
    with pytest.raises(MethodError, match="out of bounds"):
        made.with_sources(made.merged, adapter).judge()


def test_files_of_before_torch_1_6(workpiece: Callable[[str], Any], tmp_path: Path, lm_base: Path) -> None:
    """A base and an adapter that are pickled without an archive around them cannot be mapped, but read."""
    made = workpiece("lm-fp32")
    own = made.good.sources
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    for repository, folder, new in (
        (own.base.repository, base, "pytorch_model.bin"),
        (own.adapter.repository, adapter, "adapter_model.bin"),
    ):
        shutil.copytree(repository.origin.folder, folder)
        (old,) = folder.glob("*.safetensors")
        torch.save(load_file(old), folder / new, _use_new_zipfile_serialization=False)
        old.unlink()
    found = made.good.with_sources(made.folder, adapter, base).judge()
    assert_right(found)
