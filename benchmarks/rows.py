"""What is measured: the rows (a model and an adapter each) and the ways to merge them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from benchmarks.measure import Command

AIMED = "1.1B"
"""The row whose ratios the aims are about; start-up is measured in its run."""
LIMITED = "8B in 4 GB"
"""A checkpoint of 16 GB, a sparse file, merged by processes that may hold 4 GB, page cache included."""
ROWS = ("0.1B", "1.1B", "3B", "1.1B r=256", "1.1B DoRA", "0.1B LoHa", "0.2B MoE", LIMITED)
"""LoRA of rank 16 on every linear layer unless the name says otherwise."""
COPY = "cp -r"
MERGE = "merge --no-verify"
WEIGHED = "merge, gate without outputs"
GATED = "merge"
PEFT = "PEFT"
TORCH = "import torch"
WAYS = (COPY, MERGE, WEIGHED, GATED, PEFT)


def memory_limit(row: str) -> int | None:
    """Bytes that a command of the row may hold."""
    return 4 << 30 if row == LIMITED else None


def files(row: str, work: Path) -> tuple[Path, Path]:
    """Base and adapter of a row, both in one folder of its own.

    A process of its own makes them: a command inherits as its peak what the process that starts it has held.
    """
    folder = work / row.replace(" ", "-").replace("=", "")
    subprocess.run([sys.executable, "-m", "benchmarks.models", row, str(folder)], check=True)
    return folder / "base", folder / "adapter"


def ways(row: str, base: Path, adapter: Path, chosen: list[str]) -> list[Command]:
    """The commands that do the same job on the same files; under the limit of memory those that can."""
    if row == LIMITED:
        chosen = [way for way in chosen if way in (MERGE, WEIGHED)]
    tool = (sys.executable, "-m", "merge_adapter", "merge", str(adapter), "--output", "{out}", "--quiet")
    every = [
        Command(COPY, ("cp", "-r", str(base), "{out}")),
        Command(MERGE, (*tool, "--no-verify")),
        Command(WEIGHED, (sys.executable, "-m", "benchmarks.weighed_merge", str(adapter), "{out}")),
        Command(GATED, tool),
        Command(PEFT, (sys.executable, "-m", "benchmarks.peft_merge", str(base), str(adapter), "{out}")),
    ]
    return [way for way in every if way.name in chosen]


def imports() -> list[Command]:
    """Start-up alone, which every way pays."""
    return [
        Command("python", (sys.executable, "-c", "pass")),
        Command(TORCH, (sys.executable, "-c", "import torch")),
        Command(
            "import peft, transformers", (sys.executable, "-c", "import peft, transformers.modeling_utils")
        ),
        Command("merge-adapter --help", (sys.executable, "-m", "merge_adapter", "--help")),
    ]
