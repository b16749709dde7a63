"""A LoRA trained on 4-bit weights, merged by the command line: into either honest reference, or not at all."""

import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file

from localhub.process import LocalHub
from merge_adapter.cli import run
from merge_adapter.errors import BaseModelError, ExitCode, InputError
from merge_adapter.hub import Hub
from merge_adapter.resolve import SourceRequest, resolve
from merge_adapter.types import QuantizedBase, Verdict
from merge_adapter.verify import VerifySettings, verify
from merge_adapter.verify.models import quantized as judged

Copy = Callable[..., Path]
FAST = ("--probe-tokens", "128", "--quiet")


@dataclass(frozen=True)
class Trained:
    """Folders of a quantised base and of a LoRA trained on it."""

    base: Path
    adapter: Path
    original: Path


def card_of(original: str, **more: str) -> str:
    lines = [f"base_model: {original}", *(f"{key}: {value}" for key, value in more.items())]
    return "---\n" + "\n".join(lines) + "\n---\n\n# Quantised\n"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, lm_base: Path) -> Trained:
    """The demo's base in NF4 with nested scales, and a LoRA trained on it as QLoRA does."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    place = tmp_path_factory.mktemp("quantised")
    chosen = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # bitsandbytes on kernels it would rather use
        model = AutoModelForCausalLM.from_pretrained(lm_base, quantization_config=chosen, device_map="cpu")
        model.save_pretrained(place / "base")
        for path in lm_base.glob("*token*"):
            shutil.copy(path, place / "base")
        shutil.copy(lm_base / "chat_template.jinja", place / "base")
        tokenizer = AutoTokenizer.from_pretrained(lm_base)
        adapted = get_peft_model(
            model,
            LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"),
        )
        text = "Quantised weights are codes in a table. " * 8
        ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :96]
        optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(12):
            loss = adapted(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        adapted.save_pretrained(place / "adapter")
    return Trained(place / "base", place / "adapter", lm_base)


@pytest.fixture(scope="module")
def dequantised(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("merged") / "dequantised"
    arguments = ["--base-model", str(trained.base), "-o", str(output), "--quantized-base", "dequantize"]
    assert run(["merge", str(trained.adapter), *arguments, *FAST]) == 0
    return output


def test_the_dequantised_reference_passes_the_gate(dequantised: Path) -> None:
    report = json.loads((dequantised / "merge_report.json").read_text())
    assert report["verification"]["verdict"] == "pass"
    assert report["settings"]["quantized_base"] == "dequantize"
    assert any("bitsandbytes, 4 bit nf4" in note and "dequantised" in note for note in report["notes"])
    card = (dequantised / "README.md").read_text()
    assert "The reference is its dequantised form" in card
    assert "| Dtype | of each tensor as in the base model, dequantised |" in card


def test_it_is_a_plain_checkpoint(dequantised: Path, trained: Trained) -> None:
    """The original's names, dtypes and config, nothing of the quantisation, and transformers alone loads it."""
    from transformers import AutoModelForCausalLM

    merged, original = (load_file(f / "model.safetensors") for f in (dequantised, trained.original))
    assert set(merged) == set(original)
    assert {name: (v.dtype, v.shape) for name, v in merged.items()} == {
        name: (v.dtype, v.shape) for name, v in original.items()
    }
    config = json.loads((dequantised / "config.json").read_text())
    assert "quantization_config" not in config
    model, said = AutoModelForCausalLM.from_pretrained(dequantised, output_loading_info=True)
    assert not any(said.values()), said
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_the_references_differ_and_the_gate_tells(
    dequantised: Path, trained: Trained, unreachable: Hub
) -> None:
    """A merge into dequantised weights is no merge into the original: what is declared is what is judged."""
    sources = settled(trained.original, trained, unreachable, QuantizedBase.REFUSE)
    verification = verify(dequantised, sources, settings=VerifySettings(outputs=False, isolated=False))
    assert verification.verdict is Verdict.FAIL
    assert verification.evidence["weights"]["verdict"] == "fail"


