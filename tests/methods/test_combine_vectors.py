"""Several IA3 adapters: one after the other, and PEFT's weighted sum of their vectors."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from merge_adapter.checkpoint.folder import Folder
from merge_adapter.errors import MethodError, ShapeError
from merge_adapter.merge import merge
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
from merge_adapter.verify import VerifySettings, verify

WEIGHTS = (0.7, 0.6)
LINEAR, IN_TURN = Combination(CombinationType.LINEAR), Combination()
NARROW = {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
WIDE = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}


@contextmanager
def quietly() -> Iterator[None]:
    """PEFT's advice to people who train."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@dataclass(frozen=True)
class Vectors:
    """A base with some IA3 adapters on disk."""

    base: Path
    adapters: tuple[Path, ...]

    def sources(self, combination: Combination, weights: tuple[float, ...]) -> Resolved:
        adapters = tuple(
            Adapter(Folder(folder), config, config["peft_type"], weight)
            for folder, weight in zip(self.adapters, weights, strict=True)
            for config in [json.loads((folder / "adapter_config.json").read_text())]
        )
        config = json.loads((self.base / "config.json").read_text())
        return Resolved(adapters, BaseModel(Folder(self.base), config), None, combination=combination)

    def plan(self, combination: Combination, weights: tuple[float, ...] = (1.0, 1.0)) -> MergePlan:
        with quietly():
            return make_plan(self.sources(combination, weights), MergeSettings())

    def merge(
        self, output: Path, combination: Combination, weights: tuple[float, ...] = (1.0, 1.0)
    ) -> dict[str, torch.Tensor]:
        output.mkdir()
        plan, sources = self.plan(combination, weights), self.sources(combination, weights)
        assert plan.consumed == plan.adapter_tensors > 0
        merge(plan, sources, output, settings=MergeSettings(), progress=Silent())
        shutil.copy(self.base / "config.json", output)
        return load_file(output / "model.safetensors")

    def loaded(self) -> Any:
        """PEFT's model with all adapters, all active."""
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        with quietly():
            model = AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32)
            model = PeftModel.from_pretrained(model, self.adapters[0], adapter_name="n0")
            for number, folder in enumerate(self.adapters[1:], start=1):
                model.load_adapter(folder, adapter_name=f"n{number}")
            model.base_model.set_adapter([f"n{number}" for number in range(len(self.adapters))])
        return model.eval()

    def judged(self, folder: Path, combination: Combination, weights: tuple[float, ...]) -> Verdict:
        settings = VerifySettings(isolated=False, probe_tokens=64, greedy_tokens=0)
        with quietly():
            return verify(folder, self.sources(combination, weights), settings=settings).verdict


@pytest.fixture
def vectors(tmp_path: Path, base_of: Callable[..., Path]) -> Callable[..., Vectors]:
    """`vectors(NARROW, WIDE)`: IA3 adapters of non-zero effect, one per config, saved by PEFT."""
    import peft
    from transformers import AutoModelForCausalLM

    def make(
        *configs: Mapping[str, Any], dtype: torch.dtype = torch.float32, model_type: str = "llama"
    ) -> Vectors:
        base = base_of(model_type, dtype)
        folders = []
        for number, config in enumerate(configs):
            folder = tmp_path / f"adapter-{number}"
            with quietly(), torch.no_grad():
                model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
                torch.manual_seed(number)
                model = peft.get_peft_model(model, peft.IA3Config(task_type="CAUSAL_LM", **config))
                for name, parameter in model.named_parameters():
                    if "ia3_" in name:
                        parameter.add_(torch.randn_like(parameter) * 0.2)
                model.save_pretrained(folder)
            folders.append(folder)
        return Vectors(base, tuple(folders))

    return make


def changed(found: Mapping[str, torch.Tensor], base: Path) -> set[str]:
    before = load_file(base / "model.safetensors")
    return {name.split(".")[-2] for name, value in found.items() if not torch.equal(value, before[name])}


def test_the_weighted_sum_is_pefts(vectors: Callable[..., Vectors], tmp_path: Path) -> None:
    """Modules that one adapter alone changes included: PEFT sums over those that have the module."""
    made = vectors(NARROW, WIDE)
    found = made.merge(tmp_path / "out", LINEAR, WEIGHTS)
    model = made.loaded()
    with quietly():
        model.base_model.add_weighted_adapter(["n0", "n1"], list(WEIGHTS), "made")
        expected = model.merge_and_unload(adapter_names=["made"]).state_dict()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-7)
    assert changed(found, made.base) == {"k_proj", "v_proj", "down_proj"}


