"""The command line on folders: what it prints, its exit codes, and that bad input leaves nothing behind."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from typer.main import get_command

from merge_adapter.cli import app, run
from merge_adapter.errors import ExitCode
from merge_adapter.report import document

Copy = Callable[..., Path]
Edit = Callable[[Path], None]


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below `folder` with its content, to tell that nothing changed."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "merge_adapter", *map(str, arguments)]


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory, lm_base: Path, lm_adapter: Path) -> Path:
    """The demo's adapter merged into its base by the command line, gate and all."""
    output = tmp_path_factory.mktemp("cli") / "merged"
    assert run(["merge", str(lm_adapter), "--base-model", str(lm_base), "-o", str(output), "--quiet"]) == 0
    return output


def test_no_help_text_is_read_as_markup() -> None:
    """Typer's help takes what stands in square brackets for markup, and shows nothing of it."""

    def texts(command: Any) -> Iterator[str]:
        yield command.help or ""
        yield from (getattr(one, "help", None) or "" for one in command.params)
        for below in getattr(command, "commands", {}).values():
            yield from texts(below)

    found = list(texts(get_command(app)))
    assert len(found) > 50
    assert [text for text in found if "[" in text] == []


def test_a_merged_folder_is_whole_and_says_what_it_is(merged: Path, lm_adapter: Path) -> None:
    report = document.read(merged)
    assert report["verification"]["verdict"] == "pass"
    assert report["adapter"]["consumed"] == report["adapter"]["tensors"]
    assert report["adapter"]["tensors"] == len(load_file(lm_adapter / "adapter_model.safetensors"))
    listed = {entry["path"] for entry in report["output"]["files"]}
    assert listed == {path for path in tree(merged) if path != document.REPORT_FILE}
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= listed
    assert "adapter_config.json" not in listed


def test_a_merged_folder_loads_without_peft_and_writes_what_base_and_adapter_write(
    merged: Path, lm_base: Path, lm_adapter: Path
) -> None:
    script = """
import sys
sys.modules["peft"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = sys.argv[1]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
inputs = tokenizer("The function", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=24, do_sample=False)[0]))
"""
    plain = subprocess.run(
        [sys.executable, "-c", script, str(merged)], capture_output=True, text=True, check=True
    ).stdout

    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(lm_adapter)
    base = AutoModelForCausalLM.from_pretrained(lm_base, dtype=torch.float32)
    inputs = tokenizer("The function", return_tensors="pt")
    before = tokenizer.decode(base.generate(**inputs, max_new_tokens=24, do_sample=False)[0])
    reference = PeftModel.from_pretrained(base, lm_adapter)
    after = tokenizer.decode(reference.generate(**inputs, max_new_tokens=24, do_sample=False)[0])
    assert plain.strip() == after.strip()
    assert plain.strip() != before.strip()


