"""Pictures that GitHub draws itself, from Mermaid: it shows no inline SVG and no data: URLs.

They hold numbers and words of ours only, never a name that comes from an adapter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

_POINTS = 40
"""Values along an axis; more are averaged, neighbour with neighbour."""
_FLOOR = 1e-12
"""Where a distance of zero is drawn on a logarithmic axis."""


def pictures(verification: Mapping[str, Any]) -> list[str]:
    """Up to two charts: distances document by document, and how much of the update each tensor carries."""
    return [*_distances(verification.get("outputs")), *_retained(verification.get("weights"))]


def _distances(outputs: object) -> list[str]:
    """What the merged model is off by, between the noise floor and what the adapter does at all."""
    if not isinstance(outputs, Mapping) or not isinstance(outputs.get("per_document"), list):
        return []
    names = ("effect", "error", "noise")
    rows = [values for entry in outputs["per_document"] if (values := _numbers(entry, names)) is not None]
    if len(rows) < 2:
        return []
    series = [_thinned([math.log10(max(row[i], _FLOOR)) for row in rows]) for i in range(len(names))]
    chart = _chart("Distance from base + adapter, by document", "log10", series)
    words = (
        "Lines, from the top where all is well: what the adapter changes at all (effect), what the merged model is "
        "off by (error), what rounding alone costs (noise)."
    )
    return [_folded("Outputs, document by document", chart, words)]


def _retained(weights: object) -> list[str]:
    """1.0 where rounding to the stored dtype kept the whole update of a tensor."""
    if not isinstance(weights, Mapping) or not isinstance(weights.get("per_tensor"), list):
        return []
    rows = [
        values for entry in weights["per_tensor"] if (values := _numbers(entry, ("retained",))) is not None
    ]
    if len(rows) < 2:
        return []
    shares = _thinned([row[0] for row in rows])
    chart = _chart("Part of the update that is in the weights", "share", [shares], lowest=0.0)
    return [_folded("Weights, tensor by tensor", chart, "In the order of the checkpoint; 1 is all of it.")]


def _numbers(entry: object, names: tuple[str, ...]) -> tuple[float, ...] | None:
    if not isinstance(entry, Mapping):
        return None
    values = tuple(entry.get(name) for name in names)
    good = all(
        isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        for value in values
    )
    return tuple(float(value) for value in values) if good else None  # type: ignore[arg-type]  # just checked


def _thinned(values: Sequence[float]) -> list[float]:
    step = math.ceil(len(values) / _POINTS)
    return [fmean(values[start : start + step]) for start in range(0, len(values), step)]


def _chart(title: str, axis: str, series: Sequence[Sequence[float]], *, lowest: float | None = None) -> str:
    """Lines over their index. The vertical axis starts at `lowest`, or a little below the smallest value."""
    highest = max(map(max, series))
    margin = (highest - (min(map(min, series)) if lowest is None else lowest)) * 0.05 or 0.05
    bottom = min(map(min, series)) - margin if lowest is None else lowest
    lines = [
        "xychart-beta",
        f'  title "{title}"',
        f"  x-axis 1 --> {len(series[0])}",
        f'  y-axis "{axis}" {bottom:.4g} --> {highest + margin:.4g}',
        *(f"  line [{', '.join(f'{value:.4g}' for value in values)}]" for values in series),
    ]
    return "\n".join(("```mermaid", *lines, "```"))


def _folded(title: str, chart: str, words: str) -> str:
    return f"<details><summary>{title}</summary>\n\n{chart}\n\n{words}\n\n</details>"
