"""The plots of docs/performance.md, as SVG: `python -m benchmarks.plots FIGURES FOLDER`.

A process of its own draws them: what the benchmark itself holds would count as the peak of every command it starts.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks.results import Results, Row
from benchmarks.rows import COPY, GATED, MERGE, PEFT, WEIGHED

_COLOURS = {COPY: "#8c959f", MERGE: "#0969da", WEIGHED: "#54aeff", GATED: "#1a7f37", PEFT: "#bc4c00"}


def draw(rows: dict[str, Row], folder: Path) -> None:
    """time.svg and memory.svg in `folder`: a group of bars for each model, a bar for each way."""
    mpl.rcParams["svg.hashsalt"] = "merge-adapter"  # the same figures give the same file
    for name, label, figure, unit in (
        ("time", "seconds, whole process (logarithmic)", "seconds", 1.0),
        ("memory", "peak memory in MB (logarithmic)", "bytes", 1e6),
    ):
        drawing = _bars(
            label,
            {
                row: {way: getattr(samples, figure) / unit for way, samples in ways.items()}
                for row, ways in rows.items()
            },
        )
        folder.mkdir(parents=True, exist_ok=True)
        drawing.savefig(folder / f"{name}.svg", metadata={"Date": None})


def _bars(label: str, values: dict[str, dict[str, float]]) -> Figure:
    present = [way for way in _COLOURS if any(way in ways for ways in values.values())]
    height = 0.8 / max(1, len(present))
    figure = Figure(figsize=(8, 0.55 + 0.24 * len(values) * (len(present) + 1)), layout="constrained")
    axes = figure.add_subplot()
    for place, way in enumerate(present):
        at = [group + place * height for group, ways in enumerate(values.values()) if way in ways]
        long = [ways[way] for ways in values.values() if way in ways]
        bars = axes.barh(at, long, height, label=way, color=_COLOURS[way])
        axes.bar_label(bars, fmt="%.3g", padding=3, fontsize=8)
    axes.set_yticks([group + 0.4 - height / 2 for group in range(len(values))], list(values))
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.margins(x=0.12)
    axes.set_xlabel(label)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper left", ncols=len(present), frameon=False, fontsize=8)
    return figure


if __name__ == "__main__":
    draw(Results.load(Path(sys.argv[1])).models(), Path(sys.argv[2]))