def test_verify_passes_it_and_changes_nothing(
    merged: Path, lm_base: Path, lm_adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tree(merged)
    assert (
        run(["verify", str(merged), "--adapter", str(lm_adapter), "--base-model", str(lm_base), "--json"])
        == 0
    )
    printed = json.loads(capsys.readouterr().out)
    assert printed["verification"]["verdict"] == "pass"
    assert tree(merged) == before


def test_verify_fails_what_is_not_base_and_adapter(
    copy_of: Copy, merged: Path, lm_base: Path, lm_adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    candidate = copy_of(merged, "candidate")
    shutil.copy(lm_base / "model.safetensors", candidate / "model.safetensors")
    code = run(["verify", str(candidate), "--adapter", str(lm_adapter), "--base-model", str(lm_base)])
    assert code == ExitCode.NOT_EQUIVALENT
    captured = capsys.readouterr()
    assert "not merged" in captured.out
    assert "not equivalent" in captured.err


def test_plan_reads_no_weights_and_tells_the_cost(
    lm_base: Path, lm_adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["plan", str(lm_adapter), "--base-model", str(lm_base), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["strategy"] == "stream"
    assert printed["bytes_written"] >= (lm_base / "model.safetensors").stat().st_size
    assert run(["plan", str(lm_adapter), "--base-model", str(lm_base)]) == 0
    assert "LORA" in capsys.readouterr().out


def test_json_goes_to_stdout_alone_errors_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", str(tmp_path / "nowhere"), "--json"]) == ExitCode.INPUT
    captured = capsys.readouterr()
    assert json.loads(captured.out)["error"]["exit_code"] == 2
    assert "does not exist" in captured.err


def test_no_verify_says_so(tmp_path: Path, lm_base: Path, lm_adapter: Path) -> None:
    output = tmp_path / "out"
    arguments = [
        "merge",
        str(lm_adapter),
        "--base-model",
        str(lm_base),
        "-o",
        str(output),
        "-q",
        "--no-verify",
    ]
    assert run(arguments) == 0
    verification = document.read(output)["verification"]
    assert verification["verdict"] == "inconclusive"
    assert "--no-verify" in verification["reasons"][0]


def test_an_output_that_exists_is_left_as_it_is(tmp_path: Path, lm_base: Path, lm_adapter: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    before = tree(tmp_path)
    assert (
        run(["merge", str(lm_adapter), "--base-model", str(lm_base), "-o", str(tmp_path)]) == ExitCode.INPUT
    )
    assert tree(tmp_path) == before


# ------------------------------------------------------------------------------------------ bad input


def _config(**changes: Any) -> Edit:
    def edit(adapter: Path) -> None:
        path = adapter / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


def _weights(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Edit:
    def edit(adapter: Path) -> None:
        path = adapter / "adapter_model.safetensors"
        save_file(change(load_file(path)), path)

    return edit


def _truncate(adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _first_wider(tensors: dict[str, Any]) -> dict[str, Any]:
    name = next(name for name in tensors if "lora_A" in name)
    return {**tensors, name: tensors[name].repeat(1, 2)}


BAD: dict[str, tuple[Edit, ExitCode, str]] = {
    "no config": (lambda a: (a / "adapter_config.json").unlink(), ExitCode.INPUT, "adapter_config.json"),
    "broken config": (lambda a: (a / "adapter_config.json").write_text("{") and None, ExitCode.INPUT, "JSON"),
    "no weights": (lambda a: (a / "adapter_model.safetensors").unlink(), ExitCode.INPUT, "adapter_model"),
    "truncated weights": (_truncate, ExitCode.INPUT, "adapter_model.safetensors"),
    "weights are no safetensors": (
        lambda a: (a / "adapter_model.safetensors").write_text("<html>404</html>") and None,
        ExitCode.INPUT,
        "adapter_model.safetensors",
    ),
    "matches nothing": (
        _weights(lambda t: {name.replace("layers", "blocks"): value for name, value in t.items()}),
        ExitCode.UNMERGEABLE,
        "blocks",
    ),
    "matches partly": (
        _weights(lambda t: {name.replace("layers.1.", "layers.77."): value for name, value in t.items()}),
        ExitCode.UNMERGEABLE,
        "layers.77",
    ),
    "half a pair": (
        _weights(lambda t: dict(list(t.items())[1:])),
        ExitCode.UNMERGEABLE,
        "lora_",
    ),
    "shapes do not fit": (_weights(_first_wider), ExitCode.UNMERGEABLE, "expected"),
    "prompt tuning": (_config(peft_type="PROMPT_TUNING"), ExitCode.UNMERGEABLE, "Prompt tuning"),
    "no method": (_config(peft_type=None), ExitCode.UNMERGEABLE, "peft_type"),
    "unknown method": (_config(peft_type="NOVELTY"), ExitCode.UNMERGEABLE, "NOVELTY"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_adapters_are_refused_and_leave_nothing(
    tmp_path: Path,
    copy_of: Copy,
    lm_base: Path,
    lm_adapter: Path,
    case: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    edit, code, words = BAD[case]
    adapter = copy_of(lm_adapter, "adapter")
    edit(adapter)
    before = tree(tmp_path)
    output = tmp_path / "out"
    assert run(["merge", str(adapter), "--base-model", str(lm_base), "-o", str(output), "-q"]) == code
    error = capsys.readouterr().err
    assert words in error
    assert error.startswith("error: ")
    assert "Traceback" not in error
    assert tree(tmp_path) == before
    assert not output.exists()


def _truncated_base(base: Path) -> None:
    path = base / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


BAD_BASE: dict[str, tuple[Edit, ExitCode, str]] = {
    "no config": (lambda b: (b / "config.json").unlink(), ExitCode.INPUT, "config.json"),
    "no weights": (lambda b: (b / "model.safetensors").unlink(), ExitCode.INPUT, "safetensors"),
    "truncated weights": (_truncated_base, ExitCode.INPUT, "model.safetensors"),
    "header is no JSON": (
        lambda b: (b / "model.safetensors").write_bytes((9).to_bytes(8, "little") + b"not json!") and None,
        ExitCode.INPUT,
        "model.safetensors",
    ),
}


@pytest.mark.parametrize("case", BAD_BASE)
def test_bad_bases_are_refused_and_leave_nothing(
    tmp_path: Path,
    copy_of: Copy,
    lm_base: Path,
    lm_adapter: Path,
    case: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    edit, code, words = BAD_BASE[case]
    base = copy_of(lm_base, "base")
    edit(base)
    before = tree(tmp_path)
    assert (
        run(["merge", str(lm_adapter), "--base-model", str(base), "-o", str(tmp_path / "out"), "-q"]) == code
    )
    assert words in capsys.readouterr().err
    assert tree(tmp_path) == before


# ------------------------------------------------------------------------------- full disk, interruption


def test_a_write_the_system_refuses_leaves_nothing(tmp_path: Path, lm_base: Path, lm_adapter: Path) -> None:
    """A file-size limit below the shard's size: the kernel refuses the write as a full disk does."""
    limit = (lm_base / "model.safetensors").stat().st_size // 2

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    finished = subprocess.run(
        command("merge", lm_adapter, "--base-model", lm_base, "-o", tmp_path / "out", "-q", "--no-verify"),
        capture_output=True,
        text=True,
        preexec_fn=limited,
    )
    assert finished.returncode == ExitCode.INPUT, finished.stderr
    assert finished.stderr.startswith("error: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_merge_shows_no_output_and_the_next_one_finishes(
    tmp_path: Path, lm_base: Path, lm_adapter: Path, how: signal.Signals
) -> None:
    arguments = command("merge", lm_adapter, "--base-model", lm_base, "-o", tmp_path / "out", "-q")
    process = subprocess.Popen(
        arguments,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # ignored where a shell runs us behind
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / ".out.partial" / "model.safetensors").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    if how is signal.SIGKILL:
        os.killpg(process.pid, how)
    else:
        process.send_signal(how)
    process.communicate()
    assert process.returncode == (-how if how is signal.SIGKILL else ExitCode.INTERRUPTED)
    assert not (tmp_path / "out").exists()
    if how is not signal.SIGKILL:
        assert list(tmp_path.iterdir()) == []
    assert run([*map(str, arguments[3:]), "--no-verify"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
