"""What became of each adapter, and the step's outputs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from merge_adapter.action.candidates import Candidate
from merge_adapter.errors import ExitCode
from merge_adapter.types import Publication, Verdict

ERROR = "error"
"""Stands where a verdict would, when no merge could be made."""
OUTPUTS = (
    "verdict",
    "pull-request-number",
    "pull-request-url",
    "operation",
    "repo",
    "commit",
    "adapter-revision",
    "base-model",
    "base-revision",
    "report",
    "results",
)
"""Every output, in the order of action.yml."""


@dataclass(frozen=True)
class Finished:
    """A merge was made, or was there already."""

    candidate: Candidate
    report: Mapping[str, Any]
    """merge_report.json, with the section `publication` where something is on the Hub."""
    verdict: Verdict
    reasons: tuple[str, ...]
    publication: Publication | None
    seconds: float
    report_file: PurePosixPath | None = None
    """From the workspace."""
    merged_here: bool = True
    """False when the Hub had the result already."""
    verified: bool = True
    """False when the gate was told not to look."""
    files: tuple[PurePosixPath, ...] = ()
    """Report, page and card as kept in the workspace, for the release."""

    @property
    def outcome(self) -> str:
        return self.verdict.value

    @property
    def exit_code(self) -> int:
        passed = self.verdict is Verdict.PASS or not self.verified
        return ExitCode.DONE if passed else ExitCode.NOT_EQUIVALENT


@dataclass(frozen=True)
class Failed:
    """No merge was made."""

    candidate: Candidate
    message: str
    hint: str
    exit_code: int
    seconds: float
    error_type: str = ""
    """Name of the error's class: a refusal and a fault of the network share an exit code."""

    @property
    def outcome(self) -> str:
        return ERROR


Result = Finished | Failed


def worst(results: Sequence[Result]) -> str:
    """The outcome of all: `error`, `fail`, `inconclusive`, `pass`, or "" for none."""
    ranking = (ERROR, Verdict.FAIL.value, Verdict.INCONCLUSIVE.value, Verdict.PASS.value)
    return min((result.outcome for result in results), key=ranking.index, default="")


def exit_code(results: Sequence[Result]) -> int:
    """That of the first adapter that did not end well, 0 when all did."""
    return next((int(result.exit_code) for result in results if result.exit_code), int(ExitCode.DONE))


def outputs(results: Sequence[Result]) -> list[tuple[str, str]]:
    """The step's outputs. Those of one adapter are empty when there were several: `results` has them all."""
    entries = [entry(result) for result in results]
    single = entries[0] if len(entries) == 1 else dict.fromkeys(OUTPUTS, None)
    values = {**{name: single.get(name) for name in OUTPUTS}, "verdict": worst(results), "results": entries}
    return [(name, _text(values[name])) for name in OUTPUTS]


def entry(result: Result) -> dict[str, Any]:
    """One adapter in the output `results`."""
    base = {
        "adapter": result.candidate.reference,
        "subfolder": _subfolder(result),
        "verdict": result.outcome,
        "exit-code": int(result.exit_code),
    }
    if isinstance(result, Failed):
        return {**base, "error": result.message, "hint": result.hint, "error-type": result.error_type}
    publication = result.publication
    return {
        **base,
        "pull-request-number": publication.number if publication else None,
        "pull-request-url": publication.url if publication and publication.number is not None else None,
        "operation": publication.operation.value if publication else None,
        "repo": publication.repo if publication else None,
        "commit": publication.commit if publication else None,
        "adapter-revision": result.report["adapter"].get("revision"),
        "base-model": result.report["base"].get("id"),
        "base-revision": result.report["base"].get("revision"),
        "report": str(result.report_file) if result.report_file else None,
        "reasons": list(result.reasons),
    }


def _subfolder(result: Result) -> str:
    """Where the adapter lies in its repository; of one that was not merged only what was found, not what was named."""
    merged = result.report["adapter"].get("subfolder") if isinstance(result, Finished) else None
    return str(merged or result.candidate.subfolder)


def _text(value: object) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=True)
