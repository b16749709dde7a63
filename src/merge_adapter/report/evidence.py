"""The verdict's evidence as one table: rows for the terminal, Markdown for cards, pull requests and job summaries.

Works on the section `verification` of merge_report.json, so that a report read back shows the same table. Whatever
came from an adapter (names, texts) is escaped where it is shown.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merge_adapter.report.printable import printable
from merge_adapter.types import Verdict

REASONS_SHOWN = 12
"""Reasons in Markdown; the report holds them all."""

_ICONS = {Verdict.PASS: "✅", Verdict.FAIL: "❌", Verdict.INCONCLUSIVE: "❔"}


@dataclass(frozen=True)
class Row:
    """One line of the table. Plain text; whoever shows it escapes it."""

    check: str
    result: Verdict
    evidence: str


def verdict_rows(verification: Mapping[str, Any]) -> tuple[Row, ...]:
    """One row per part of the gate that ran."""
    return tuple(_rows(verification))


def verdict_markdown(verification: Mapping[str, Any]) -> str:
    """Verdict, table and reasons as GitHub and Hub Markdown."""
    verdict = Verdict(verification["verdict"])
    return f"**Equivalence: {_ICONS[verdict]} {verdict.value}**\n\n{evidence_markdown(verification)}"


def evidence_markdown(verification: Mapping[str, Any]) -> str:
    """Table and reasons, for a place whose heading is the verdict."""
    lines: list[str] = []
    rows = verdict_rows(verification)
    if rows:
        lines += ["| check | result | evidence |", "|---|---|---|"]
        lines += [
            f"| {escape(r.check)} | {_ICONS[r.result]} {r.result.value} | {escape(r.evidence)} |"
            for r in rows
        ]
        lines.append("")
    reasons = list(verification.get("reasons", ()))
    lines += [f"- {escape(str(reason))}" for reason in reasons[:REASONS_SHOWN]]
    if len(reasons) > REASONS_SHOWN:
        lines.append(f"- and {len(reasons) - REASONS_SHOWN} more in `merge_report.json`")
    lines += ["", *_greedy_markdown(verification.get("greedy", {}))]
    return "\n".join(lines).rstrip() + "\n"


def escape(text: str) -> str:
    """`text` as literal Markdown in one table cell: no links, images, mentions, HTML or new lines."""
    flat = printable(re.sub(r"\s+", " ", text).strip())
    flat = flat.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    # a word joiner keeps @name and #1 from becoming a mention or a reference
    flat = re.sub(r"([@#])(?=\w)", "\\1\u2060", flat)
    flat = re.sub(r"(?i)\b(https?|ftp)://", "\\1:\u2060//", flat)
    flat = re.sub(r"(?i)\bwww\.", "www\u2060.", flat)
    # at the start of a line of a list, # makes a heading, and + and - another list
    return re.sub(r"([\\`*_\[\]()|!~$]|^[#+-])", r"\\\1", flat)


def _rows(verification: Mapping[str, Any]) -> Iterator[Row]:
    for name, build in (
        ("files", _files),
        ("weights", _weights),
        ("modules", _modules),
        ("outputs", _outputs),
        ("greedy", _greedy),
        ("tokenizer", _tokenizer),
    ):
        section = verification.get(name)
        if isinstance(section, Mapping) and section:
            yield build(section)
    mutants = verification.get("mutants")
    if mutants:
        caught = sum(bool(entry["caught_by"]) for entry in mutants)
        result = Verdict.PASS if caught == len(mutants) else Verdict.INCONCLUSIVE
        yield Row("injected faults", result, f"{caught} of {len(mutants)} caught by this gate")


def _result(section: Mapping[str, Any]) -> Verdict:
    return Verdict(section.get("verdict", Verdict.PASS))


def _files(section: Mapping[str, Any]) -> Row:
    dtypes = ", ".join(section.get("dtypes", ()))
    size = section.get("bytes", 0)
    return Row("files", _result(section), f"{section.get('tensors', 0)} tensors, {size:,} bytes, {dtypes}")


def _weights(section: Mapping[str, Any]) -> Row:
    agreement = section.get("agreement", {})
    total = section.get("tensors", 0)
    wrong = agreement.get("wrong", 0)
    parts = [f"{agreement.get('exact', 0)} of {total} tensors bit for bit the rounded oracle"]
    if agreement.get("rounded"):
        parts.append(f"{agreement['rounded']} within rounding")
    if agreement.get("update cast first"):
        parts.append(f"{agreement['update cast first']} with the update rounded first")
    if agreement.get("base cast first"):
        parts.append(f"{agreement['base cast first']} with the base rounded first")
    if wrong:
        parts.append(f"{wrong} wrong")
    alpha, retained = section.get("alpha"), section.get("retained")
    if alpha:
        parts.append(f"alpha-hat {_span(alpha)}")
    if retained:
        parts.append(f"{retained['median']:.1%} of the update retained")
    return Row("weights", _result(section), "; ".join(parts))


def _span(span: Mapping[str, float]) -> str:
    low, high = f"{span['min']:.3g}", f"{span['max']:.3g}"
    return low if low == high else f"{low} to {high}"


def _modules(section: Mapping[str, Any]) -> Row:
    text = f"{section['within']} of {section['modules']} layers answer within their own rounding error"
    if section.get("worst") is not None:
        text += f"; worst error {section['worst']:.3g} of its bound"
    return Row("modules", _result(section), text)


def _outputs(section: Mapping[str, Any]) -> Row:
    if "error" not in section:
        return Row("outputs", _result(section), "not compared")
    what = "KL" if str(section["metric"]).startswith("KL") else "distance"
    error, noise, effect = section["error"], section["noise"], section["effect"]
    extent = f"{section['tokens']:,} tokens" if section["tokens"] else f"{section['documents']:,} documents"
    text = (
        f"{what} to base + adapter {error['mean']:.2g} (rounding noise {noise['mean']:.2g}, "
        f"effect of the adapter {effect['mean']:.2g}) over {extent}"
    )
    if "label_flips" in section:
        text += f"; {section['label_flips']} labels flipped, {section['label_flips_base']} by the base"
    elif section["kind"] == "embedding":
        text += f"; neighbours kept {section.get('neighbour_overlap', 1.0):.1%}"
    elif section["kind"] == "other":
        text += f"; cosine similarity {error['agreement']:.2%}, base {effect['agreement']:.2%}"
    else:
        text += f"; same first choice {error['agreement']:.2%}, base {effect['agreement']:.2%}"
    return Row("outputs", _result(section), text)


def _greedy(section: Mapping[str, Any]) -> Row:
    unexplained = sum(row.get("explained") is False for row in section.get("texts", ()))
    text = f"{section['equal']} of {section['of']} continuations equal over {section['tokens']} tokens"
    if unexplained:
        text += f"; {unexplained} diverge by more than rounding explains"
    return Row("greedy text", Verdict.INCONCLUSIVE if unexplained else Verdict.PASS, text)


def _tokenizer(section: Mapping[str, Any]) -> Row:
    template = "chat template" if section.get("template") else "no chat template"
    text = f"{section['texts']} texts and {section['conversations']} conversations compared, {template}"
    if section["size"] is None:  # it cannot be loaded
        text = "nothing compared"
    findings = section.get("findings") or []
    return Row("tokenizer", _result(section), f"{text}; {findings[0]}" if findings else text)


def text_columns(texts: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The columns of a table of greedy text: key in a row of the report -> heading."""
    base = {"base": "base"} if any("base" in row for row in texts) else {}
    return {"prompt": "prompt", **base, "reference": "base + adapter", "merged": "merged"}


def _greedy_markdown(section: Mapping[str, Any]) -> Iterator[str]:
    """Two continuations, folded away."""
    texts = list(section.get("texts", ()))[:2]
    if not texts:
        return
    yield "<details><summary>Greedy text side by side</summary>"
    yield ""
    columns = text_columns(texts)
    yield f"| {' | '.join(columns.values())} |"
    yield "|---" * len(columns) + "|"
    for row in texts:
        cells = [row.get(name, "") for name in columns]
        yield "| " + " | ".join(escape(str(cell)[:400]) for cell in cells) + " |"
    yield ""
    yield "</details>"
