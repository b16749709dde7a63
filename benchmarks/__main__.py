"""`python -m benchmarks`: run every row, print the table, write docs/performance.md.

The text of docs/performance.md between its markers is replaced; what people wrote around it stays.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from benchmarks.measure import Command, Samples, interleaved

DOCUMENT = Path(__file__).parent.parent / "docs" / "performance.md"
BEGIN, END = "<!-- measured -->", "<!-- /measured -->"
COPY, MERGE, GATED, PEFT = "cp -r", "merge --no-verify", "merge", "PEFT"


def main() -> None:
    options = _options()
    if options.work.exists() and not options.keep:
        shutil.rmtree(options.work)
    options.work.mkdir(parents=True, exist_ok=True)
    rows: dict[str, dict[str, Samples]] = {}
    with tempfile.TemporaryDirectory(dir=options.work) as scratch:
        imports = interleaved(_imports(), Path(scratch), rounds=options.rounds)
        for name in options.rows:
            base, adapter = _files(name, options.work)
            rows[name] = interleaved(_ways(base, adapter, options.ways), Path(scratch), rounds=options.rounds)
            print(_table({name: rows[name]}), flush=True)
            if not options.keep:
                shutil.rmtree(base.parent)
    text = _page(rows, imports, options.rounds)
    print(text)
    if options.write:
        _replace(text)
    if not options.keep:
        shutil.rmtree(options.work)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    every = ["0.1B", "1.1B", "3B", "1.1B r=256", "1.1B DoRA", "0.1B LoHa", "0.2B MoE"]
    parser.add_argument("--rows", nargs="*", default=every, choices=every)
    parser.add_argument("--ways", nargs="*", default=[COPY, MERGE, GATED, PEFT])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "merge-adapter-bench")
    parser.add_argument("--keep", action="store_true", help="keep and reuse the models made")
    parser.add_argument("--write", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args()


def _files(row: str, work: Path) -> tuple[Path, Path]:
    """Base and adapter of a row, both in one folder of its own.

    A process of its own makes them: a command inherits as its peak what the process that starts it has held.
    """
    folder = work / row.replace(" ", "-").replace("=", "")
    subprocess.run([sys.executable, "-m", "benchmarks.models", row, str(folder)], check=True)
    return folder / "base", folder / "adapter"


def _ways(base: Path, adapter: Path, chosen: list[str]) -> list[Command]:
    tool = (sys.executable, "-m", "merge_adapter", "merge", str(adapter), "--output", "{out}", "--quiet")
    ways = [
        Command(COPY, ("cp", "-r", str(base), "{out}")),
        Command(MERGE, (*tool, "--no-verify")),
        Command(GATED, tool),
        Command(PEFT, (sys.executable, "-m", "benchmarks.peft_merge", str(base), str(adapter), "{out}")),
    ]
    return [way for way in ways if way.name in chosen]


def _imports() -> list[Command]:
    return [
        Command("python", (sys.executable, "-c", "pass")),
        Command("import torch", (sys.executable, "-c", "import torch")),
        Command(
            "import peft, transformers", (sys.executable, "-c", "import peft, transformers.modeling_utils")
        ),
        Command("merge-adapter --help", (sys.executable, "-m", "merge_adapter", "--help")),
    ]


def _page(rows: dict[str, dict[str, Samples]], imports: dict[str, Samples], rounds: int) -> str:
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))
    lines = [
        f"Measured {datetime.now(UTC):%Y-%m-%d} on {os.cpu_count()} cores of {_processor()}, Linux "
        f"{platform.release().split('-')[0]}, Python {platform.python_version()}, {packages}. Whole processes, imports "
        f"included, medians of {rounds} rounds run in turn; peak memory is that of the largest process.",
        "",
        _table(rows),
        "",
        "Start-up alone:",
        "",
        "| | seconds | peak memory |",
        "|---|---|---|",
        *(f"| `{name}` | {one.seconds:.2f} | {one.bytes / 1e6:.0f} MB |" for name, one in imports.items()),
    ]
    return "\n".join(lines)


def _table(rows: dict[str, dict[str, Samples]]) -> str:
    lines = [
        "| model | way | seconds (min to max) | CPU s | peak memory | time / PEFT | memory / PEFT | time / cp |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row, ways in rows.items():
        for name, one in ways.items():
            ratios = [
                _ratio(one.seconds, ways, PEFT, "seconds"),
                _ratio(one.bytes, ways, PEFT, "bytes"),
                _ratio(one.seconds, ways, COPY, "seconds"),
            ]
            spread = f"{one.seconds:.1f} ({min(one.wall):.1f} to {max(one.wall):.1f})"
            lines.append(
                f"| {row} | {name} | {spread} | {sorted(one.cpu)[len(one.cpu) // 2]:.1f} "
                f"| {one.bytes / 1e6:.0f} MB | {' | '.join(ratios)} |"
            )
    return "\n".join(lines)


def _ratio(value: float, ways: dict[str, Samples], to: str, figure: str) -> str:
    return f"{value / getattr(ways[to], figure):.2f}" if to in ways else ""


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def _replace(text: str) -> None:
    page = DOCUMENT.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN, 1)
    _, after = rest.split(END, 1)
    DOCUMENT.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
