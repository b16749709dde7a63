"""Each tensor is held to the dtype that it is stored in: several in one checkpoint, others than the base's."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from merge_adapter.types import Verdict
from merge_adapter.verify import VerifySettings
from merge_adapter.verify.models.kinds import Kind
from merge_adapter.verify.models.loading import load_model
from merge_adapter.verify.weights.tensors import named_tensors

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def stored(folder: Path, change: Callable[[str, Tensor], Tensor]) -> Path:
    """The checkpoint in `folder` with every tensor put through `change`."""
    file = folder / "model.safetensors"
    tensors = {name: change(name, tensor).clone() for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def mixed(name: str, tensor: Tensor) -> Tensor:
    """Norms and one projection in fp32, the rest in bf16."""
    return tensor.to(torch.float32 if "norm" in name or name == Q_PROJ else torch.bfloat16)


def gate(**changes: Any) -> VerifySettings:
    return VerifySettings(**{"probe_tokens": 256, "isolated": False, "greedy_tokens": 0, **changes})


@pytest.fixture
def pair(tmp_path: Path, good: Callable[[str], Any]) -> tuple[Any, Path]:
    """A right merge and its base, whose norms and one projection are in fp32 and all else in bf16."""
    right = good("lm-fp32")
    base = Path(shutil.copytree(right.sources.base.repository.origin.folder, tmp_path / "base"))
    merged = Path(shutil.copytree(right.merged, tmp_path / "merged"))
    own = load_file(base / "model.safetensors")
    # what the adapter adds is added to the bf16 base, so that every tensor is rounded once
    delta = {name: tensor - own[name] for name, tensor in load_file(merged / "model.safetensors").items()}
    stored(base, mixed)
    lies = load_file(base / "model.safetensors")
    stored(merged, lambda name, _: mixed(name, lies[name].double() + delta[name].double()))
    return right.with_sources(merged, base=base), merged


def test_a_checkpoint_of_several_dtypes_passes(pair: tuple[Any, Path], reported: Callable[..., Any]) -> None:
    """fp32 norms beside bf16 matrices, as many bases have them; every tensor keeps to its own."""
    right, merged = pair
    result = reported(merged, right.sources, gate(isolated=True))
    assert result.verdict is Verdict.PASS, result.reasons
    found = {row["name"]: row["dtype"] for row in result.evidence["weights"]["per_tensor"]}
    assert found.pop(Q_PROJ) == "float32"
    assert set(found.values()) == {"bfloat16"}


def test_what_was_rounded_on_the_way_to_fp32_fails(
    pair: tuple[Any, Path], reported: Callable[..., Any]
) -> None:
    """An fp32 tensor among bf16 ones is held to fp32: bf16's digits are not enough."""
    right, merged = pair
    stored(merged, lambda name, tensor: tensor.bfloat16().float() if name == Q_PROJ else tensor)
    result = reported(merged, right.sources, gate(outputs=False))
    assert result.verdict is Verdict.FAIL
    assert "layers.1.self_attn.q_proj: merged, but off by" in result.reasons[0]
    assert "(and" not in result.reasons[0]


def test_tensors_stay_mapped_ties_stay_ties(pair: tuple[Any, Path]) -> None:
    """Loaded in the dtype of the many; those that are wider are as wide again."""
    model = load_model(pair[1], Kind.CAUSAL).model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    own = load_file(pair[1] / "model.safetensors")
    held = named_tensors(model)
    assert all(torch.equal(held[name], tensor) for name, tensor in own.items())
    assert all(held[name].dtype == tensor.dtype for name, tensor in own.items())


@pytest.mark.parametrize("way", ["PEFT", "every tensor its own"])
def test_modules_that_transformers_keeps_in_fp32(
    way: str, tmp_path: Path, silence: Callable[[], Any], sources_of: Callable[..., Any],
    reported: Callable[..., Any],
) -> None:  # fmt: skip
    """T5 in fp16: transformers loads `wo` in fp32, and PEFT's merge is written so; others write fp16."""
    import peft
    import transformers

    config = transformers.T5Config(
        vocab_size=512, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=2, decoder_start_token_id=0
    )  # fmt: skip
    torch.manual_seed(0)
    with silence():
        auto = transformers.AutoModelForSeq2SeqLM
        auto.from_config(config).half().save_pretrained(tmp_path / "base")
        model = auto.from_pretrained(tmp_path / "base", dtype="auto")
        settings = peft.LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", task_type="SEQ_2_SEQ_LM")
        model = peft.get_peft_model(model, settings)
        for value in model.parameters():
            if value.requires_grad:
                value.data.add_(torch.randn(value.shape).to(value.dtype) * 0.1)
        model.save_pretrained(tmp_path / "adapter")
        model.merge_and_unload().save_pretrained(tmp_path / "merged")
    if way != "PEFT":
        stored(tmp_path / "merged", lambda _, tensor: tensor.half())
    sources = sources_of(tmp_path / "adapter", tmp_path / "base")
    result = reported(tmp_path / "merged", sources, gate())
    assert result.verdict is Verdict.PASS, result.reasons


