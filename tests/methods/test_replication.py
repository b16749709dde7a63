"""Replicated layers: the merged model is the deeper one that was trained, every replica with weights of its own."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from merge_adapter.errors import BaseModelError, MalformedError, MethodError
from merge_adapter.merge import merge
from merge_adapter.methods.lora.replication import layer_sources
from merge_adapter.package import package
from merge_adapter.plan import make_plan
from merge_adapter.types import MergeSettings, Silent, Strategy, Verdict
from merge_adapter.verify import VerifySettings, verify

STACK = [[0, 2], [1, 3], [0, 1]]
SOURCES = (0, 1, 1, 2, 0)
DEEP = {"num_hidden_layers": 3}


@contextmanager
def quietly() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def made(bench: Callable[..., Any], **options: Any) -> Any:
    lora = {"r": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    changes = {**DEEP, **options.pop("changes", {})}
    return bench("LORA", changes=changes, layer_replication=STACK, **{**lora, **options})


def deploy(found: Any, output: Path) -> Any:
    output.mkdir()
    with quietly():
        plan = make_plan(found.sources, MergeSettings())
        merge(plan, found.sources, output, settings=MergeSettings(), progress=Silent())
        package(found.sources, plan, output, settings=MergeSettings())
    return plan


def judged(found: Any, output: Path) -> Any:
    settings = VerifySettings(isolated=False, probe_tokens=64, greedy_tokens=0)
    with quietly():
        return verify(output, found.sources, settings=settings, progress=Silent())


@pytest.mark.parametrize(
    "options", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}], ids=["", "dora", "head"]
)
def test_the_stacked_model_answers_as_it_was_trained(
    options: dict[str, Any], bench: Callable[..., Any], tmp_path: Path
) -> None:
    import transformers

    found = made(bench, **options)
    plan = deploy(found, tmp_path / "out")
    assert plan.consumed == plan.adapter_tensors > 0
    assert plan.strategy is Strategy.STREAM
    assert any("5 layers" in note for note in plan.notes)
    ids = torch.arange(3, 19)[None]
    with quietly(), torch.no_grad():
        merged = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "out", dtype=torch.float32
        ).eval()
        adapted = found.adapted()
        expected, got = adapted(ids).logits, merged(ids).logits
        with adapted.disable_adapter():
            before = adapted(ids).logits
    scale = float(expected.abs().max())
    assert float((expected - before).abs().max()) > 1e-2 * scale
    assert float((got - expected).abs().max()) <= 1e-5 * scale
    assert merged.config.num_hidden_layers == len(merged.model.layers) == 5


def test_every_replica_has_its_own_update(bench: Callable[..., Any], tmp_path: Path) -> None:
    """W of the layer it repeats, plus its own B A; PEFT's merge would add both replicas' to each."""
    found = made(bench)
    deploy(found, tmp_path / "out")
    merged, base = load_file(tmp_path / "out" / "model.safetensors"), found.stored()
    factors = load_file(found.adapter / "adapter_model.safetensors")
    for layer, source in enumerate(SOURCES):
        for module in ("self_attn.q_proj", "mlp.down_proj"):
            name = f"base_model.model.model.layers.{layer}.{module}.lora"
            update = 2.0 * factors[f"{name}_B.weight"] @ factors[f"{name}_A.weight"]  # alpha 8, r 4
            expected = base[f"model.layers.{source}.{module}.weight"] + update
            torch.testing.assert_close(
                merged[f"model.layers.{layer}.{module}.weight"], expected, rtol=1e-5, atol=1e-6
            )
        kept = "input_layernorm.weight"
        assert torch.equal(merged[f"model.layers.{layer}.{kept}"], base[f"model.layers.{source}.{kept}"])
    assert "model.layers.5.self_attn.q_proj.weight" not in merged


def test_the_gate_judges_every_replica(bench: Callable[..., Any], tmp_path: Path) -> None:
    found = made(bench, dtype=torch.bfloat16)
    deploy(found, tmp_path / "out")
    right = judged(found, tmp_path / "out")
    assert right.verdict is Verdict.PASS, right.reasons
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.2.self_attn.q_proj.weight"] = tensors[
        "model.layers.1.self_attn.q_proj.weight"
    ].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    wrong = judged(found, tmp_path / "out")
    assert wrong.verdict is Verdict.FAIL
    assert any("layers.2.self_attn.q_proj" in reason for reason in wrong.reasons)


def test_what_no_config_describes_is_refused(bench: Callable[..., Any], tmp_path: Path) -> None:
    """Layers of two kinds in turn: stacked anew, a layer would come to be of the other kind."""
    found = made(bench)
    with pytest.raises(MethodError, match="by streaming only"), quietly():
        make_plan(found.sources, MergeSettings(strategy=Strategy.MEMORY))
    twice = replace(found.sources, adapters=(found.sources.adapter,) * 2)
    with pytest.raises(MethodError, match="by itself"), quietly():
        make_plan(twice, MergeSettings())
    path = found.adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "layer_replication": [[0, 2], [1, 9]]}))
    with pytest.raises(BaseModelError, match="the base has 3"), quietly():
        make_plan(found.sources, MergeSettings())
    path.write_text(json.dumps(config))
    shutil.copytree(found.base, tmp_path / "mixed")
    base = tmp_path / "mixed" / "config.json"
    types = ["full_attention", "sliding_attention", "full_attention"]
    qwen = {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "layer_types": types,
        "sliding_window": 4,
    }
    base.write_text(json.dumps({**json.loads(base.read_text()), **qwen, "use_sliding_window": True}))
    mixed = replace(found, base=tmp_path / "mixed")
    with pytest.raises(BaseModelError, match="layers"), quietly():
        make_plan(mixed.sources, MergeSettings())


@pytest.mark.parametrize("given", ["all", [[0]], [[2, 1]], [[0, 1.5]], [[-1, 2]], [[0, 9999]], {"0": 1}])
def test_a_map_that_is_none_is_malformed(given: Any) -> None:
    with pytest.raises(MalformedError, match="layer_replication"):
        layer_sources({"layer_replication": given})


def test_a_map_is_read_as_peft_reads_it() -> None:
    assert layer_sources({"layer_replication": STACK}) == SOURCES
    assert layer_sources({"layer_replication": None}) == layer_sources({}) == ()
