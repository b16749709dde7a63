"""`merge-adapter demo` as a user runs it: the whole job on an embedded Hub."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from merge_adapter.demo import run_demo, story
from merge_adapter.errors import InputError


def test_the_whole_job(tmp_path: Path) -> None:
    """One command pushes, hears the webhook, merges, passes the gate, opens a pull request, and leaves nothing."""
    environment = {**os.environ, "TMPDIR": str(tmp_path), "HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-m", "merge_adapter", "demo"], env=environment, capture_output=True, text=True
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "verdict  PASS" in said
    assert "open, ready to merge" in said
    assert "3 of 3 answers" in said
    assert "unchanged" in said
    assert "merge_report.json" in said
    assert "/demo/pydoc-llama-answers-merged/discussions/1" in said
    assert "Warning" not in said
    left = {path.name for path in tmp_path.iterdir() if not path.name.startswith("torchinductor")}
    assert left == set()  # torch itself leaves an empty cache folder wherever it is imported


def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the packages of the embedded Hub the command says which and how to get them."""
    monkeypatch.setattr(story, "_NEEDED", ("fastapi", "no_such_package"))
    with pytest.raises(InputError, match="no_such_package") as caught:
        run_demo(keep=False, console=Console())
    assert "merge-adapter[demo]" in caught.value.hint
