"""The outcome in Markdown for people: the job's summary, and the same for comments, checks and releases."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from merge_adapter.action.commands import SUMMARY_LIMIT, write_summary
from merge_adapter.action.markdown import code, prose, table
from merge_adapter.action.results import Failed, Finished, Result
from merge_adapter.report.progress import human_seconds
from merge_adapter.sizes import human_bytes
from merge_adapter.types import Verdict

_SIGNS = {
    Verdict.PASS.value: "✅ pass",
    Verdict.FAIL.value: "❌ fail",
    Verdict.INCONCLUSIVE.value: "⚠️ inconclusive",
    "error": "❌ not merged",
}
_LINK = re.compile(r"https?://[\w.:-]+(?:/[\w.~@%+-]+)*/?(?:#[\w-]+)?")
"""What is linked as it stands; anything else is shown as text."""
_REASONS = 12
"""Reasons and notes shown of each; the report has the rest."""


def section(result: Result) -> str:
    """Everything about one adapter."""
    heading = f"### {_SIGNS[result.outcome]}: {code(result.candidate.label)}"
    if isinstance(result, Failed):
        return "\n\n".join((heading, _why(result)))
    parts = [
        heading,
        _facts(result),
        *_reasons(result),
        *_evidence(result),
        *_pictures(result),
        *_notes(result),
    ]
    return "\n\n".join(parts)


def overview(results: Sequence[Result]) -> str:
    """One row for each adapter; for several."""
    rows = [
        (
            code(result.candidate.label),
            _SIGNS[result.outcome],
            _place(result) if isinstance(result, Finished) else prose(result.message),
        )
        for result in results
    ]
    return table(("adapter", "verdict", "where"), rows)


def title(result: Result) -> str:
    """One line of plain text."""
    if isinstance(result, Failed):
        return f"Not merged: {result.message}"
    if result.verdict is Verdict.PASS:
        where = f", {result.publication.operation} {result.publication.repo}" if result.publication else ""
        return f"Equivalent to base + adapter{where}"
    if not result.verified:
        return "Merged, not verified"
    reason = f": {result.reasons[0]}" if result.reasons else ""
    return f"{'Not equivalent' if result.verdict is Verdict.FAIL else 'Equivalence not shown'}{reason}"


def nothing(reason: str) -> str:
    """The summary of a step that had nothing to do."""
    return f"### Nothing to merge\n\n{prose(reason)}"


def failure(message: str, hint: str) -> str:
    """The summary of a step that ended before it merged anything."""
    return "\n\n".join(
        ("### ❌ merge-adapter could not start", prose(message), *([prose(hint)] if hint else []))
    )


def notes(texts: Sequence[str]) -> list[str]:
    """What could not be shown elsewhere, as one section or none."""
    return ["\n".join(f"- {prose(text)}" for text in texts)] if texts else []


def write(file: Path, sections: Sequence[str]) -> None:
    """Append the sections to the step's summary, as many as the runner takes, and say when some are missing."""
    for index, text in enumerate(sections):
        rest = f"_{len(sections) - index} more sections do not fit a job's summary of {SUMMARY_LIMIT >> 20} MiB._"
        last = index == len(sections) - 1
        if not write_summary(file, f"{text}\n", room=0 if last else len(rest) + 2):
            write_summary(file, rest)
            return


def _facts(result: Finished) -> str:
    report = result.report
    files = report["output"]["files"]
    rows = [
        ("adapter", _source(report["adapter"])),
        ("base model", _source(report["base"])),
        ("method", code(str(report["adapter"].get("method", "")))),
        ("files", f"{len(files)}, {human_bytes(sum(int(file['bytes']) for file in files))}"),
        ("published", _place(result)),
        ("took", human_seconds(result.seconds) if result.merged_here else "published before, unchanged"),
    ]
    if result.report_file is not None:
        rows.append(("report", code(str(result.report_file))))
    return table(("", ""), rows)


def _source(entry: Mapping[str, Any]) -> str:
    revision = str(entry.get("revision") or "")[:12]
    name = code(str(entry.get("id") or "?"))
    return f"{name} at {code(revision)}" if revision else name


def _place(result: Finished) -> str:
    publication = result.publication
    if publication is None:
        return "nowhere"
    what = f"pull request {publication.number}" if publication.number is not None else "commit"
    state = ", a draft" if publication.draft else ""
    where = f"<{publication.url}>" if _LINK.fullmatch(publication.url) else code(publication.url)
    return f"{what} ({publication.operation}{state}): {where}"


def _reasons(result: Finished) -> list[str]:
    return _listed("Why", result.reasons)


def _notes(result: Finished) -> list[str]:
    texts = result.report.get("notes", [])
    return _listed("Notes", tuple(str(text) for text in texts))


def _listed(heading: str, texts: Sequence[str]) -> list[str]:
    if not texts:
        return []
    lines = [f"- {prose(text)}" for text in texts[:_REASONS]]
    if len(texts) > _REASONS:
        lines.append(f"- … and {len(texts) - _REASONS} more in the report")
    return [f"**{heading}**", "\n".join(lines)]


def _evidence(result: Finished) -> list[str]:
    from merge_adapter.report.evidence import verdict_rows

    rows = [
        (prose(row.check), _SIGNS.get(row.result.value, prose(row.result.value)), prose(row.evidence))
        for row in verdict_rows(result.report["verification"])
    ]
    return [table(("check", "result", "evidence"), rows)] if rows else []


def _why(result: Failed) -> str:
    return "\n\n".join((prose(result.message), *([prose(result.hint)] if result.hint else [])))


def _pictures(result: Finished) -> list[str]:
    from merge_adapter.action.pictures import pictures

    return pictures(result.report["verification"])
