"""Conversions that transformers cannot undo: the merge is made on the loaded base, and the gate passes it."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import conversion_mapping
from transformers.core_model_loading import ConversionOps, Transpose, WeightConverter

from merge_adapter.checkpoint.folder import Folder
from merge_adapter.errors import BaseModelError
from merge_adapter.merge import merge
from merge_adapter.package import package
from merge_adapter.plan import MergePlan, make_plan
from merge_adapter.types import (
    Adapter,
    BaseModel,
    Combination,
    CombinationType,
    MergeSettings,
    Resolved,
    Silent,
    Strategy,
    Verdict,
)
from merge_adapter.verify import verify
from merge_adapter.verify.settings import VerifySettings

CONFIG = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "vocab_size": 96, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "head_dim": 8, "qkv_bias": True, "moe_intermediate_size": 16, "num_experts": 4,
    "num_experts_per_tok": 2, "shared_expert_intermediate_size": 16,
}  # fmt: skip
MODEL_TYPE = "qwen2_moe"
"""A type whose checkpoints transformers converts, so that no fast path is taken."""


class Doubled(ConversionOps):
    """Loads a weight that is stored halved; nobody wrote the way back."""

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, Any]:
        ((_, value),) = input_dict.items()
        tensor = value[0] if isinstance(value, list) else value
        return {self._target(target_patterns): tensor * 2}

    def _target(self, patterns: list[str]) -> str:
        return patterns[0]


class Rounding(Doubled):
    """Has a way back that loses a bit."""

    def convert(self, *arguments: Any, **kwargs: Any) -> dict[str, Any]:
        ((name, value),) = super().convert(*arguments, **kwargs).items()
        return {name: value / 3}

    @property
    def reverse_op(self) -> ConversionOps:
        return Back()


class Back(Doubled):
    def convert(self, *arguments: Any, **kwargs: Any) -> dict[str, Any]:
        ((name, value),) = super().convert(*arguments, **kwargs).items()
        return {name: value / 2 * 3 / 2}


@contextmanager
def registered(*conversions: WeightConverter, model_type: str = MODEL_TYPE) -> Iterator[None]:
    """A conversion of the user's own, beside those that transformers has for the type."""
    own = conversion_mapping.get_checkpoint_conversion_mapping(model_type) or []
    users = set(conversion_mapping.USER_REGISTERED_MAPPINGS)
    mapping = [*conversions, *own]
    conversion_mapping.register_checkpoint_conversion_mapping(model_type, mapping, overwrite=True)
    try:
        yield
    finally:
        conversion_mapping.register_checkpoint_conversion_mapping(model_type, own, overwrite=True)
        conversion_mapping.USER_REGISTERED_MAPPINGS.intersection_update(users)


def halved(operation: ConversionOps, stored: str = "query_half.weight") -> WeightConverter:
    return WeightConverter([stored], ["q_proj.weight"], operations=[operation])


@pytest.fixture
def base(tmp_path: Path) -> Callable[..., Path]:
    """`base(factor, dtype)`: a checkpoint with its query weights times `factor` under the name `query_half`."""
    import transformers

    def make(
        factor: float = 0.5, dtype: torch.dtype = torch.float32, stored: str = "query_half.weight"
    ) -> Path:
        torch.manual_seed(1)
        config = transformers.CONFIG_MAPPING[MODEL_TYPE](**CONFIG)
        with quietly():
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.1)
            model.to(dtype).save_pretrained(tmp_path / "base")
        file = tmp_path / "base" / "model.safetensors"
        tensors = {
            name.replace("q_proj.weight", stored): value * (factor if "q_proj.weight" in name else 1)
            for name, value in load_file(file).items()
        }
        save_file(tensors, file, metadata={"format": "pt"})
        return tmp_path / "base"

    return make


