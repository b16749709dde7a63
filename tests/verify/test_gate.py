"""The gate as a whole: its process, its rule, what it does with odd sources."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from merge_adapter.checkpoint.folder import Folder
from merge_adapter.errors import MalformedError, NotFoundError
from merge_adapter.types import Verdict
from merge_adapter.verify import VerifySettings

HERE = {"outputs": True, "isolated": False, "probe_tokens": 256, "greedy_tokens": 4}
"""The whole gate in this process, at small cost."""


def test_the_merged_model_runs_without_peft_network_or_secrets(
    good: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the process is given: an allowed environment, offline, and a path as its only argument."""
    seen: list[tuple[list[str], dict[str, str]]] = []
    real = subprocess.Popen

    def spy(command: list[str], **options: Any) -> Any:
        if "merge_adapter.verify.outputs.arm" in command:
            seen.append((command, options["env"]))
        return real(command, **options)

    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.example")
    monkeypatch.setattr(subprocess, "Popen", spy)
    result = good("cls-bf16").judge(outputs=True, probe_tokens=64, greedy_tokens=0)
    assert result.verdict is Verdict.PASS, result.reasons
    [(command, environment)] = seen
    assert "hf_secret" not in " ".join([*command, *environment.values()])
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert not {"HF_TOKEN", "HTTPS_PROXY"} & set(environment)


