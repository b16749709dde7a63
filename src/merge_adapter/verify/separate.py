"""Starts the merged arm: a fresh, offline process without PEFT, and brings its answers back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from merge_adapter.verify.answers import Batch

_KEPT = ("PATH", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "SYSTEMROOT")
"""What a process needs to start and to see the same devices. Tokens and proxies are not among them."""


@dataclass(frozen=True)
class Merged:
    """What the merged model said for itself."""

    error: str = ""
    """Why it could not be loaded or run; "" when it could."""
    answers: Tensor | None = None
    choices: Tensor | None = None
    """Its own next token at each place of the reference's greedy text."""
    written: Tensor | None = None
    """Its own greedy text, where that differs."""
    missing: tuple[str, ...] = ()
    tokenizer: Mapping[str, Any] = field(default_factory=dict)


def ask_merged(
    folder: Path,
    *,
    kind: str,
    dtype: torch.dtype,
    device: str,
    batch: Batch | None,
    greedy: tuple[Batch, Tensor] | None,
    texts: Sequence[str],
    conversations: Sequence[Any],
    tokenizer: bool,
    trust: bool,
    timeout: float,
    isolated: bool,
) -> Merged:
    """Run `batch` through the model in `folder` in a process of its own, which also surveys its tokenizer.

    The process gets no secrets, in neither its environment nor its arguments, and may not reach the network.
    """
    from safetensors.torch import load_file, save_file

    with tempfile.TemporaryDirectory(prefix="merge-adapter-arm-") as name:
        work = Path(name)
        inputs: dict[str, Tensor] = {}
        if batch is not None:
            inputs = {"ids": batch.ids.contiguous(), "mask": batch.mask.contiguous()}
            if greedy is not None:
                inputs |= {"prompts": greedy[0].ids.contiguous(), "continuation": greedy[1].contiguous()}
        save_file(inputs, work / "inputs.safetensors")
        job = {
            "merged": str(folder.resolve()),
            "kind": str(kind),
            "dtype": str(dtype).removeprefix("torch."),
            "device": device,
            "threads": torch.get_num_threads(),
            "texts": list(texts),
            "conversations": list(conversations),
            "tokenizer": tokenizer,
            "trust": trust,
        }
        (work / "job.json").write_text(json.dumps(job), encoding="utf-8")
        failed = _run(work, timeout) if isolated else _run_here(work)
        if failed:
            return Merged(error=failed)
        result = json.loads((work / "result.json").read_text(encoding="utf-8"))
        answers: dict[str, Tensor] = {}
        if (work / "answers.safetensors").exists():
            # read, not mapped: the folder goes away
            answers = {key: value.clone() for key, value in load_file(work / "answers.safetensors").items()}
    return Merged(
        error=result.get("error", ""),
        answers=answers.get("answers"),
        choices=answers.get("choices"),
        written=answers.get("written"),
        missing=tuple(result.get("missing", ())),
        tokenizer=result.get("tokenizer", {}),
    )


def _run_here(work: Path) -> str:
    """The same job in this process."""
    from merge_adapter.verify import arm

    job = json.loads((work / "job.json").read_text(encoding="utf-8"))
    result: dict[str, Any] = {}
    try:
        arm.work(work, job, result)
    except Exception as error:  # noqa: BLE001 - whatever the foreign model does is the answer
        result["error"] = f"{type(error).__name__}: {error}"
    (work / "result.json").write_text(json.dumps(result), encoding="utf-8")
    return ""


def _run(work: Path, timeout: float) -> str:
    """Run the process to its end; says why when it left no result."""
    environment = {key: os.environ[key] for key in _KEPT if key in os.environ}
    environment |= {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_HOME": str(work / "home"),
        "HOME": str(work),
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = [sys.executable, "-I", "-m", "merge_adapter.verify.arm", str(work)]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        return f"the merged model gave no answer within {timeout:.0f} s"
    if not (work / "result.json").exists():
        tail = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["no message"]
        return f"the process that runs the merged model ended with status {done.returncode}: {tail[0][:300]}"
    return ""