@contextmanager
def quietly() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    import transformers

    with quietly():
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def adapter_on(base: Path, folder: Path, config: Any, seed: int = 2) -> Path:
    """Save an adapter of non-zero effect."""
    from peft import get_peft_model

    torch.manual_seed(seed)
    with quietly():
        model = get_peft_model(load(base), config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(folder)
    return folder


def lora(**changes: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(**{"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **changes})


def sources(base: Path, *adapters: Path) -> Resolved:
    made = []
    for folder in adapters:
        config = json.loads((folder / "adapter_config.json").read_text())
        made.append(Adapter(Folder(folder), config, config["peft_type"]))
    return Resolved(
        tuple(made), BaseModel(Folder(base), json.loads((base / "config.json").read_text())), None
    )


def merged(found: Resolved, output: Path, strategy: Strategy = Strategy.AUTO) -> MergePlan:
    settings = MergeSettings(strategy=strategy)
    with quietly():
        plan = make_plan(found, settings)
        output.mkdir()
        merge(plan, found, output, settings=settings, progress=Silent())
        package(found, plan, output, settings=settings)
    return plan


def reference(base: Path, adapter: Path) -> Mapping[str, torch.Tensor]:
    from peft import PeftModel

    with quietly():
        return dict(PeftModel.from_pretrained(load(base), adapter).merge_and_unload().state_dict())


def judged(output: Path, found: Resolved) -> Any:
    with quietly():
        return verify(output, found, settings=VerifySettings(isolated=False), progress=Silent())


@pytest.mark.parametrize("operation", [Doubled(), Rounding()], ids=["no way back", "a way back that rounds"])
@pytest.mark.parametrize("method", ["lora", "dora", "loha", "saved"])
def test_the_loaded_base_takes_over(
    operation: ConversionOps, method: str, base: Callable[..., Path], tmp_path: Path
) -> None:
    from peft import LoHaConfig

    config = {
        "lora": lambda: lora(),
        "dora": lambda: lora(use_dora=True),
        "loha": lambda: LoHaConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
        "saved": lambda: lora(target_modules=["v_proj"], modules_to_save=["q_proj"]),
    }[method]()
    folder = base()
    with registered(halved(operation)):
        adapter = adapter_on(folder, tmp_path / "adapter", config)
        found = sources(folder, adapter)
        plan = merged(found, tmp_path / "out")
        expected, got = reference(folder, adapter), load(tmp_path / "out").state_dict()
        before = load(folder).state_dict()
        verdict = judged(tmp_path / "out", found)
    assert plan.strategy is Strategy.MEMORY
    assert "cannot undo" in plan.strategy_reason
    assert any("loaded with transformers" in note for note in plan.notes)
    assert plan.consumed == plan.adapter_tensors > 0
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert float((got[name] - value).abs().max()) <= 1e-5, name
    changed = "model.layers.0.self_attn.q_proj.weight"
    assert float((got[changed] - before[changed]).abs().max()) > 1e-3
    assert verdict.verdict is Verdict.PASS, verdict.reasons


def test_the_rest_keeps_the_layout_of_the_base(base: Callable[..., Path], tmp_path: Path) -> None:
    folder = base()
    with registered(halved(Doubled())):
        adapter = adapter_on(folder, tmp_path / "adapter", lora())
        merged(sources(folder, adapter), tmp_path / "out")
    before, after = (list(load_file(place / "model.safetensors")) for place in (folder, tmp_path / "out"))
    assert after == [name.replace("query_half", "q_proj") for name in before]


def test_what_the_adapter_leaves_alone_is_copied(base: Callable[..., Path], tmp_path: Path) -> None:
    folder = base()
    with registered(halved(Doubled())):
        adapter = adapter_on(folder, tmp_path / "adapter", lora(target_modules=["v_proj"]))
        plan = merged(sources(folder, adapter), tmp_path / "out")
    assert plan.strategy is Strategy.STREAM
    before, after = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "out"))
    assert list(before) == list(after)


def test_sixteen_bit_is_rounded_once(base: Callable[..., Path], tmp_path: Path) -> None:
    folder = base(dtype=torch.bfloat16)
    with registered(halved(Doubled())):
        adapter = adapter_on(folder, tmp_path / "adapter", lora())
        found = sources(folder, adapter)
        merged(found, tmp_path / "out")
        expected = reference(folder, adapter)
        got = load(tmp_path / "out", torch.bfloat16).state_dict()
        verdict = judged(tmp_path / "out", found)
    differing = sum(int((got[name] != value.bfloat16()).sum()) for name, value in expected.items())
    assert differing <= 2  # float32 sums in another order, on a tie
    assert verdict.verdict is Verdict.PASS, verdict.reasons


def test_two_adapters_add_up_on_the_loaded_base(base: Callable[..., Path], tmp_path: Path) -> None:
    folder = base()
    with registered(halved(Doubled())):
        first = adapter_on(folder, tmp_path / "one", lora())
        second = adapter_on(folder, tmp_path / "two", lora(), seed=3)
        found = sources(folder, first, second)
        assert found.combination == Combination(CombinationType.SEQUENTIAL)
        merged(found, tmp_path / "out")
        one, two, before = reference(folder, first), reference(folder, second), load(folder).state_dict()
        got = load(tmp_path / "out").state_dict()
    for name, value in before.items():
        assert float((got[name] - (one[name] + two[name] - value)).abs().max()) <= 1e-5, name


def test_a_new_head_beside_what_cannot_be_undone(base: Callable[..., Path], tmp_path: Path) -> None:
    """The class changes, and all its parameters must be there: those on disk in another form are."""
    import transformers
    from peft import PeftModel, get_peft_model

    folder = base()
    auto = transformers.AutoModelForSequenceClassification
    with registered(halved(Doubled())):
        torch.manual_seed(2)
        with quietly():
            plain = auto.from_pretrained(folder, num_labels=3, dtype=torch.float32)
            made = get_peft_model(
                plain, lora(target_modules=["v_proj"], task_type="SEQ_CLS", init_lora_weights=False)
            )
            made.save_pretrained(tmp_path / "adapter")
        plan = merged(sources(folder, tmp_path / "adapter"), tmp_path / "out")
        with quietly():
            fresh = auto.from_pretrained(folder, num_labels=3, dtype=torch.float32)
            expected = PeftModel.from_pretrained(fresh, tmp_path / "adapter").merge_and_unload().state_dict()
            got = auto.from_pretrained(tmp_path / "out", dtype=torch.float32).state_dict()
    assert plan.consumed == plan.adapter_tensors
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert float((got[name] - value).abs().max()) <= 1e-5, name


def test_streaming_on_demand_says_why_it_cannot_be(base: Callable[..., Path], tmp_path: Path) -> None:
    folder = base()
    with registered(halved(Doubled())):
        found = sources(folder, adapter_on(folder, tmp_path / "adapter", lora()))
        with quietly(), pytest.raises(BaseModelError, match=r"q_proj.*cannot be written back") as caught:
            make_plan(found, MergeSettings(strategy=Strategy.STREAM))
    assert "--strategy" in caught.value.hint


def test_what_would_be_converted_again_is_refused(base: Callable[..., Path], tmp_path: Path) -> None:
    """A conversion that keeps the name: whatever is stored under it is converted on loading."""
    folder = base(stored="q_proj.weight")
    with registered(halved(Doubled(), stored="q_proj.weight")):
        found = sources(folder, adapter_on(folder, tmp_path / "adapter", lora()))
        with quietly(), pytest.raises(BaseModelError, match="converted once more") as caught:
            make_plan(found, MergeSettings())
    assert caught.value.hint


def test_a_wrong_merge_on_the_loaded_base_fails_the_gate(base: Callable[..., Path], tmp_path: Path) -> None:
    """Values as they are stored under the name of the loaded parameter: half of what they should be."""
    folder = base()
    with registered(halved(Doubled())):
        found = sources(folder, adapter_on(folder, tmp_path / "adapter", lora()))
        merged(found, tmp_path / "out")
        file = tmp_path / "out" / "model.safetensors"
        tensors = load_file(file)
        name = "model.layers.1.self_attn.q_proj.weight"
        tensors[name] = tensors[name] / 2
        save_file(tensors, file, metadata={"format": "pt"})
        verdict = judged(tmp_path / "out", found)
    assert verdict.verdict is Verdict.FAIL
    assert any("layers.1.self_attn.q_proj" in reason for reason in verdict.reasons)


def test_an_operation_of_ones_own_with_an_exact_way_back_is_streamed(
    base: Callable[..., Path], tmp_path: Path
) -> None:
    class Turned(Transpose):
        @property
        def reverse_op(self) -> ConversionOps:
            return Turned(self.dim1, self.dim0)

    folder = base(factor=1.0)
    with registered(halved(Turned(0, 1))):
        adapter = adapter_on(folder, tmp_path / "adapter", lora())
        plan = merged(sources(folder, adapter), tmp_path / "out")
        expected, got = reference(folder, adapter), load(tmp_path / "out").state_dict()
    assert plan.strategy is Strategy.STREAM
    for name, value in expected.items():
        assert float((got[name] - value).abs().max()) <= 1e-5, name
    shutil.rmtree(tmp_path / "out")
