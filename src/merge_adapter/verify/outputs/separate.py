"""Starts the merged arm: a fresh, offline process without PEFT, and brings its answers back."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from merge_adapter.verify.findings import Finding, fault, undecided
from merge_adapter.verify.memory.kept import Answers
from merge_adapter.verify.memory.mapped import served
from merge_adapter.verify.outputs.arm import ANSWERS, MEDIA, PAGER, PROMPTED
from merge_adapter.verify.outputs.process import Died, OwnProcess, Stopped
from merge_adapter.verify.probes.batch import Batch


@dataclass(frozen=True)
class Merged:
    """What the merged model said for itself."""

    error: str = ""
    """Why it could not be loaded or run; "" when it could."""
    stopped: str = ""
    """Why it was not heard to the end, when that lies with the machine and not with the model."""
    answers: Answers | None = None
    choices: Tensor | None = None
    """Its own next token at each place of the reference's greedy text."""
    written: Tensor | None = None
    """Its own greedy text."""
    missing: tuple[str, ...] = ()
    tokenizer: Mapping[str, Any] = field(default_factory=dict)
    front: Mapping[str, Any] = field(default_factory=dict)
    """What the tokens of a soft prompt took: `mass`, the largest probability; `chosen`, how often they were first."""

    def unheard(self) -> Finding | None:
        """What follows when it gave no answers: a fault of the model, or nothing at all about it."""
        if self.stopped:
            text = f"the merged model was not heard: {self.stopped}"
            return undecided("outputs", "", f"{text}; run it again with more memory, disk or time")
        if self.error:
            return fault("outputs", "", f"the merged model could not be run on its own: {self.error}")
        return None


@dataclass(frozen=True)
class Questions:
    """Everything the merged model is asked."""

    folder: Path
    kind: str
    device: str
    batch: Batch | None
    """What it reads; None to survey the tokenizer alone."""
    greedy: tuple[Batch, Tensor] | None
    """Prompts and the reference's continuations."""
    sentences: bool
    """Load it through sentence-transformers."""
    texts: tuple[str, ...]
    conversations: tuple[Any, ...]
    tokenizer: bool
    trust: bool
    timeout: float
    """Seconds."""
    isolated: bool
    front: tuple[int, ...] = ()
    """Tokens of a soft prompt, which come before everything it reads and are no part of its answers."""


def ask_merged(questions: Questions, own: OwnProcess | None = None) -> Merged:
    """Put the questions to the model, in a process of its own when they say so: `own`, or one started now."""
    from safetensors.torch import load_file, save_file

    with ExitStack() as stack:
        if own is None and questions.isolated:
            own = stack.enter_context(OwnProcess())
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="merge-adapter-arm-")))
        if own is not None and questions.isolated:
            work = own.folder
        save_file(_inputs(questions), work / "inputs.safetensors")
        (work / "job.json").write_text(json.dumps(_job(questions)), encoding="utf-8")
        with served(questions.folder, work / PAGER):
            try:
                if own is not None and questions.isolated:
                    own.ask(questions.timeout)
                else:
                    _run_here(work)
            except Stopped as stopped:
                return Merged(stopped=str(stopped))
            except Died as died:
                return Merged(error=str(died))
        result = json.loads((work / "result.json").read_text(encoding="utf-8"))
        # mapped: files whose folder goes away are there for as long as they are
        pieces = tuple(load_file(path)["answers"] for path in sorted(work.glob(f"{ANSWERS}*")))
        text = {}
        if (work / "text.safetensors").exists():
            text = {key: value.clone() for key, value in load_file(work / "text.safetensors").items()}
    return Merged(
        error=result.get("error", ""),
        stopped=result.get("stopped", ""),
        answers=Answers(pieces) if pieces else None,
        choices=text.get("choices"),
        written=text.get("written"),
        missing=tuple(result.get("missing", ())),
        tokenizer=result.get("tokenizer", {}),
        front=result.get("front", {}),
    )


def _inputs(questions: Questions) -> dict[str, Tensor]:
    if questions.batch is None:
        return {}
    inputs = {"ids": questions.batch.ids.contiguous(), "mask": questions.batch.mask.contiguous()}
    inputs |= {f"{MEDIA}{name}": value.contiguous() for name, value in questions.batch.media.items()}
    if questions.greedy is not None:
        prompts, continuation = questions.greedy
        inputs |= {
            "prompts": prompts.ids.contiguous(),
            "prompts_mask": prompts.mask.contiguous(),
            "continuation": continuation.contiguous(),
        }
        inputs |= {f"{PROMPTED}{name}": value.clone() for name, value in prompts.media.items()}
    return inputs


def _job(questions: Questions) -> dict[str, Any]:
    return {
        "merged": str(questions.folder.resolve()),
        "kind": str(questions.kind),
        "device": questions.device,
        "cuts": list(questions.batch.cuts) if questions.batch is not None else [],
        "classes": questions.batch.classes if questions.batch is not None else 1,
        "threads": torch.get_num_threads(),
        "texts": list(questions.texts),
        "conversations": list(questions.conversations),
        "tokenizer": questions.tokenizer,
        "sentences": questions.sentences,
        "trust": questions.trust,
        "front": list(questions.front),
    }


def _run_here(work: Path) -> None:
    """The same job in this process."""
    from merge_adapter.verify.outputs import arm

    job = json.loads((work / "job.json").read_text(encoding="utf-8"))
    result: dict[str, Any] = {}
    try:
        arm.work(work, job, result)
    except Exception as error:  # noqa: BLE001 - whatever the foreign model does is the answer
        result |= arm.failure(error)
    (work / "result.json").write_text(json.dumps(result), encoding="utf-8")
