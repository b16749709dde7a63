"""`python -m benchmarks`: run every row, print the tables, write docs/performance.md.

The text of docs/performance.md between its markers is replaced; what people wrote around it stays. The figures
themselves are kept beside it, so that `--rows` measures some rows again and leaves the others.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.measure import interleaved
from benchmarks.page import STARTUP, page, replace_measured, table
from benchmarks.results import Results
from benchmarks.rows import AIMED, ROWS, WAYS, files, imports, memory_limit, ways

DOCUMENT = Path(__file__).parent.parent / "docs" / "performance.md"
FOLDER = DOCUMENT.with_suffix("")
FIGURES = FOLDER / "measured.json"


def main() -> None:
    options = _options()
    if options.work.exists() and not options.keep:
        shutil.rmtree(options.work)
    options.work.mkdir(parents=True, exist_ok=True)
    results = Results.load(FIGURES)
    with tempfile.TemporaryDirectory(dir=options.work) as scratch:
        for name in options.rows:
            if name == AIMED:
                results.put(STARTUP, interleaved(imports(), Path(scratch), rounds=options.rounds))
            base, adapter = files(name, options.work)
            row = interleaved(
                ways(name, base, adapter, options.ways),
                Path(scratch),
                rounds=options.rounds,
                memory=memory_limit(name),
            )
            print(table({name: row}), flush=True)
            results.put(name, row)
            if options.write:
                _write(results)
            if not options.keep:
                shutil.rmtree(base.parent)
    print(page(results))
    if not options.keep:
        shutil.rmtree(options.work)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--rows", nargs="*", default=ROWS, choices=ROWS)
    parser.add_argument("--ways", nargs="*", default=WAYS, choices=WAYS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "merge-adapter-bench")
    parser.add_argument("--keep", action="store_true", help="keep and reuse the models made")
    parser.add_argument("--write", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args()


def _write(results: Results) -> None:
    """After each row, so that an interrupted run keeps what it measured."""
    results.save(FIGURES)
    subprocess.run([sys.executable, "-m", "benchmarks.plots", str(FIGURES), str(FOLDER)], check=True)
    replace_measured(DOCUMENT, page(results))


if __name__ == "__main__":
    main()
