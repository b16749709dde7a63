"""No false alarm: right merges, made by PEFT and by hand, in every way the gate must accept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from merge_adapter.types import Verdict

UNASKED = "the outputs were not compared, as asked"
NAMES = (
    "plain",
    "strong",
    "weak",
    "attention",
    "rslora",
    "patterns",
    "dora",
    "embedding",
    "saved norm",
)
GRID = [(name, dtype, safe) for name in NAMES for dtype in ("bf16", "fp32", "fp16") for safe in (False, True)]


@pytest.fixture
def configs() -> dict[str, Any]:
    """The LoraConfig fields behind NAMES."""
    return {
        "plain": {"target_modules": "all-linear"},
        "strong": {"target_modules": "all-linear", "lora_alpha": 64},
        "weak": {"target_modules": "all-linear", "lora_alpha": 2},
        "attention": {"target_modules": ["q_proj", "v_proj"], "r": 1},
        "rslora": {"target_modules": "all-linear", "use_rslora": True},
        "patterns": {
            "target_modules": "all-linear",
            "rank_pattern": {r"layers\.1\..*q_proj": 2},
            "alpha_pattern": {"down_proj": 3},
        },
        "dora": {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
        "embedding": {"target_modules": ["embed_tokens", "q_proj"], "untied": True},
        "saved norm": {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
    }


def alarms(result: Any) -> list[str]:
    """Reasons that count against the merge."""
    return [
        reason
        for reason in result.reasons
        if not reason.startswith(("note:", "warning:")) and reason != UNASKED
    ]


@pytest.mark.parametrize(("name", "dtype", "safe"), GRID, ids=[f"{n}-{d}{'-safe' * s}" for n, d, s in GRID])
def test_peft_s_own_merges_raise_no_alarm(
    name: str, dtype: str, safe: bool, configs: dict[str, Any], random_merge: Callable[..., Any]
) -> None:
    """54 merges by PEFT: dtype, safe or not, with and without DoRA, patterns, embeddings, saved modules."""
    right = random_merge(configs[name], dtype, seed=len(name), safe=safe)
    result = right.judge()
    assert alarms(result) == []
    assert result.evidence["weights"]["verdict"] == "pass"
    assert result.evidence["modules"]["verdict"] == "pass"


def test_tensors_that_all_layers_share_are_not_missing(random_merge: Callable[..., Any]) -> None:
    """VB-LoRA saves one bank of vectors for all layers, and PEFT reports each layer's name for it as missing."""
    import peft

    config = peft.VBLoRAConfig(target_modules=["q_proj", "down_proj"], r=2, num_vectors=16, vector_length=8)
    assert alarms(random_merge(config, "fp32").judge()) == []


@pytest.mark.parametrize("model", ["lm-bf16", "lm-fp32", "cls-bf16", "emb-fp32", "emb-bf16"])
def test_trained_models_pass_with_their_outputs(model: str, good: Callable[[str], Any]) -> None:
    """Decoder, classifier and encoder, weights and outputs, the merged model in this process."""
    result = good(model).judge(outputs=True, isolated=False, probe_tokens=256, greedy_tokens=8)
    assert result.verdict is Verdict.PASS, result.reasons
    outputs = result.evidence["outputs"]
    assert outputs["error"]["mean"] <= outputs["ceiling"]["upper"]
    assert outputs["effect"]["lower"] > outputs["noise"]["upper"]
    assert outputs["recovery"] == pytest.approx(1, abs=0.01)


def test_a_merge_passes_in_a_process_without_peft(good: Callable[[str], Any]) -> None:
    """The whole gate as users run it, greedy text included."""
    result = good("lm-bf16").judge(outputs=True, probe_tokens=256)
    assert result.verdict is Verdict.PASS, result.reasons
    greedy = result.evidence["greedy"]
    assert greedy["equal"] == greedy["of"] == 4
    assert all(row["merged"] == row["reference"] for row in greedy["texts"])


def test_the_same_run_gives_the_same_numbers(good: Callable[[str], Any]) -> None:
    """Equal settings, sources and files: equal evidence, but for the seconds."""
    runs = [
        good("cls-fp32").judge(outputs=True, isolated=False, probe_tokens=128, greedy_tokens=0)
        for _ in range(2)
    ]
    first, second = ({k: v for k, v in run.evidence.items() if k != "seconds"} for run in runs)
    assert first == second


def test_a_dtype_that_was_asked_for_is_no_fault(good: Callable[[str], Any], tmp_path: Path) -> None:
    """`--dtype bfloat16` on an fp32 base: every tensor rounded once, nothing else."""
    import json
    import shutil

    right = good("lm-fp32")
    folder = Path(shutil.copytree(right.merged, tmp_path / "narrow"))
    tensors = {k: v.to(torch.bfloat16) for k, v in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    assert alarms(right.judge(folder, dtype="bfloat16")) == []
    unasked = right.judge(folder)
    assert unasked.verdict is Verdict.FAIL
    assert any("the base holds float32" in reason for reason in unasked.reasons)
