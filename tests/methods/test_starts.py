"""LoRAs whose start changed the base: merged into that base where it is given, refused everywhere else."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from merge_adapter.checkpoint.folder import Folder
from merge_adapter.errors import BaseModelError, MethodError
from merge_adapter.merge import merge
from merge_adapter.methods.lora.starts import changed_base
from merge_adapter.plan import MergePlan, make_plan
from merge_adapter.types import (
    Adapter,
    BaseModel,
    Combination,
    CombinationType,
    MergeSettings,
    Resolved,
    Silent,
    Verdict,
)
from merge_adapter.verify import verify
from merge_adapter.verify.settings import VerifySettings

BIG = {"hidden_size": 32, "intermediate_size": 64, "head_dim": 16, "attention_bias": False}
TARGETS = ["q_proj", "v_proj", "down_proj"]


@contextmanager
def quietly() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@dataclass(frozen=True)
class Started:
    """An adapter saved unconverted, the base it began from and the base it changed."""

    named: Path
    changed: Path
    adapter: Path
    expected: dict[str, torch.Tensor]
    """The trained model, merged by PEFT."""

    def sources(self, base: Path) -> Resolved:
        config = json.loads((self.adapter / "adapter_config.json").read_text())
        return Resolved(
            (Adapter(Folder(self.adapter), config, "LORA"),),
            BaseModel(Folder(base), json.loads((base / "config.json").read_text())),
            None,
        )

    def plan(self, base: Path) -> MergePlan:
        with quietly():
            return make_plan(self.sources(base), MergeSettings())

    def merge(self, base: Path, output: Path) -> dict[str, torch.Tensor]:
        output.mkdir()
        merge(self.plan(base), self.sources(base), output, settings=MergeSettings(), progress=Silent())
        shutil.copy(base / "config.json", output)
        return dict(load_file(output / "model.safetensors"))


@pytest.fixture
def started(base_of: Callable[..., Path], tmp_path: Path) -> Callable[..., Started]:
    """`started("pissa")`: really initialised that way, trained a little, saved as it is."""
    import peft
    import transformers

    def make(start: str, **changes: Any) -> Started:
        named = base_of("llama", torch.float32, **BIG)
        with quietly(), torch.no_grad():
            torch.manual_seed(2)
            model = transformers.AutoModelForCausalLM.from_pretrained(named, dtype=torch.float32)
            config = peft.LoraConfig(
                **{"r": 4, "lora_alpha": 4, "target_modules": TARGETS, "init_lora_weights": start, **changes}
            )
            trained = peft.get_peft_model(model, config)
            for name, parameter in trained.named_parameters():
                if "lora_" in name:
                    parameter.add_(torch.randn_like(parameter) * 0.1 * parameter.std())
            trained.save_pretrained(tmp_path / "adapter")
            weights = {name: value.clone() for name, value in trained.state_dict().items()}
            expected = dict(trained.merge_and_unload().state_dict())
            plain = transformers.AutoModelForCausalLM.from_pretrained(named, dtype=torch.float32)
            held = {
                name.removeprefix("base_model.model.").replace("base_layer.", ""): value
                for name, value in weights.items()
                if "lora_" not in name
            }
            plain.load_state_dict(held)
            plain.save_pretrained(tmp_path / "changed")
        return Started(named, tmp_path / "changed", tmp_path / "adapter", expected)

    return make


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_the_changed_base_is_merged_into_and_passes_the_gate(
    start: str, started: Callable[..., Started], tmp_path: Path
) -> None:
    made = started(start)
    saved = json.loads((made.adapter / "adapter_config.json").read_text())
    assert saved["init_lora_weights"] == start
    found = made.merge(made.changed, tmp_path / "out")
    base = load_file(made.changed / "model.safetensors")
    for name, value in made.expected.items():
        if name in found:
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5)
            assert torch.equal(found[name], base[name]) is not any(part in name for part in TARGETS)
    assert any("taken to be the one that was changed" in note for note in made.plan(made.changed).notes)
    settings = VerifySettings(isolated=False, probe_tokens=64, greedy_tokens=0)
    with quietly():
        judged = verify(tmp_path / "out", made.sources(made.changed), settings=settings, progress=Silent())
    assert judged.verdict is Verdict.PASS, judged.reasons


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_the_base_that_is_named_is_refused(start: str, started: Callable[..., Started]) -> None:
    made = started(start)
    with pytest.raises(BaseModelError, match="as it was changed then") as caught:
        made.plan(made.named)
    assert "--base-model" in caught.value.hint


def test_a_copy_of_the_original_is_told_by_its_weights(
    started: Callable[..., Started], tmp_path: Path
) -> None:
    """Under another name, the base before PiSSA took its components out."""
    made = started("pissa")
    shutil.copytree(made.named, tmp_path / "copy")
    with pytest.raises(BaseModelError, match="still hold the components"):
        made.plan(tmp_path / "copy")


def twice(made: Started, base: Path, again: Path) -> Resolved:
    """The adapter and a copy of it in `again`, each with half its weight."""
    shutil.copytree(made.adapter, again)
    found = made.sources(base)
    half = replace(found.adapter, weight=0.5)
    return replace(found, adapters=(half, replace(half, repository=Folder(again))))


def test_a_combination_looks_at_the_base_as_well(started: Callable[..., Started], tmp_path: Path) -> None:
    made = started("pissa")
    shutil.copytree(made.named, tmp_path / "copy")
    both = replace(
        twice(made, made.changed, tmp_path / "again"), combination=Combination(CombinationType.CAT)
    )
    copied = replace(both, base=made.sources(tmp_path / "copy").base)
    with quietly():
        assert make_plan(both, MergeSettings()).steps
        with pytest.raises(BaseModelError, match="still hold the components"):
            make_plan(copied, MergeSettings())


def test_two_adapters_of_one_changed_base(started: Callable[..., Started], tmp_path: Path) -> None:
    made = started("pissa")
    both = twice(made, made.changed, tmp_path / "again")
    (tmp_path / "out").mkdir()
    with quietly():
        plan = make_plan(both, MergeSettings())
        merge(plan, both, tmp_path / "out", settings=MergeSettings(), progress=Silent())
        shutil.copy(made.changed / "config.json", tmp_path / "out")
        settings = VerifySettings(isolated=False, probe_tokens=64, greedy_tokens=0)
        judged = verify(tmp_path / "out", both, settings=settings, progress=Silent())
    assert judged.verdict is Verdict.PASS, judged.reasons
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name, value in found.items():
        torch.testing.assert_close(value, made.expected[name], rtol=1e-5, atol=1e-5)


def test_a_start_that_nobody_knows_is_refused() -> None:
    assert changed_base({}) == changed_base({"init_lora_weights": "gaussian"}) == ""
    with pytest.raises(MethodError, match="not known"):
        changed_base({"init_lora_weights": "by magic"})
