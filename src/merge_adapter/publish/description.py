"""The words of a publication: title, description, comments, commit message.

Repository ids are checked before they come here. Everything else that others wrote (tensor names, reasons that quote
configs) is escaped: it must not mention people, load images or break out of its place.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from merge_adapter.publish.identity import Marker
from merge_adapter.publish.settings import Target
from merge_adapter.report.evidence import escape, verdict_markdown
from merge_adapter.types import Verdict

_COMMENT_LIMIT = 40_000
"""Characters of evidence: the Hub takes comments of up to 65,536."""
_UNDERWAY = "Files are being uploaded."
_STATES = {
    Verdict.PASS: "The merged model answers as base + adapter does.",
    Verdict.FAIL: "**Not equivalent.** This stays a draft: the merged model does not answer as base + adapter does.",
    Verdict.INCONCLUSIVE: "**Not decided.** This stays a draft until equivalence is shown.",
}


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
    return f"{marker}\n\nThe adapter {_link(report['adapter'])} folded into its base model. {_UNDERWAY}"


def is_placeholder(text: str) -> bool:
    """Whether a description is that of a draft which never got its files."""
    return text.rstrip().endswith(_UNDERWAY)


def describe(
    report: Mapping[str, Any], marker: Marker, target: Target, *, notes: tuple[str, ...], number: int
) -> str:
    """The description of pull request `number`: sources, verdict with its evidence, how to judge it again."""
    adapter, base = report["adapter"], report["base"]
    method = escape(str(adapter.get("method") or "PEFT"))
    lines = [
        str(marker),  # first, so that nothing that is quoted below can pass for it
        "",
        f"The adapter {_link(adapter)} folded into its base model: full weights and tokenizer, no `peft` needed.",
        "",
        _STATES[marker.verdict],
        "",
        "| | repository | commit |",
        "|---|---|---|",
        f"| adapter ({method}) | {_link(adapter)} | {_commit(adapter)} |",
        f"| base | {_link(base)} | {_commit(base)} |",
        "",
        _evidence(report),
        "",
        *(f"- {escape(note)}" for note in notes),
        "",
        *_how_to_check(report, target, number),
    ]
    return "\n".join(lines)


def evidence_comment(report: Mapping[str, Any], verdict: Verdict) -> str:
    """The comment on a pull request that stays a draft: what was found, and what would decide it."""
    lines = [f"Adapter commit {_commit(report['adapter'])}: {_STATES[verdict]}", "", _evidence(report)]
    if verdict is Verdict.INCONCLUSIVE:
        lines += ["", "What would decide it is said above. A new run updates this pull request."]
    return "\n".join(lines)


def _evidence(report: Mapping[str, Any]) -> str:
    """Verdict, table and reasons. A table cut in two would be no table, so a huge one is left to the report."""
    text = verdict_markdown(report["verification"]).strip()
    return text if len(text) <= _COMMENT_LIMIT else "The evidence is in `merge_report.json`."


def _how_to_check(report: Mapping[str, Any], target: Target, number: int) -> list[str]:
    files = "Every file with its hash is listed in `merge_report.json`."
    adapters, base = report.get("adapters") or [report["adapter"]], report["base"]
    if not all(entry.get("revision") for entry in (*adapters, base)):
        return [files]
    command = [
        f"merge-adapter verify {target.repo_id}@refs/pr/{number}",
        *(f"--adapter {shlex.quote(_placed(entry))}" for entry in adapters),
        f"--base-model {_pinned(base)}",
        *_settings_that_verify_needs(report, adapters),
    ]
    if target.path_in_repo:
        command.append(f"--merged-subfolder {shlex.quote(target.path_in_repo)}")
    return ["To judge it again:", "", "```sh", " \\\n  ".join(command), "```", "", files]


def _settings_that_verify_needs(
    report: Mapping[str, Any], adapters: Sequence[Mapping[str, Any]]
) -> list[str]:
    """The options of the merge without which another model would be expected."""
    options = []
    weights = [entry.get("weight", 1) for entry in adapters]
    if any(weight != 1 for weight in weights):
        options += [f"--weight {weight}" for weight in weights]
    combination = dict(report.get("combination", {}))
    if (kind := combination.pop("type", "sequential")) != "sequential":
        options.append(f"--combination {kind}")
    options += [f"--{name.replace('_', '-')} {value}" for name, value in combination.items()]
    if (dtype := report["output"]["dtype"]) != "auto":
        options.append(f"--dtype {dtype}")
    if report["settings"]["quantized_base"] == "dequantize":  # an original stands as the base
        options.append("--quantized-base dequantize")
    if report["settings"]["trust_remote_code"]:
        options.append("--trust-remote-code")
    return options


def _name(entry: Mapping[str, Any]) -> str:
    return " ".join(str(entry.get("id") or "a local folder").split())


def _pinned(entry: Mapping[str, Any]) -> str:
    return f"{_name(entry)}@{entry['revision']}" if entry.get("revision") else _name(entry)


def _placed(entry: Mapping[str, Any]) -> str:
    """An adapter as the command line takes it, with its folder."""
    folder = entry.get("subfolder")
    return f"{_pinned(entry)}:{folder}" if folder else _pinned(entry)


def _link(entry: Mapping[str, Any]) -> str:
    if not entry.get("revision"):
        return f"{escape(_name(entry))} (a local folder)"
    return f"[{escape(_name(entry))}](/{entry['id']})"


def _commit(entry: Mapping[str, Any]) -> str:
    revision = entry.get("revision")
    return f"[`{revision[:12]}`](/{entry['id']}/commit/{revision})" if revision else "none"
