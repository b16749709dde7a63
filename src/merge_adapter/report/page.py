"""merge_report.html: the report for a person, in one file that asks nothing of the network."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from merge_adapter.report.charts import STYLE, histogram_svg, tensors_svg
from merge_adapter.report.evidence import text_columns, verdict_rows
from merge_adapter.report.printable import markup
from merge_adapter.types import FileOrigin, OutputFile

TENSOR_ROWS = 300
"""Rows of the per-tensor table; wrong tensors first. merge_report.json holds all."""

_CSS = """
:root{color-scheme:light dark;--bg:#fff;--ink:#1f2328;--dim:#59636e;--line:#d1d9e0;--noise:#8c959f;--error:#0969da;
--effect:#bc4c00;--pass:#1a7f37;--fail:#cf222e;--inconclusive:#9a6700}
@media (prefers-color-scheme:dark){:root{--bg:#0d1117;--ink:#e6edf3;--dim:#9198a1;--line:#3d444d;--noise:#6e7681;
--error:#4493f8;--effect:#f0883e;--pass:#3fb950;--fail:#f85149;--inconclusive:#d29922}}
body{background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;
padding:0 1rem}
table{border-collapse:collapse;width:100%;margin:.5rem 0 1.5rem}
th,td{border-bottom:1px solid var(--line);padding:.3rem .6rem;text-align:left;vertical-align:top}
th{color:var(--dim);font-weight:500}td.n{font-variant-numeric:tabular-nums;white-space:nowrap}
h1{font-size:1.5rem}h2{font-size:1.1rem;margin-top:2rem}code{font-size:.9em}
.pass{color:var(--pass)}.fail{color:var(--fail)}.inconclusive{color:var(--inconclusive)}.dim{color:var(--dim)}
svg{max-width:100%;height:auto}pre{white-space:pre-wrap;overflow-wrap:anywhere;margin:0;font-size:.85em}
div.scroll{overflow-x:auto}li,body>table td:last-child{overflow-wrap:anywhere}
@media (max-width:40rem){.scroll svg{max-width:none;min-width:34rem}.scroll table.texts{min-width:34rem}}
"""


def write_page(path: Path, report: Mapping[str, Any]) -> OutputFile:
    """Write the page for `report` (merge_report.json as parsed) and say what was written."""
    content = page(report).encode()
    path.write_bytes(content)
    return OutputFile(path.name, len(content), hashlib.sha256(content).hexdigest(), FileOrigin.WRITTEN)


def page(report: Mapping[str, Any]) -> str:
    """The page as HTML. Everything from the report is escaped; a policy in the head forbids scripts and requests."""
    verification = report.get("verification", {"verdict": "inconclusive", "reasons": []})
    verdict = markup(str(verification["verdict"]))
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'; style-src 'unsafe-inline'\">",
        "<meta name='viewport' content='width=device-width'>",
        f"<title>merge report: {verdict}</title><style>{_CSS}{STYLE}</style></head><body>",
        f"<h1>Equivalence: <span class='{verdict}'>{verdict}</span></h1>",
        *_sources(report),
        *_verdict(verification),
        *_plots(verification),
        *_texts(verification.get("greedy", {})),
        *_mutants(verification.get("mutants", ())),
        *_tensors(verification.get("weights", {}).get("per_tensor", ())),
        "</body></html>\n",
    ]
    return "\n".join(parts)


def _sources(report: Mapping[str, Any]) -> Iterator[str]:
    rows = []
    for name in ("adapter", "base", "tokenizer"):
        entry = report.get(name)
        if isinstance(entry, Mapping):
            revision = (
                f" at <code>{markup(str(entry['revision'])[:12])}</code>" if entry.get("revision") else ""
            )
            rows.append(
                f"<tr><th>{name}</th><td>{markup(str(entry.get('id') or 'a local folder'))}{revision}</td></tr>"
            )
    tool = report.get("tool", {})
    if tool:
        words = ", ".join(
            f"{markup(str(key))} {markup(str(value))}" for key, value in tool.items() if key != "name"
        )
        rows.append(f"<tr><th>made with</th><td>{words}</td></tr>")
    if rows:
        yield f"<table>{''.join(rows)}</table>"


def _verdict(verification: Mapping[str, Any]) -> Iterator[str]:
    rows = [
        f"<tr><td>{markup(row.check)}</td><td class='{row.result.value}'>{row.result.value}</td>"
        f"<td>{markup(row.evidence)}</td></tr>"
        for row in verdict_rows(verification)
    ]
    if rows:
        yield f"<table><tr><th>check</th><th>result</th><th>evidence</th></tr>{''.join(rows)}</table>"
    reasons = list(verification.get("reasons", ()))
    shown = "".join(f"<li>{markup(str(reason))}</li>" for reason in reasons[:50])
    more = f"<li class='dim'>and {len(reasons) - 50} more</li>" if len(reasons) > 50 else ""
    yield f"<ul>{shown}{more}</ul>"


def _plots(verification: Mapping[str, Any]) -> Iterator[str]:
    outputs = verification.get("outputs", {})
    plot = histogram_svg(outputs.get("histogram", {}), str(outputs.get("metric", "")))
    if plot:
        yield "<h2>Outputs: how far from base + adapter</h2>"
        yield "<p class='dim'>The merged model should lie on the rounding noise, and both left of the base.</p>"
        yield f"<div class='scroll'>{plot}</div>"
    plot = tensors_svg(verification.get("weights", {}).get("per_tensor", ()))
    if plot:
        yield "<h2>Weights: how much of the update each tensor carries</h2>"
        yield f"<div class='scroll'>{plot}</div>"


def _texts(greedy: Mapping[str, Any]) -> Iterator[str]:
    texts = greedy.get("texts", ())
    if not texts:
        return
    yield "<h2>Greedy text side by side</h2><div class='scroll'><table class='texts'>"
    columns = text_columns(texts)
    yield "<tr>" + "".join(f"<th>{heading}</th>" for heading in columns.values()) + "</tr>"
    for row in texts:
        cells = [row.get(name, "") for name in columns]
        yield "<tr>" + "".join(f"<td><pre>{markup(str(cell)[:1000])}</pre></td>" for cell in cells) + "</tr>"
        if "gap" in row:
            why = "within the rounding noise" if row["explained"] else "more than the rounding noise"
            text = f"differs after {row['equal_tokens']} tokens; the choice there hung on {row['gap']} logits, {why}"
            yield f"<tr><td colspan='{len(columns)}' class='dim'>{markup(text)} ({row['noise']})</td></tr>"
    yield "</table></div>"


def _mutants(mutants: Any) -> Iterator[str]:
    if not mutants:
        return
    yield "<h2>Faults injected into this gate</h2><table><tr><th>fault</th><th>caught by</th></tr>"
    for entry in mutants:
        caught = ", ".join(entry["caught_by"]) or "nothing"
        css = "pass" if entry["caught_by"] else "inconclusive"
        yield f"<tr><td>{markup(str(entry['fault']))}</td><td class='{css}'>{markup(caught)}</td></tr>"
    yield "</table>"


def _tensors(rows: Any) -> Iterator[str]:
    if not rows:
        return
    ordered = sorted(rows, key=lambda row: row["agreement"] != "wrong")
    yield "<h2>Tensors</h2><div class='scroll'><table>"
    yield (
        "<tr><th>tensor</th><th>agreement</th><th>alpha-hat</th><th>retained</th><th>|D|/|W|</th>"
        "<th>worst error / tolerance</th><th>diagnosis</th></tr>"
    )
    for row in ordered[:TENSOR_ROWS]:
        css = "fail" if row["agreement"] == "wrong" else "dim"
        numbers = "".join(
            f"<td class='n'>{_number(row.get(key))}</td>"
            for key in ("alpha", "retained", "effect", "worst_error")
        )
        yield (
            f"<tr><td><code>{markup(str(row['name']))}</code></td>"
            f"<td class='{css}'>{markup(str(row['agreement']))}</td>"
            f"{numbers}<td>{markup(str(row.get('diagnosis', '')))}</td></tr>"
        )
    yield "</table></div>"
    if len(ordered) > TENSOR_ROWS:
        yield f"<p class='dim'>{len(ordered) - TENSOR_ROWS:,} more tensors in merge_report.json.</p>"


def _number(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, int | float) else ""
