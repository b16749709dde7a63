"""The measured part of docs/performance.md: tables and plots from the results."""

from __future__ import annotations

from pathlib import Path

from benchmarks.measure import Samples
from benchmarks.results import Results, Row
from benchmarks.rows import AIMED, COPY, GATED, MERGE, PEFT, TORCH, WEIGHED

BEGIN, END = "<!-- measured -->", "<!-- /measured -->"
STARTUP = "start-up"
"""The row of imports."""


def table(rows: dict[str, Row]) -> str:
    """One line per row and way, ratios last."""
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
            spread = f"{one.seconds:.1f}"
            if len(one.wall) > 1:
                spread += f" ({min(one.wall):.1f} to {max(one.wall):.1f})"
            lines.append(
                f"| {row} | {name} | {spread} | {one.cpu_seconds:.1f} | {one.bytes / 1e6:.0f} MB "
                f"| {' | '.join(ratios)} |"
            )
    return "\n".join(lines)


def aims(results: Results) -> str:
    """Each aim beside what was measured, met or not; "" where the rows are missing."""
    ways = results.rows.get(AIMED, {})
    lines = ["| aim, LoRA at 1.1B | at most | measured | |", "|---|---|---|---|"]

    def add(what: str, most: float, value: float | None) -> None:
        if value is not None:
            lines.append(f"| {what} | {most:.2f} | {value:.2f} | {'met' if value <= most else 'missed'} |")

    add("merge without the gate, time / PEFT", 0.20, _of(ways, MERGE, PEFT, "seconds"))
    add("merge without the gate, memory / PEFT", 0.30, _of(ways, MERGE, PEFT, "bytes"))
    add("merge without the gate and without importing torch, time / cp", 3.0, _net(results))
    add("merge with the gate without its outputs, time / PEFT", 0.6, _of(ways, WEIGHED, PEFT, "seconds"))
    add("merge with the whole gate, time / PEFT", 2.0, _of(ways, GATED, PEFT, "seconds"))
    small, large = results.rows.get("0.1B", {}), results.rows.get("3B", {})
    if MERGE in small and MERGE in large:
        add("memory of a merge at 3B / at 0.1B", 1.15, large[MERGE].bytes / small[MERGE].bytes)
    return "\n".join(lines) if len(lines) > 2 else ""


def page(results: Results) -> str:
    """The text between the markers."""
    rows = results.models()
    dates = sorted({results.measured[name] for name in rows})
    lines = [
        f"Measured on {', '.join(dates)} with {results.machine}. Whole processes, imports included; medians of several "
        "rounds run in turn with their range, or one round where none is given; peak memory is that of the largest "
        "process.",
        "",
        aims(results),
        "",
        "![Seconds of each way on each model](performance/time.svg)",
        "",
        "![Peak memory of each way on each model](performance/memory.svg)",
        "",
        table(rows),
    ]
    startup = results.rows.get(STARTUP)
    if startup:
        lines += [
            "",
            "Start-up alone:",
            "",
            "| | seconds | peak memory |",
            "|---|---|---|",
            *(
                f"| `{name}` | {one.seconds:.2f} | {one.bytes / 1e6:.0f} MB |"
                for name, one in startup.items()
            ),
        ]
    return "\n".join(lines)


def replace_measured(document: Path, text: str) -> None:
    """Put `text` between the markers of `document`; what people wrote around them stays."""
    page = document.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN, 1)
    _, after = rest.split(END, 1)
    document.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")


def _net(results: Results) -> float | None:
    """Time of the merge less that of importing torch, over `cp`."""
    ways, startup = results.rows.get(AIMED, {}), results.rows.get(STARTUP, {})
    if not {MERGE, COPY} <= ways.keys() or TORCH not in startup:
        return None
    return (ways[MERGE].seconds - startup[TORCH].seconds) / ways[COPY].seconds


def _of(ways: dict[str, Samples], way: str, to: str, figure: str) -> float | None:
    if way not in ways or to not in ways:
        return None
    return float(getattr(ways[way], figure) / getattr(ways[to], figure))


def _ratio(value: float, ways: dict[str, Samples], to: str, figure: str) -> str:
    return f"{value / getattr(ways[to], figure):.2f}" if to in ways else ""
