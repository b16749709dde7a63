"""LoRA on parameters by their names: the oracle against PEFT's own layers, whichever way a stack is stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from merge_adapter.types import Verdict
from merge_adapter.verify.models.adapters import PREFIX, AdapterFile
from merge_adapter.verify.settings import VerifySettings
from merge_adapter.verify.weights.by_parameter import by_parameter
from merge_adapter.verify.weights.low_rank import LowRank, LowRankStack


class Experts(nn.Module):
    """Two stacks and what lies beside them; six wide both ways, so that shapes do not tell how they are stored."""

    def __init__(self, *, transposed: bool, experts: int = 3) -> None:
        super().__init__()
        self.is_transposed = transposed
        self.up = nn.Parameter(torch.randn(experts, 6, 6))
        self.down = nn.Parameter(torch.randn(experts, 6, 6))
        self.up_bias = nn.Parameter(torch.randn(experts, 6))

    def forward(self, inputs: Tensor) -> Any:
        return inputs @ self.up @ self.down + self.up_bias[:, None]


class Model(nn.Module):
    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.experts = Experts(**settings)
        self.linear = nn.Linear(6, 4)

    def forward(self, inputs: Tensor) -> Any:
        return self.linear(self.experts(inputs))


def adapted(names: list[str], **settings: Any) -> Any:
    torch.manual_seed(0)
    return get_peft_model(
        Model(**settings), LoraConfig(r=2, lora_alpha=6, target_parameters=names, init_lora_weights=False)
    )


def source(model: Any, **changes: Any) -> tuple[Any, AdapterFile]:
    """What the functions need of the sources, and the adapter's file as PEFT would write it."""

    class Adapter:
        method = "LORA"
        config: Any = {"r": 2, "lora_alpha": 6, **changes}  # noqa: RUF012
        weight = 1.0

    class Sources:
        adapter = Adapter()
        adapters = (adapter,)

    tensors = {
        f"{PREFIX}{name.removeprefix(PREFIX)}".replace(".default", ""): value.detach()
        for name, value in model.named_parameters()
        if "lora_" in name
    }
    return Sources(), AdapterFile(Sources.adapter, tensors)  # type: ignore[arg-type]


NAMES = ["experts.up", "experts.down"]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("in_file", [True, False])
def test_every_matrix_of_a_stack_is_what_peft_makes_of_it(*, transposed: bool, in_file: bool) -> None:
    """From the file's own factors, or from PEFT's where the file holds others."""
    model = adapted(NAMES, transposed=transposed)
    sources, file = source(model)
    if not in_file:
        file = AdapterFile(file.adapter, {})
    found = by_parameter("experts", model.base_model.model.experts, sources, (file,))
    assert set(found) == {"up", "down"}
    ours = {}
    for leaf, parameter in found.items():
        update = parameter.update
        assert isinstance(update, LowRankStack)
        assert parameter.disagreements == ()
        ours[leaf] = update.target_rows(0, update.rows, torch.float64)
        rows = [update.target_rows(row, row + 5, torch.float64) for row in range(0, 18, 5)]
        torch.testing.assert_close(torch.cat(rows), ours[leaf], rtol=1e-12, atol=1e-12)
    merged = model.merge_and_unload().experts  # changes the base's tensors in place
    for leaf, target in ours.items():
        theirs = getattr(merged, leaf).double()
        torch.testing.assert_close(target.view(3, 6, 6), theirs, rtol=0, atol=1e-5)


def test_a_single_matrix_by_its_name() -> None:
    """The weight of a plain layer."""
    model = adapted(["linear.weight"], transposed=False)
    sources, file = source(model)
    update = by_parameter("linear", model.base_model.model.linear, sources, (file,))["weight"].update
    assert type(update) is LowRank
    ours = update.target_rows(0, 4, torch.float64)
    theirs = model.merge_and_unload().linear.weight.double()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_a_scale_that_the_config_does_not_say_is_told() -> None:
    """PEFT's layer and the raw config must agree."""
    model = adapted(NAMES, transposed=False)
    sources, file = source(model, lora_alpha=12)
    found = by_parameter("experts", model.base_model.model.experts, sources, (file,))
    assert [text for each in found.values() for text in each.disagreements] == [
        "experts.down: PEFT scales by 3, the adapter's config says 6",
        "experts.up: PEFT scales by 3, the adapter's config says 6",
    ]


def test_other_layers_are_left_to_others() -> None:
    """A plain LoRA layer, one beneath a parameter's, and a stack of one, which PEFT takes for a single matrix."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["linear"], init_lora_weights=False)
    model: Any = get_peft_model(Model(transposed=False), config)
    sources, file = source(model)
    assert by_parameter("linear", model.base_model.model.linear, sources, (file,)) == {}
    single = adapted(NAMES, transposed=False, experts=1)
    assert by_parameter("experts", single.base_model.model.experts, *_pair(single)) == {}


def _pair(model: Any) -> tuple[Any, tuple[AdapterFile, ...]]:
    sources, file = source(model)
    return sources, (file,)


def test_one_expert_left_unmerged_is_named_by_its_rows(
    tmp_path: Path, sources_of: Any, reported: Any
) -> None:
    """A fault in one matrix of a stack of many."""
    import transformers

    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    transformers.MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model: Any = get_peft_model(
        transformers.MixtralForCausalLM.from_pretrained(tmp_path / "base"),
        LoraConfig(r=4, target_parameters=names, target_modules=["q_proj"], init_lora_weights=False),
    )
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")

    def read(dtype: torch.dtype) -> Any:
        return transformers.MixtralForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype)

    merged: Any = PeftModel.from_pretrained(read(torch.float32), tmp_path / "adapter").merge_and_unload()
    merged = merged.to(torch.bfloat16)
    merged.save_pretrained(tmp_path / "right")
    held = merged.model.layers[1].mlp.experts.down_proj
    with torch.no_grad():
        held[2] = read(torch.bfloat16).model.layers[1].mlp.experts.down_proj[2]
    merged.save_pretrained(tmp_path / "wrong")

    sources = sources_of(tmp_path / "adapter", tmp_path / "base")
    right, wrong = (
        reported(tmp_path / folder, sources, VerifySettings(outputs=False)) for folder in ("right", "wrong")
    )
    assert right.evidence["weights"]["verdict"] == "pass", right.reasons
    assert {entry["oracle"] for entry in right.evidence["weights"]["per_tensor"]} == {
        "closed form, W + s B A",
        "closed form, W + s B A of each matrix",
    }
    assert wrong.verdict is Verdict.FAIL
    text = next(reason for reason in wrong.reasons if "down_proj" in reason)
    assert "wrong in 32 of 128 rows (rows 64 to 95), right elsewhere" in text
