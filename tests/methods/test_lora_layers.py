"""LoRA on layers that are no linear ones: convolutions, stacks of experts, tied sets of more than two."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from merge_adapter.checkpoint.folder import Folder
from merge_adapter.errors import AccountingError, MethodError, ShapeError
from merge_adapter.merge import merge
from merge_adapter.plan import make_plan
from merge_adapter.types import Adapter, BaseModel, MergeSettings, Resolved, Silent


@contextmanager
def quietly() -> Iterator[None]:
    """PEFT and transformers advise people who train; these tests only build adapters."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Pair:
    """A base and an adapter of non-zero effect, saved."""

    def __init__(self, root: Path, auto: str, model_type: str, sizes: dict[str, Any], **lora: Any) -> None:
        import peft
        import transformers

        self.root, self.auto = root, auto
        torch.manual_seed(1)
        generator = torch.Generator().manual_seed(2)
        with quietly(), torch.no_grad():
            config = transformers.CONFIG_MAPPING[model_type](**sizes)
            getattr(transformers, auto).from_config(config).save_pretrained(root / "base")
            model = peft.get_peft_model(self.load_base(), peft.LoraConfig(r=4, lora_alpha=8, **lora))
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
            model.save_pretrained(root / "adapter")

    def load_base(self) -> Any:
        import transformers

        return getattr(transformers, self.auto).from_pretrained(self.root / "base")

    @property
    def sources(self) -> Resolved:
        config = json.loads((self.root / "adapter" / "adapter_config.json").read_text())
        base = json.loads((self.root / "base" / "config.json").read_text())
        adapter = Adapter(Folder(self.root / "adapter"), config, "LORA")
        return Resolved((adapter,), BaseModel(Folder(self.root / "base"), base), None)

    def merged(self) -> dict[str, torch.Tensor]:
        with quietly():
            plan = make_plan(self.sources, MergeSettings())
        (self.root / "out").mkdir()
        merge(plan, self.sources, self.root / "out", settings=MergeSettings(), progress=Silent())
        return dict(load_file(self.root / "out" / "model.safetensors"))

    def expected(self) -> dict[str, torch.Tensor]:
        """PEFT's merge, saved by transformers."""
        import peft

        with quietly():
            model = peft.PeftModel.from_pretrained(self.load_base(), self.root / "adapter").merge_and_unload()
            model.save_pretrained(self.root / "expected")
        return dict(load_file(self.root / "expected" / "model.safetensors"))


VIT = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip
GPT_OSS = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 60, "num_local_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip
T5 = {
    "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 60,
    "decoder_start_token_id": 0,
}  # fmt: skip


@pytest.mark.parametrize("dora", [False, True])
def test_convolutions_are_flattened_matrices(tmp_path: Path, *, dora: bool) -> None:
    """A ViT's patch projection `[out, in, 4, 4]`; DoRA's norms run over all of a filter."""
    pair = Pair(
        tmp_path, "AutoModelForImageClassification", "vit", VIT,
        target_modules=["projection", "q_proj"], modules_to_save=["classifier"], use_dora=dora,
    )  # fmt: skip
    found, expected = pair.merged(), pair.expected()
    assert found.keys() == expected.keys()
    base = load_file(tmp_path / "base" / "model.safetensors")
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
        touched = any(
            part in name for part in ("projection.weight", "query.weight", "q_proj.weight", "classifier")
        )
        assert torch.equal(found[name], base[name]) is not touched


@pytest.mark.parametrize("model_type", ["gpt_oss", "granitemoe"])
def test_stacks_of_experts_on_disk(tmp_path: Path, model_type: str) -> None:
    """`[experts, in, out]` and `[experts, out, in]`; where both are equal only the module knows which it is."""
    pair = Pair(
        tmp_path, "AutoModelForCausalLM", model_type, GPT_OSS, target_modules=["q_proj"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )  # fmt: skip
    found, expected = pair.merged(), pair.expected()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
    base = load_file(tmp_path / "base" / "model.safetensors")
    assert sum(not torch.equal(found[name], base[name]) for name in base) == 3


def test_ties_that_cannot_part_are_refused(tmp_path: Path) -> None:
    """T5 ties four weights and scales by it: a head trained by itself fits no checkpoint of it."""
    pair = Pair(
        tmp_path, "AutoModelForSeq2SeqLM", "t5", {**T5, "tie_word_embeddings": True}, target_modules=["q"],
        modules_to_save=["lm_head"],
    )  # fmt: skip
    with pytest.raises(MethodError, match="ties for good"):
        make_plan(pair.sources, MergeSettings())


def edited(pair: Any, **config: Any) -> Any:
    path = pair.adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return pair


def test_a_bias_without_a_place_is_refused(bench: Callable[..., Any]) -> None:
    """PEFT warns in training and raises on merge; here it is said before."""
    made = bench("LORA", changes={"attention_bias": False}, r=4, target_modules=["q_proj"], lora_bias=True)
    with pytest.raises(MethodError, match="lora_bias=True"):
        made.plan()


@pytest.mark.parametrize(
    ("indices", "error", "message"),
    [
        ([1, 2, 60], ShapeError, "trained the tokens"),
        ([1, 2], ShapeError, "one row for each of 2"),
        ([1, 1, 2], ShapeError, "one row for each of 3"),
        ({"lm_head": [1, 2, 3]}, AccountingError, "names none for model.embed_tokens"),
        (None, AccountingError, "names none"),
    ],
)
def test_trained_tokens_must_fit_their_config(
    bench: Callable[..., Any], indices: object, error: type[Exception], message: str
) -> None:
    """Rows without a token, tokens without a row, tokens the base does not have."""
    made = bench("LORA", r=4, target_modules=["q_proj"], trainable_token_indices=[1, 2, 3])
    with pytest.raises(error, match=message):
        edited(made, trainable_token_indices=indices).plan()
