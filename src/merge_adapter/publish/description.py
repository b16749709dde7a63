"""The words of a publication: title, description, comments, commit message.

Repository ids are checked before they come here. Everything else that others wrote (tensor names, reasons that quote
configs) is escaped: it must not mention people, load images or break out of its place.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from merge_adapter.publish.identity import Marker
from merge_adapter.publish.settings import PublishSettings, Target
from merge_adapter.types import Verdict, Verification

_SPECIAL = re.compile(r"([\\`*_{}\[\]()#+!|~$])")
_EVIDENCE_LIMIT = 40_000
_REASON_LIMIT = 500
_REASONS = 20
"""20 reasons of 500 characters, escaped to five times that at worst, leave room for the rest."""
_STATES = {
    Verdict.PASS: "The merged model answers as base + adapter does.",
    Verdict.FAIL: "**Not equivalent.** This stays a draft: the merged model does not answer as base + adapter does.",
    Verdict.INCONCLUSIVE: "**Not decided.** This stays a draft until equivalence is shown.",
}


def escape(text: str) -> str:
    """`text` as plain words in Markdown: no markup, no HTML, no mention, one line."""
    line = " ".join(text.split())
    entities = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("@", "&#64;")
    return _SPECIAL.sub(r"\\\1", entities).replace("://", ":&#8203;//")


def title(report: Mapping[str, Any]) -> str:
    """Title of the pull request, 200 characters at most."""
    return f"Merge {_name(report['adapter'])} into {_name(report['base'])}"[:200]


def commit_message(report: Mapping[str, Any]) -> str:
    """Subject of the commit."""
    return f"Add {_name(report['adapter'])} merged into {_name(report['base'])}"[:200]


def commit_body(report: Mapping[str, Any]) -> str:
    """Sources with their commits, for those who read the history alone."""
    return f"Adapter: {_pinned(report['adapter'])}\nBase: {_pinned(report['base'])}"


def placeholder(report: Mapping[str, Any], marker: Marker) -> str:
    """The description while the files are on their way; the marker lets an interrupted run find its draft."""
    return f"{marker}\n\nThe adapter {_link(report['adapter'])} folded into its base model. Files are being uploaded."


def describe(
    report: Mapping[str, Any],
    verification: Verification,
    marker: Marker,
    target: Target,
    settings: PublishSettings,
    *,
    evidence: str,
    number: int,
) -> str:
    """The description of pull request `number`; `evidence` is the verdict's table as Markdown, or ""."""
    adapter, base = report["adapter"], report["base"]
    method = escape(str(adapter.get("method") or "PEFT"))
    lines = [
        str(marker),  # first, so that nothing that is quoted below can pass for it
        "",
        f"The adapter {_link(adapter)} folded into its base model: full weights and tokenizer, no `peft` needed.",
        "",
        _STATES[verification.verdict],
        "",
        "| | repository | commit |",
        "|---|---|---|",
        f"| adapter ({method}) | {_link(adapter)} | {_commit(adapter)} |",
        f"| base | {_link(base)} | {_commit(base)} |",
        "",
    ]
    if evidence:
        lines += [_fitting(evidence), ""]
    lines += _reasons(verification)
    lines += [f"- {escape(note)}" for note in settings.notes]
    lines += ["", *_how_to_check(report, target, number)]
    return "\n".join(lines)


def evidence_comment(report: Mapping[str, Any], verification: Verification, *, evidence: str) -> str:
    """The comment on a pull request that stays a draft: what was found, and what would decide it."""
    head = f"Adapter commit {_commit(report['adapter'])}: {_STATES[verification.verdict]}"
    lines = [head, "", *_reasons(verification)]
    if evidence:
        lines += ["", _fitting(evidence)]
    if verification.verdict is Verdict.INCONCLUSIVE:
        lines += ["", "What would decide it is said above; a new run updates this pull request."]
    return "\n".join(lines)


def _reasons(verification: Verification) -> list[str]:
    shown = [f"- {escape(reason[:_REASON_LIMIT])}" for reason in verification.reasons[:_REASONS]]
    more = len(verification.reasons) - len(shown)
    return [*shown, f"- and {more} more, in `merge_report.json`"] if more > 0 else shown


def _fitting(evidence: str) -> str:
    """The Hub takes comments of up to 65,536 characters; a table cut in two would be no table."""
    clean = evidence.strip()
    return clean if len(clean) <= _EVIDENCE_LIMIT else "The evidence is in `merge_report.json`."


def _how_to_check(report: Mapping[str, Any], target: Target, number: int) -> list[str]:
    adapter = report["adapter"]
    if not adapter.get("revision"):
        return ["Every file with its hash is listed in `merge_report.json`."]
    command = f"merge-adapter verify {target.repo_id}@refs/pr/{number} --adapter {adapter['id']}@{adapter['revision']}"
    if target.path_in_repo:
        command += f" --subfolder {target.path_in_repo}"
    return [
        "To judge it again:",
        "",
        "```sh",
        command,
        "```",
        "",
        "Every file with its hash is listed in `merge_report.json`.",
    ]


def _name(entry: Mapping[str, Any]) -> str:
    return " ".join(str(entry.get("id") or "a local folder").split())


def _pinned(entry: Mapping[str, Any]) -> str:
    return f"{_name(entry)}@{entry['revision']}" if entry.get("revision") else _name(entry)


def _link(entry: Mapping[str, Any]) -> str:
    if not entry.get("revision"):
        return f"{escape(_name(entry))} (a local folder)"
    return f"[{escape(_name(entry))}](/{entry['id']})"


def _commit(entry: Mapping[str, Any]) -> str:
    revision = entry.get("revision")
    return f"[`{revision[:12]}`](/{entry['id']}/commit/{revision})" if revision else "none"