def test_refused_unless_chosen_and_nothing_is_left(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "place" / "merged"
    output.parent.mkdir()
    arguments = ["merge", str(trained.adapter), "--base-model", str(trained.base), "-o", str(output)]
    assert run([*arguments, *FAST]) == ExitCode.UNMERGEABLE
    said = capsys.readouterr().err
    assert "bitsandbytes, 4 bit nf4" in said
    assert "--quantized-base dequantize" in said
    assert "--base-model OWNER/NAME" in said
    assert run([*arguments, "--quantized-base", "original", *FAST]) == ExitCode.UNMERGEABLE
    assert "--base-model" in capsys.readouterr().err
    assert list(output.parent.iterdir()) == []


def test_verify_wants_the_choice_too(
    dequantised: Path, trained: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["verify", str(dequantised), "--adapter", str(trained.adapter)]
    assert run([*arguments, "--base-model", str(trained.base), *FAST]) == ExitCode.UNMERGEABLE
    assert "--quantized-base dequantize" in capsys.readouterr().err


def test_the_original_is_found_on_the_hub_and_passes_the_gate(
    trained: Trained, hub: LocalHub, tokens: dict[str, str], copy_of: Copy, tmp_path: Path
) -> None:
    """From the adapter's config to the 4-bit repository, from its card to the 16-bit one."""
    api = HfApi(endpoint=hub.url, token=tokens["ada"])
    base = copy_of(trained.base)
    (base / "README.md").write_text(card_of("ada/whole-precision"))
    for name, folder in (("whole-precision", trained.original), ("whole-precision-bnb-4bit", base)):
        api.create_repo(f"ada/{name}")
        api.upload_folder(repo_id=f"ada/{name}", folder_path=folder)
    adapter = naming(copy_of(trained.adapter), "ada/whole-precision-bnb-4bit")
    finished = subprocess.run(
        [sys.executable, "-m", "merge_adapter", "merge", str(adapter), "-o", str(tmp_path / "merged"),
         "--quantized-base", "original", *FAST],
        env={**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": tokens["ada"]},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stdout + finished.stderr
    report = json.loads((tmp_path / "merged" / "merge_report.json").read_text())
    assert report["verification"]["verdict"] == "pass"
    assert report["base"]["id"] == "ada/whole-precision"
    assert report["settings"]["quantized_base"] == "original"
    assert any("ada/whole-precision-bnb-4bit is stored quantised" in note for note in report["notes"])
    assert "16-bit original" in (tmp_path / "merged" / "README.md").read_text()


def naming(adapter: Path, base: str) -> Path:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": base}))
    return adapter


# -------------------------------------------------------------------------------- which model is the original


def stored(folder: Path, quantization: Any, card: str = "") -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps({"model_type": "llama", "quantization_config": quantization})
    )
    if card:
        (folder / "README.md").write_text(card)
    return folder


def settled(base: Path, trained: Trained, hub: Hub, choice: QuantizedBase) -> Any:
    return resolve(
        SourceRequest((str(trained.adapter),), base_model=str(base)), hub=hub, quantized_base=choice
    )


@pytest.fixture
def unreachable() -> Hub:
    """A Hub nobody listens at: a test that reaches for it fails."""
    return Hub(endpoint="http://127.0.0.1:9", token=None)


METHODS = (
    "gptq",
    "awq",
    "aqlm",
    "hqq",
    "eetq",
    "quanto",
    "spqr",
    "auto-round",
    "of_tomorrow",
    "no\nname",
    None,
)


@pytest.mark.parametrize("choice", [QuantizedBase.REFUSE, QuantizedBase.DEQUANTIZE])
@pytest.mark.parametrize("method", METHODS)
def test_formats_nobody_dequantises_here(
    method: str | None, choice: QuantizedBase, trained: Trained, unreachable: Hub, tmp_path: Path
) -> None:
    """Refused before any work, with the original that the card names."""
    base = stored(tmp_path / "base", {"quant_method": method}, card_of("meta/llama"))
    with pytest.raises(BaseModelError, match="cannot be merged into") as caught:
        settled(base, trained, unreachable, choice)
    assert caught.value.hint.endswith("--base-model meta/llama")
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    "config",
    [
        {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"},
        {"quant_method": "compressed-tensors", "format": ["pack-quantized"]},
        {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24-bitmask"}},
        ["not", "an", "object"],
    ],
)
def test_uses_that_are_not_read(config: Any, trained: Trained, unreachable: Hub, tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match="cannot be merged into") as caught:
        settled(stored(tmp_path / "base", config), trained, unreachable, QuantizedBase.DEQUANTIZE)
    assert caught.value.hint.endswith("--base-model OWNER/NAME")


@pytest.mark.parametrize(
    "card",
    [
        "",
        "no front matter",
        card_of("[meta/llama, meta/other]"),
        card_of("/home/ada/llama"),
        card_of("../llama"),
        card_of("meta/llama", base_model_relation="finetune"),
    ],
)
def test_cards_that_name_no_original(card: str, trained: Trained, unreachable: Hub, tmp_path: Path) -> None:
    """A finetune of another model is not that model stored quantised, and no path of this machine is opened."""
    base = stored(tmp_path / "base", {"quant_method": "gptq"}, card)
    with pytest.raises(BaseModelError, match="original of the quantised base is not known") as caught:
        settled(base, trained, unreachable, QuantizedBase.ORIGINAL)
    assert "--base-model" in caught.value.hint


def test_quantised_from_quantised_is_followed(
    trained: Trained, hub: LocalHub, tokens: dict[str, str], tmp_path: Path
) -> None:
    """As of gpt-oss in 4 bit, made from MXFP4; a circle ends."""
    api = HfApi(endpoint=hub.url, token=tokens["ada"])
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "config.json").write_text(json.dumps({"model_type": "llama"}))
    middle = stored(tmp_path / "middle", {"quant_method": "mxfp4"}, card_of("ada/chain-plain"))
    circle = stored(tmp_path / "circle", {"quant_method": "mxfp4"}, card_of("ada/chain-turn"))
    turn = stored(tmp_path / "turn", {"quant_method": "mxfp4"}, card_of("ada/chain-circle"))
    for name, folder in (("plain", plain), ("middle", middle), ("circle", circle), ("turn", turn)):
        api.create_repo(f"ada/chain-{name}")
        api.upload_folder(repo_id=f"ada/chain-{name}", folder_path=folder)
    reached = Hub(endpoint=hub.url, token=tokens["ada"])
    base = stored(tmp_path / "base", {"quant_method": "awq"}, card_of("ada/chain-middle"))
    sources = settled(base, trained, reached, QuantizedBase.ORIGINAL)
    assert sources.base.repository.origin.repo_id == "ada/chain-plain"
    with pytest.raises(BaseModelError, match="is not known"):
        settled(circle, trained, reached, QuantizedBase.ORIGINAL)


def test_an_original_that_was_trained_on_before_quantising_is_refused(
    trained: Trained, hub: LocalHub, tokens: dict[str, str], copy_of: Copy
) -> None:
    """The card names it, but norms, which bitsandbytes leaves alone, tell that it is another model."""
    api = HfApi(endpoint=hub.url, token=tokens["ada"])
    base, other = copy_of(trained.base), copy_of(trained.original, "other")
    (base / "README.md").write_text(card_of("ada/before-training"))
    tensors = load_file(other / "model.safetensors")
    for name in [name for name in tensors if name.endswith("norm.weight")]:
        tensors[name] = tensors[name] * 1.01
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    api.create_repo("ada/before-training")
    api.upload_folder(repo_id="ada/before-training", folder_path=other)
    reached = Hub(endpoint=hub.url, token=tokens["ada"])
    with pytest.raises(BaseModelError, match=r"not made from ada/before-training .*norm\.weight") as caught:
        settled(base, trained, reached, QuantizedBase.ORIGINAL)
    assert "--quantized-base dequantize" in caught.value.hint


def test_a_plain_base_is_taken_whatever_is_chosen(trained: Trained, unreachable: Hub) -> None:
    for choice in QuantizedBase:
        sources = settled(trained.original, trained, unreachable, choice)
        assert sources.base.repository.origin.folder == trained.original
        assert not any("quantised" in note for note in sources.notes)


def test_a_missing_library_is_said_before_the_work(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judged.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="bitsandbytes is not installed") as caught:
        judged.check_library(json.loads((trained.base / "config.json").read_text()))
    assert "merge-adapter[quantized]" in caught.value.hint
    judged.check_library({"quantization_config": {"quant_method": "fp8"}})
    judged.check_library({"model_type": "llama"})