@pytest.mark.parametrize("safe", [False, True], ids=["plain", "safe"])
@pytest.mark.parametrize("short", ["bf16", "fp16"])
def test_an_fp32_base_that_peft_loaded_in_16_bit(
    short: str, safe: bool, tmp_path: Path, good: Callable[[str], Any], lm_adapter: Path,
    silence: Callable[[], Any], reported: Callable[..., Any],
) -> None:  # fmt: skip
    """The base is rounded, then the update added: no fault, and it has a name. Half of it missing is one."""
    import peft
    import transformers

    dtype = DTYPES[short]
    base = good("lm-fp32").merged  # a trained model whose numbers need fp32
    merged = Path(shutil.copytree(base, tmp_path / "merged"))
    with silence():
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
        model = peft.PeftModel.from_pretrained(model, lm_adapter).merge_and_unload(safe_merge=safe)
        model.save_pretrained(merged)
    right = good("lm-fp32").with_sources(merged, base=base)
    settings = gate(dtype=str(dtype).removeprefix("torch."))
    result = reported(merged, right.sources, settings)
    assert result.verdict is Verdict.PASS, result.reasons
    assert result.evidence["weights"]["agreement"]["base cast first"] == 35
    own = load_file(base / "model.safetensors")
    stored(merged, lambda name, tensor: (own[name].double() + tensor.double()).div(2).to(dtype))
    assert any(
        "merged at 0.5 times" in reason for reason in right.judge(merged, dtype=settings.dtype).reasons
    )


METHODS = {
    "IA3": lambda peft: peft.IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]),
    "OFT": lambda peft: peft.OFTConfig(target_modules=TARGETS, oft_block_size=8, r=0),
    "LoHa": lambda peft: peft.LoHaConfig(target_modules=TARGETS, r=4, alpha=8),
    "FourierFT": lambda peft: peft.FourierFTConfig(target_modules=TARGETS, n_frequency=50),
}
TARGETS = ["q_proj", "down_proj"]


@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_s_base_may_be_rounded_first(
    method: str, tmp_path: Path, good: Callable[[str], Any], random_merge: Callable[..., Any],
    silence: Callable[[], Any], reported: Callable[..., Any],
) -> None:  # fmt: skip
    """Methods without a closed form, too: PEFT's own layer is the oracle, on the base that PEFT had."""
    import peft
    import transformers

    base = good("lm-fp32").merged
    right = random_merge(METHODS[method](peft), "fp32")
    adapter = right.sources.adapter.repository.origin.folder
    merged = Path(shutil.copytree(base, tmp_path / "short"))
    with silence():
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        peft.PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(merged)
    sources = right.with_sources(merged, base=base).sources
    result = reported(merged, sources, gate(dtype="bfloat16"))
    assert result.verdict is Verdict.PASS, result.reasons
    assert result.evidence["weights"]["agreement"]["base cast first"] > 0
    own = load_file(base / "model.safetensors")
    stored(merged, lambda name, tensor: (own[name].double() + tensor.double()).div(2).bfloat16())
    result = reported(merged, sources, gate(outputs=False, dtype="bfloat16"))
    assert result.evidence["weights"]["verdict"] == "fail"


def test_a_base_alone_is_no_merge_of_a_small_update(
    random_merge: Callable[..., Any], tmp_path: Path, reported: Callable[..., Any]
) -> None:
    """Where bf16 cannot hold the update, the rounded base is what such a merge would be, and shows nothing."""
    right = random_merge({"target_modules": ["q_proj"], "lora_alpha": 1e-4}, "fp32")
    origin = right.sources.base.repository.origin.folder
    wide = stored(Path(shutil.copytree(origin, tmp_path / "wide")), lambda _, tensor: tensor * 1.001)
    merged = stored(Path(shutil.copytree(wide, tmp_path / "none")), lambda _, tensor: tensor.bfloat16())
    right = right.with_sources(merged, base=wide)
    result = reported(merged, right.sources, gate(dtype="bfloat16"))
    assert result.verdict is not Verdict.PASS, result.reasons


def test_an_adapter_of_one_module_on_a_base_that_is_stored_narrower(
    random_merge: Callable[..., Any], tmp_path: Path, reported: Callable[..., Any]
) -> None:
    """Rounding all other weights moves the answers more than rounding that one: it is noise all the same."""
    config = {"target_modules": ["q_proj"], "layers_to_transform": [1], "r": 2}
    right = random_merge(config, "fp32")
    origin = right.sources.base.repository.origin.folder
    added = (
        load_file(right.merged / "model.safetensors")[Q_PROJ]
        - load_file(origin / "model.safetensors")[Q_PROJ]
    )
    base = stored(Path(shutil.copytree(origin, tmp_path / "wide")), lambda _, tensor: tensor * 1.001)

    def rounded_once(name: str, tensor: Tensor) -> Tensor:
        return (tensor.double() + added.double() if name == Q_PROJ else tensor).bfloat16()

    merged = stored(Path(shutil.copytree(base, tmp_path / "narrow")), rounded_once)
    result = reported(merged, right.with_sources(merged, base=base).sources, gate(dtype="bfloat16"))
    assert result.verdict is Verdict.PASS, result.reasons


@pytest.mark.parametrize(
    ("asked", "verdict"),
    [("float32", Verdict.FAIL), ("float16", Verdict.FAIL), ("bfloat16", Verdict.INCONCLUSIVE)],
)
def test_a_dtype_that_was_asked_for_must_be_there(
    asked: str, verdict: Verdict, good: Callable[[str], Any]
) -> None:
    """bf16 files where another dtype was asked for, the base's own though it is; inconclusive without outputs."""
    result = good("lm-bf16").judge(dtype=asked)
    assert result.verdict is verdict
    assert (f"stored as bfloat16, asked for {asked}" in result.reasons[0]) is (verdict is Verdict.FAIL)


def test_a_wider_dtype_than_asked_for_is_pointed_out(good: Callable[[str], Any]) -> None:
    result = good("lm-fp32").judge(dtype="bfloat16")
    assert result.verdict is Verdict.INCONCLUSIVE
    assert any(reason.startswith("warning: ") and "asked for bfloat16" in reason for reason in result.reasons)
