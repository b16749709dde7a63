"""LoRA on torch's MultiheadAttention, and on convolutions that no weight can follow."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from merge_adapter.checkpoint.folder import Folder
from merge_adapter.errors import MethodError
from merge_adapter.merge import merge
from merge_adapter.methods.change import Kind
from merge_adapter.package import package
from merge_adapter.plan import make_plan
from merge_adapter.types import Adapter, BaseModel, MergeSettings, Resolved, Silent, Strategy, Verdict
from merge_adapter.verify import verify
from merge_adapter.verify.settings import VerifySettings

SIGLIP = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip
CONVNEXT = {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "image_size": 32}


@contextmanager
def quietly() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Pair:
    """A base and a LoRA of non-zero effect, saved."""

    def __init__(self, root: Path, auto: str, model_type: str, sizes: Mapping[str, Any], **lora: Any) -> None:
        import peft
        import transformers

        self.root, self.auto = root, auto
        torch.manual_seed(1)
        with quietly(), torch.no_grad():
            config = transformers.CONFIG_MAPPING[model_type](**sizes)
            model = getattr(transformers, auto).from_config(config)
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
            model.save_pretrained(root / "base")
            adapted = peft.get_peft_model(self.load(root / "base"), peft.LoraConfig(**{"r": 4, **lora}))
            for name, parameter in adapted.named_parameters():
                if "lora_" in name:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
            adapted.save_pretrained(root / "adapter")

    def load(self, folder: Path) -> Any:
        import transformers

        with quietly():
            return getattr(transformers, self.auto).from_pretrained(folder, dtype=torch.float32).eval()

    @property
    def sources(self) -> Resolved:
        config = json.loads((self.root / "adapter" / "adapter_config.json").read_text())
        base = json.loads((self.root / "base" / "config.json").read_text())
        adapter = Adapter(Folder(self.root / "adapter"), config, "LORA")
        return Resolved((adapter,), BaseModel(Folder(self.root / "base"), base), None)

    def merged(self) -> Path:
        with quietly():
            plan = make_plan(self.sources, MergeSettings())
        assert plan.consumed == plan.adapter_tensors > 0
        output = self.root / "out"
        output.mkdir()
        merge(plan, self.sources, output, settings=MergeSettings(), progress=Silent())
        package(self.sources, plan, output, settings=MergeSettings())
        return output

    def adapted(self) -> Any:
        import peft

        with quietly():
            return peft.PeftModel.from_pretrained(self.load(self.root / "base"), self.root / "adapter").eval()


def attention(root: Path, **lora: Any) -> Pair:
    return Pair(root, "AutoModel", "siglip_vision_model", SIGLIP, **{"target_modules": ["attention"], **lora})


@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"use_rslora": True},
        {"target_modules": ["attention", "q_proj"], "alpha_pattern": {"head.attention": 3}},
    ],
    ids=["plain", "rslora", "pattern"],
)
def test_both_weights_of_an_attention_follow_its_lora(tmp_path: Path, lora: dict[str, Any]) -> None:
    """As base + adapter answers, and as PEFT merges, which adds the update of the output projection twice."""
    pair = attention(tmp_path, **lora)
    merged, adapted = pair.load(pair.merged()), pair.adapted()
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        before = pair.load(tmp_path / "base")(pixels).pooler_output
        got, answer = merged(pixels).pooler_output, adapted(pixels).pooler_output
        expected = adapted.merge_and_unload().state_dict()
    scale = float(answer.abs().max())
    assert float((answer - before).abs().max()) > 1e-2 * scale
    assert float((got - answer).abs().max()) <= 1e-5 * scale
    state = merged.state_dict()
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value, rtol=1e-5, atol=1e-6)


def test_the_gate_judges_an_attention(tmp_path: Path) -> None:
    pair = attention(tmp_path)
    output = pair.merged()
    settings = VerifySettings(isolated=False, outputs=False)
    with quietly():
        right = verify(output, pair.sources, settings=settings, progress=Silent())
        file = output / "model.safetensors"
        tensors, base = load_file(file), load_file(tmp_path / "base" / "model.safetensors")
        name = next(name for name in tensors if name.endswith("out_proj.weight") and "head" in name)
        tensors[name] = (tensors[name] + base[name]) / 2  # the update once instead of twice
        save_file(tensors, file, metadata={"format": "pt"})
        wrong = verify(output, pair.sources, settings=settings, progress=Silent())
    assert right.verdict is not Verdict.FAIL, right.reasons
    assert right.evidence["weights"]["updated"] == 2
    assert wrong.verdict is Verdict.FAIL
    assert any("out_proj" in reason for reason in wrong.reasons)


def test_the_factors_are_sums(tmp_path: Path) -> None:
    with quietly():
        plan = make_plan(attention(tmp_path).sources, MergeSettings())
    assert {change.kind for change in plan.changes} == {Kind.ADDITIVE}
    assert plan.strategy is Strategy.STREAM


def test_a_grouped_convolution_cannot_hold_an_update_of_all_channels(tmp_path: Path) -> None:
    """PEFT's first factor sees all channels; each group of ConvNeXt's depthwise convolution sees one."""
    pair = Pair(
        tmp_path, "AutoModelForImageClassification", "convnext", CONVNEXT, target_modules=["dwconv"], r=8
    )
    with quietly(), pytest.raises(MethodError, match="has 8 groups") as caught:
        make_plan(pair.sources, MergeSettings())
    assert caught.value.hint
    with quietly(), pytest.raises(NotImplementedError):
        pair.adapted().merge_and_unload()


@pytest.mark.parametrize(
    ("changes", "word"),
    [({"dilation": (2, 2)}, "dilation"), ({"padding_mode": "circular", "padding": (1, 1)}, "mode")],
)
def test_a_convolution_that_peft_does_not_follow_is_refused(
    changes: dict[str, Any], word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No family of transformers has one that a LoRA fits, so the module's own settings are changed here."""
    from merge_adapter.names import architecture

    pair = Pair(
        tmp_path,
        "AutoModelForImageClassification",
        "convnext",
        CONVNEXT,
        target_modules=["embeddings.patch_embeddings"],
    )
    build = architecture._on_meta

    def changed(*arguments: Any, **options: Any) -> Any:
        model = build(*arguments, **options)
        for name, value in changes.items():
            setattr(model.get_submodule("convnext.embeddings.patch_embeddings"), name, value)
        return model

    with quietly():
        make_plan(pair.sources, MergeSettings())
        monkeypatch.setattr(architecture, "_on_meta", changed)
        with pytest.raises(MethodError, match=word):
            make_plan(pair.sources, MergeSettings())
