"""The merged model's process, started before it is asked."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from merge_adapter.errors import StorageError
from merge_adapter.types import Verdict
from merge_adapter.verify.findings import verdict as judged
from merge_adapter.verify.outputs.arm import failure
from merge_adapter.verify.outputs.process import Died, OwnProcess, Stopped
from merge_adapter.verify.outputs.separate import Merged


def job(own: OwnProcess, **fields: object) -> None:
    """A job that looks at a tokenizer that is not there."""
    texts = {"merged": str(own.folder), "texts": [], "conversations": [], "tokenizer": False, "trust": False}
    common = {
        "kind": "causal-lm",
        "dtype": "float32",
        "device": "cpu",
        "threads": 1,
        "sentences": False,
        "front": [],
    }
    (own.folder / "job.json").write_text(json.dumps({**texts, **common, "cuts": [], "classes": 1, **fields}))


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_one_that_is_never_asked_is_gone_with_its_folder() -> None:
    """Whatever it was doing."""
    with OwnProcess() as own:
        number, folder = own._process.pid, own.folder
        assert folder.is_dir()
    assert not alive(number)
    assert not folder.exists()


def test_one_that_cannot_do_its_job_says_why() -> None:
    """Inputs are missing: the answer is an error, not a crash."""
    with OwnProcess() as own:
        job(own)
        own.ask(300)
        result = json.loads((own.folder / "result.json").read_text())
    assert "inputs.safetensors" in result["error"]


def test_one_that_dies_is_reported_with_its_last_word() -> None:
    """No job is there to be read."""
    with OwnProcess() as own, pytest.raises(Died, match=r"ended with status 1: .*job\.json"):
        own.ask(300)


def test_one_that_is_killed_says_nothing_of_the_model() -> None:
    """As a system does that runs out of memory: the verdict stays open."""
    with OwnProcess() as own:
        own._process.kill()
        with pytest.raises(Stopped, match="signal 9"):
            own.ask(300)


@pytest.mark.parametrize(
    ("error", "where"),
    [
        (ValueError("no such layer"), "error"),
        (MemoryError(), "stopped"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes."),
            "stopped",
        ),
        (StorageError("the disk is full"), "stopped"),
    ],
)
def test_a_machine_too_small_is_no_fault_of_the_model(error: Exception, where: str) -> None:
    """What ends the merged model's own process is told apart."""
    assert list(failure(error)) == [where]


@pytest.mark.parametrize(
    ("merged", "verdict"),
    [
        (Merged(error="KeyError: no such layer"), Verdict.FAIL),
        (Merged(stopped="no answer within 1 s"), Verdict.INCONCLUSIVE),
    ],
)
def test_what_was_not_heard_is_judged_by_why(merged: Merged, verdict: Verdict) -> None:
    """A broken model fails; one that was stopped is undecided."""
    finding = merged.unheard()
    assert finding is not None
    assert judged([finding]) is verdict


def test_one_that_takes_too_long_is_stopped(tmp_path: Path) -> None:
    """The model waits for ever: a pipe that nobody writes to stands in its place."""
    os.mkfifo(tmp_path / "inputs.safetensors")
    with OwnProcess() as own:
        job(own)
        (own.folder / "inputs.safetensors").symlink_to(tmp_path / "inputs.safetensors")
        number = own._process.pid
        with pytest.raises(Stopped, match="no answer within"):
            own.ask(0.1)
    assert not alive(number)


@pytest.mark.parametrize("depth", [0, 1])
def test_errors_of_libraries_are_one_line_with_their_cause(depth: int) -> None:
    """Lines joined, the first cause beside the last words, and no end to the text cut off unsaid."""
    from merge_adapter.verify.models.loading import LONGEST_CAUSE, one_line

    error: Exception = ValueError("first\n  cause")
    if depth:
        outer = RuntimeError("cannot\nload")
        outer.__cause__ = error
        error = outer
    assert one_line(error) == ("cannot load (first cause)" if depth else "first cause")
    assert one_line(KeyError()) == "KeyError"
    assert len(one_line(ValueError("x" * 1000))) == LONGEST_CAUSE
    assert one_line(ValueError("x" * 1000)).endswith("…")