def test_one_after_the_other_is_what_peft_answers(vectors: Callable[..., Vectors], tmp_path: Path) -> None:
    """Merged by PEFT with both active, and as it answers with both unmerged; in either order."""
    made = vectors(NARROW, WIDE)
    found = made.merge(tmp_path / "out", IN_TURN)
    turned = Vectors(made.base, made.adapters[::-1]).merge(tmp_path / "turned", IN_TURN)
    model = made.loaded()
    ids = torch.arange(3, 19)[None]
    with quietly(), torch.no_grad():
        answer = model(ids).logits
        merged = model.merge_and_unload(adapter_names=["n0", "n1"])
        torch.testing.assert_close(merged(ids).logits, answer, rtol=1e-4, atol=1e-4)
    expected = merged.state_dict()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(value, turned[name], rtol=1e-6, atol=1e-7)
    assert changed(found, made.base) == {"k_proj", "v_proj", "down_proj"}


@pytest.mark.parametrize(("combination", "weights"), [(LINEAR, WEIGHTS), (IN_TURN, (1.0, 1.0))])
def test_the_gate_judges_both(
    combination: Combination, weights: tuple[float, ...], vectors: Callable[..., Vectors], tmp_path: Path
) -> None:
    made = vectors(NARROW, WIDE, dtype=torch.bfloat16)
    made.merge(tmp_path / "out", combination, weights)
    assert made.judged(tmp_path / "out", combination, weights) is Verdict.PASS
    assert made.judged(tmp_path / "out", LINEAR, (0.7, 0.9)) is Verdict.FAIL


def test_what_has_no_meaning_is_refused(vectors: Callable[..., Vectors]) -> None:
    made = vectors(NARROW, WIDE)
    with pytest.raises(MethodError, match="not by cat") as caught:
        made.plan(Combination(CombinationType.CAT))
    assert "linear" in caught.value.hint
    with pytest.raises(MethodError, match=r"weight 0\.7"):
        made.plan(IN_TURN, WEIGHTS)
    turned = vectors(NARROW, {**WIDE, "feedforward_modules": []})
    with pytest.raises(ShapeError, match="has the shape"):
        turned.plan(LINEAR)
    saved = vectors(NARROW, {**WIDE, "modules_to_save": ["lm_head"]})
    with pytest.raises(MethodError, match="trained whole"):
        saved.plan(LINEAR)


RESNET = {"hidden_sizes": [8, 8], "depths": [1, 1], "embedding_size": 8, "layer_type": "basic"}
CONV = "resnet.encoder.stages.1.layers.0.layer.1.convolution"
"""As many channels out as in, so that its vector's shape is the same on either side."""


@pytest.mark.parametrize("inputs", [[], ["layer.1.convolution"]], ids=["outputs", "inputs"])
def test_a_square_convolution_is_scaled_on_its_own_side(inputs: list[str], tmp_path: Path) -> None:
    import peft
    import transformers

    torch.manual_seed(1)
    base, auto = tmp_path / "base", transformers.AutoModelForImageClassification
    folders = [tmp_path / "one", tmp_path / "two"]
    with quietly(), torch.no_grad():
        auto.from_config(transformers.ResNetConfig(**RESNET)).save_pretrained(base)
        for folder in folders:
            config = peft.IA3Config(target_modules=["layer.1.convolution"], feedforward_modules=inputs)
            model = peft.get_peft_model(auto.from_pretrained(base), config)
            for name, parameter in model.named_parameters():
                if "ia3_" in name:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
            model.save_pretrained(folder)
    made = Vectors(base, tuple(folders))
    found = made.merge(tmp_path / "out", LINEAR, WEIGHTS)[f"{CONV}.weight"]
    stored = load_file(base / "model.safetensors")[f"{CONV}.weight"]
    one, two = (
        load_file(folder / "adapter_model.safetensors")[f"base_model.model.{CONV}.ia3_l"]
        for folder in folders
    )
    vector = (0.7 * one + 0.6 * two).flatten()
    expected = stored * (vector[None, :, None, None] if inputs else vector[:, None, None, None])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    path = folders[1] / "adapter_config.json"
    other = [] if inputs else ["layer.1.convolution"]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"feedforward_modules": other}))
    with pytest.raises(MethodError, match="for one adapter and none for another"):
        made.plan(LINEAR, WEIGHTS)