def test_peft_cannot_be_imported_in_that_process() -> None:
    """The arm hides PEFT before anything imports transformers."""
    code = (
        "import sys; sys.modules['peft'] = None\n"
        "from transformers.utils import is_peft_available\n"
        "assert not is_peft_available()\n"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()


def test_outputs_alone_see_a_model_that_computes_something_else(workpiece: Callable[[str], Any]) -> None:
    """Another activation leaves every weight in place; the outputs part fails it on its own account."""
    piece = workpiece("lm-bf16")
    piece.config(hidden_act="relu")
    result = piece.good.judge(piece.folder, **HERE)
    assert result.verdict is Verdict.FAIL
    assert result.evidence["weights"]["verdict"] == "pass"
    assert result.evidence["outputs"]["verdict"] == "fail"
    assert result.evidence["outputs"]["error"]["mean"] > result.evidence["outputs"]["ceiling"]["upper"]


def test_pooling_belongs_to_an_embedding_model(workpiece: Callable[[str], Any]) -> None:
    """The merged repository pools by its first token, adapter and base by the mean."""
    piece = workpiece("emb-bf16")
    piece.config("1_Pooling/config.json", pooling_mode="cls")
    result = piece.good.judge(piece.folder, **HERE)
    assert result.verdict is Verdict.FAIL
    assert result.evidence["outputs"]["verdict"] == "fail"


def test_weights_and_outputs_both_see_a_merge_at_double_strength(workpiece: Callable[[str], Any]) -> None:
    """In a trained fp32 classifier both parts fail it, and labels may flip."""
    piece = workpiece("cls-fp32")
    names = [name for name in piece.tensors if name.endswith("_proj.weight")]
    piece.strengthen(set(names).__contains__, 2)
    result = piece.good.judge(piece.folder, **HERE)
    assert result.evidence["weights"]["verdict"] == "fail"
    assert result.evidence["outputs"]["verdict"] == "fail"


def test_every_part_catches_the_faults_injected_on_request(good: Callable[[str], Any]) -> None:
    """`--mutants` on a trained model: weights, modules and outputs, and a whole block left out."""
    result = good("lm-bf16").judge(full_mutants=True, **HERE)
    assert result.verdict is Verdict.PASS, result.reasons
    mutants = {entry["fault"].split(":")[0]: entry for entry in result.evidence["mutants"]}
    for name in (
        "no-op",
        "twice",
        "sign",
        "foreign adapter",
        "scaled by 4",
        "zeroed",
        "not a number",
        "swapped",
    ):
        assert mutants[name]["caught_by"] == ["weights", "modules", "outputs"], mutants[name]
    for name in ("scaled by 1.1", "scaled by 0.9", "row", "element", "coarse"):
        assert "weights" in mutants[name]["caught_by"], mutants[name]
    assert mutants["dropped layer"]["caught_by"] == ["outputs"]


def test_an_adapter_that_does_nothing_leaves_the_answer_open(
    good: Callable[[str], Any], lm_adapter: Path, tmp_path: Path
) -> None:
    """Base and merge are the same model: nothing was shown, so nothing passes."""
    right = good("lm-bf16")
    adapter = Path(shutil.copytree(lm_adapter, tmp_path / "adapter"))
    tensors = load_file(adapter / "adapter_model.safetensors")
    zeroed = {k: torch.zeros_like(v) if "lora_B" in k else v for k, v in tensors.items()}
    save_file(zeroed, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    base = right.sources.base.repository.origin.folder
    merged = Path(shutil.copytree(base, tmp_path / "merged"))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(adapter / name, merged / name)
    result = right.with_sources(merged, adapter=adapter).judge(**HERE)
    assert result.verdict is Verdict.INCONCLUSIVE, result.reasons
    assert result.evidence["outputs"]["verdict"] == "inconclusive"


def test_a_tokenizer_that_does_not_load_leaves_the_verdict_open(workpiece: Callable[[str], Any]) -> None:
    """The merged folder has the very same files; but that it can be used was not shown."""
    piece = workpiece("lm-bf16")
    broken = piece.folder / "tokenizer.json"
    broken.write_text("{}")
    sources = replace(piece.good.sources, tokenizer=Folder(piece.folder))
    result = replace(piece.good, sources=sources).judge(piece.folder, **HERE)
    assert result.verdict is Verdict.INCONCLUSIVE, result.reasons
    assert result.evidence["tokenizer"]["verdict"] == "inconclusive"
    assert any("cannot be used, so nothing was compared" in reason for reason in result.reasons)


def test_a_base_without_a_tokenizer_is_probed_with_token_ids(good: Callable[[str], Any]) -> None:
    """Seeded random ids, and the report says so."""
    right = good("lm-bf16")
    bare = replace(right, sources=replace(right.sources, tokenizer=None))
    result = bare.judge(**HERE)
    assert result.verdict is Verdict.PASS, result.reasons
    assert result.evidence["probes"]["source"] == "random token ids"
    assert any("random token ids" in reason for reason in result.reasons)


def test_sharded_merges_and_pickled_bases_are_read(good: Callable[[str], Any], tmp_path: Path) -> None:
    """An index with several shards on one side, pytorch_model.bin on the other."""
    right = good("lm-bf16")
    base = Path(shutil.copytree(right.sources.base.repository.origin.folder, tmp_path / "base"))
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    merged = Path(shutil.copytree(right.merged, tmp_path / "merged"))
    tensors = load_file(merged / "model.safetensors")
    (merged / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for number in range(3):
        file = f"model-{number + 1:05}-of-00003.safetensors"
        save_file({n: tensors[n] for n in names[number::3]}, merged / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names[number::3], file)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (merged / "model.safetensors.index.json").write_text(json.dumps(index))
    result = right.with_sources(merged, base=base).judge()
    assert result.evidence["files"]["verdict"] == "pass", result.reasons
    assert result.evidence["weights"]["verdict"] == "pass", result.reasons


def test_own_probes_come_first(good: Callable[[str], Any], tmp_path: Path) -> None:
    """`--probes FILE`: the user's documents are among those read, and the report names the file."""
    own = tmp_path / "own.txt"
    own.write_text("A document of the adapter's own domain, long enough to be read by every model.\n" * 3)
    result = good("cls-bf16").judge(probes=own, **HERE)
    assert result.evidence["probes"]["own"] == "own.txt"
    assert result.evidence["outputs"]["per_document"][0]["name"] == "own.txt:1"


def test_sources_that_cannot_be_read_are_errors_not_verdicts(
    good: Callable[[str], Any], tmp_path: Path
) -> None:
    """A verdict is about the merged folder; without an adapter, or a folder, there is none."""
    right = good("lm-bf16")
    with pytest.raises(NotFoundError, match="no such folder"):
        right.judge(tmp_path / "nowhere")
    with pytest.raises(MalformedError, match="line 1"):
        probes = tmp_path / "bad.jsonl"
        probes.write_text('{"words": 1}\n')
        right.judge(probes=probes)


@pytest.mark.parametrize("value", ["nan", "-inf"])
@pytest.mark.parametrize("where", ["merged", "adapter"])
def test_numbers_that_are_none_make_a_report(
    where: str, value: str, tmp_path: Path, good: Callable[[str], Any], reported: Callable[..., Any],
    sources_of: Callable[..., Any],
) -> None:  # fmt: skip
    """In the merged model a fault; in the adapter no merge can be right. Either way what is measured is JSON."""
    right = good("lm-bf16")
    merged = Path(shutil.copytree(right.merged, tmp_path / "merged"))
    adapter = Path(shutil.copytree(right.sources.adapter.repository.origin.folder, tmp_path / "adapter"))
    file = merged / "model.safetensors" if where == "merged" else adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(key for key in tensors if "down_proj" in key and "lora_A" not in key)
    tensors[name][3, 3] = float(value)
    save_file(tensors, file, metadata={"format": "pt"})
    sources = sources_of(adapter, right.sources.base.repository.origin.folder)
    settings = VerifySettings(probe_tokens=64, isolated=False, greedy_tokens=4)
    result = reported(merged, sources, settings)
    assert result.verdict is Verdict.FAIL, result.reasons


def test_a_source_s_tokenizer_that_cannot_read_is_told(
    tmp_path: Path, good: Callable[[str], Any], sources_of: Callable[..., Any], reported: Callable[..., Any]
) -> None:
    """It loads, and fails on the first text: random ids are asked instead, and nothing is known of the merged one."""
    right = good("lm-bf16")
    adapter = Path(shutil.copytree(right.sources.adapter.repository.origin.folder, tmp_path / "adapter"))
    config = json.loads((adapter / "tokenizer_config.json").read_text())
    (adapter / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "BertTokenizer"}))
    sources = sources_of(adapter, right.sources.base.repository.origin.folder)
    result = reported(right.merged, sources, VerifySettings(**HERE))
    assert result.verdict is Verdict.INCONCLUSIVE, result.reasons
    assert result.evidence["probes"]["source"] == "random token ids"
    assert any("the tokenizer of adapter or base cannot be used" in reason for reason in result.reasons)


def test_where_generated_text_ends_is_pointed_out(workpiece: Callable[[str], Any]) -> None:
    """No weight tells, and a chat model that never ends is no use; that it was meant is possible."""
    piece = workpiece("lm-bf16")
    assert not any("generation" in reason for reason in piece.good.judge(piece.folder).reasons)
    piece.config("generation_config.json", eos_token_id=7)
    found = piece.good.judge(piece.folder).reasons
    assert "warning: generation, eos_token_id: is 7, the base has 2" in found


def test_other_names_of_labels_are_pointed_out(workpiece: Callable[[str], Any]) -> None:
    """Adapters record none, so that somebody may have put them right."""
    piece = workpiece("cls-bf16")
    piece.config(id2label={"0": "no", "1": "yes"}, label2id={"no": 0, "yes": 1})
    result = piece.good.judge(piece.folder)
    assert result.verdict is Verdict.INCONCLUSIVE  # the outputs were not asked for
    assert "warning: id2label: 0 is 'no', the base has 'LABEL_0'" in result.reasons


def test_a_base_whose_config_states_a_narrower_dtype_is_no_fault(
    tmp_path: Path, good: Callable[[str], Any], sources_of: Callable[..., Any]
) -> None:
    """fp32 files, and a config that says bf16: the merged model is as its base is, unless fp32 was asked for."""
    right = good("lm-fp32")
    folders = [right.sources.base.repository.origin.folder, right.merged]
    base, merged = (Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in folders)
    for folder in (base, merged):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    right = right.with_sources(merged, base=base)
    assert right.judge().verdict is Verdict.INCONCLUSIVE
    assert right.judge(dtype="float32").verdict is Verdict.FAIL
