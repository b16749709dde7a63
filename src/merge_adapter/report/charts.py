"""Plots as SVG text: no library, no script, no request. Colours come from CSS variables, light and dark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from merge_adapter.report.printable import markup

WIDTH, HEIGHT = 640, 260
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 34, 34
MOST_POINTS = 400
"""Points of a per-tensor plot; a larger model is thinned, its extremes kept."""

STYLE = (
    ".ma-bg{fill:var(--bg,#fff)}.ma-t{fill:var(--ink,#1f2328);font:12px system-ui,sans-serif}"
    ".ma-d{fill:var(--dim,#59636e);font:11px system-ui,sans-serif}.ma-g{stroke:var(--line,#d1d9e0);stroke-width:1}"
    ".ma-noise{fill:var(--noise,#8c959f)}.ma-error{fill:var(--error,#0969da)}.ma-effect{fill:var(--effect,#bc4c00)}"
    ".ma-pass{fill:#1a7f37}.ma-fail{fill:#cf222e}.ma-inconclusive{fill:#9a6700}"
    "@media (prefers-color-scheme:dark){.ma-bg{fill:var(--bg,#0d1117)}.ma-t{fill:var(--ink,#e6edf3)}"
    ".ma-d{fill:var(--dim,#9198a1)}.ma-g{stroke:var(--line,#3d444d)}.ma-noise{fill:var(--noise,#6e7681)}"
    ".ma-error{fill:var(--error,#4493f8)}.ma-effect{fill:var(--effect,#f0883e)}}"
)


def histogram_svg(section: Mapping[str, Any], metric: str) -> str:
    """Noise, error and effect over a logarithmic axis; "" without data or axis. `section`: `outputs.histogram`."""
    counts = section.get("counts") if section else None
    if not counts:
        return ""
    low, high = section["log10_low"], section["log10_high"]
    if high <= low:  # a report of somebody else's: the gate's own axis has a length
        return ""
    inner_width, inner_height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    shapes: list[str] = []
    for name, opacity in (("effect", 0.55), ("noise", 0.75), ("error", 0.75)):
        values = counts.get(name, [])
        # each sample to its own height: the arms read different numbers of tokens
        tallest = max(values, default=0) or 1
        step = inner_width / max(1, len(values))
        for at, value in enumerate(values):
            if value:
                tall = value / tallest * inner_height
                x, y = LEFT + at * step, TOP + inner_height - tall
                shapes.append(
                    f'<rect class="ma-{name}" fill-opacity="{opacity}" x="{x:.1f}" y="{y:.1f}" '
                    f'width="{step:.1f}" height="{tall:.1f}"/>'
                )
    ticks = []
    for exponent in range(low, high + 1, max(1, (high - low) // 8)):
        x = LEFT + (exponent - low) / (high - low) * inner_width
        ticks.append(
            f'<text class="ma-d" text-anchor="middle" x="{x:.1f}" y="{HEIGHT - 18}">1e{exponent}</text>'
        )
    label = f'<text class="ma-d" x="{LEFT}" y="{HEIGHT - 4}">{markup(metric)}</text>'
    legend = _legend(
        (("noise", "rounding noise"), ("error", "merged"), ("effect", "base (effect of the adapter)"))
    )
    return _frame("".join(shapes) + "".join(ticks) + label + legend + _axis(), "Distance from base + adapter")


def tensors_svg(rows: Sequence[Mapping[str, Any]]) -> str:
    """Alpha-hat and retained share over the tensors in the model's order; "" without updates."""
    updates = [row for row in rows if row.get("alpha") is not None]
    if not updates:
        return ""
    points = _thinned(updates)
    values = [float(row["alpha"]) for row in points] + [float(row.get("retained", 1.0)) for row in points]
    low, high = min(0.0, *values), max(1.1, *values)
    inner_width, inner_height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def place(value: float) -> float:
        return TOP + (high - value) / (high - low) * inner_height

    shapes = []
    for mark in (0.0, 1.0):
        y = place(mark)
        shapes.append(f'<line class="ma-g" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        shapes.append(f'<text class="ma-d" text-anchor="end" x="{LEFT - 6}" y="{y + 4:.1f}">{mark:g}</text>')
    for at, row in enumerate(points):
        x = LEFT + (at + 0.5) / len(points) * inner_width
        name = markup(str(row["name"]))
        retained = place(row.get("retained", 1.0))
        shapes.append(f'<circle class="ma-noise" r="3.5" cx="{x:.1f}" cy="{retained:.1f}"/>')
        title = f"<title>{name}: {row['alpha']:.4g}</title>" if len(points) <= 150 else ""
        shapes.append(
            f'<circle class="ma-error" r="2" cx="{x:.1f}" cy="{place(row["alpha"]):.1f}">{title}</circle>'
        )
    legend = _legend((("error", "alpha-hat (1: whole update)"), ("noise", "share the dtype can hold")))
    label = f'<text class="ma-d" x="{LEFT}" y="{HEIGHT - 4}">{len(updates):,} updated tensors, first to last</text>'
    return _frame("".join(shapes) + label + legend, "Strength of the update per tensor")


def _thinned(rows: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """At most MOST_POINTS rows: of each run of neighbours the one farthest from a full update."""
    if len(rows) <= MOST_POINTS:
        return rows
    size = -(-len(rows) // MOST_POINTS)
    runs = (rows[at : at + size] for at in range(0, len(rows), size))
    return [max(run, key=lambda row: abs(row["alpha"] - 1)) for run in runs]


def picture(verification: Mapping[str, Any], rows: Sequence[tuple[str, str, str]]) -> str:
    """One standalone SVG for a comment: verdict, the table's rows, and the histogram. `rows`: (check, result, text)."""
    verdict = str(verification["verdict"])
    parts = [
        f'<text class="ma-t" style="font-size:16px;font-weight:600" x="16" y="28">Equivalence: '
        f'<tspan class="ma-{verdict}" style="font-weight:700">{markup(verdict)}</tspan></text>'
    ]
    y = 54
    for check, result, text in rows:
        parts.append(f'<circle class="ma-{markup(result)}" r="5" cx="22" cy="{y - 4}"/>')
        parts.append(f'<text class="ma-t" x="36" y="{y}">{markup(check)}</text>')
        parts.append(f'<text class="ma-d" x="140" y="{y}">{markup(_cut(text, 92))}</text>')
        y += 22
    outputs = verification.get("outputs", {})
    plot = histogram_svg(outputs.get("histogram", {}), str(outputs.get("metric", "")))
    if plot:
        inner = plot[plot.index(">") + 1 : plot.rindex("</svg>")]
        parts.append(f'<g transform="translate(8 {y})">{inner}</g>')
        y += HEIGHT
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 680 {y + 10}" width="680" height="{y + 10}" role="img" '
        f'aria-label="Equivalence: {markup(verdict)}"><style>{STYLE}</style>'
        f'<rect class="ma-bg" width="680" height="{y + 10}" rx="6"/>{"".join(parts)}</svg>'
    )


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _legend(entries: Sequence[tuple[str, str]]) -> str:
    """One row above the plot, so that it covers no data. Text cannot be measured here; 6 units a letter is ample."""
    parts, x = [], LEFT
    for name, words in entries:
        parts.append(f'<rect class="ma-{name}" x="{x}" y="6" width="10" height="10"/>')
        parts.append(f'<text class="ma-d" x="{x + 15}" y="15">{markup(words)}</text>')
        x += 15 + 6 * len(words) + 22
    return "".join(parts)


def _axis() -> str:
    y = HEIGHT - BOTTOM
    return f'<line class="ma-g" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>'


def _frame(inner: str, label: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img" '
        f'aria-label="{markup(label)}">{inner}</svg>'
    )
