"""What a workflow run of the action left behind: the artifact that docs/examples/dispatch.yml uploads.

It holds the step's output `results` and the report's folder. Its content comes from the bot's own workflow, but a
workflow can be wrong: what does not fit the job is not believed.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from merge_adapter.bot.jobs import JobRequest
from merge_adapter.errors import InputError
from merge_adapter.report import document

NAME = "merge-adapter-result"
"""Of the artifact."""
LIMIT = 32 << 20
"""Bytes of an artifact, and of each file in it."""
_RESULTS = "results.json"


@dataclass(frozen=True)
class RunResult:
    """How the action ended for one adapter."""

    exit_code: int
    error: Mapping[str, str] | None
    """`message`, `hint` and `type`, when no merge was made."""
    report: Mapping[str, Any] | None
    """merge_report.json, when one was made."""


def read_result(archive: bytes, request: JobRequest) -> RunResult | None:
    """The result of `request` in an artifact; None when it holds none, or that of something else."""
    try:
        with zipfile.ZipFile(io.BytesIO(archive)) as kept:
            entry = _entry(_json(kept, _RESULTS), request)
            if entry is None:
                return None
            report = _json(kept, str(entry.get("report"))) if entry.get("report") else None
    except (
        zipfile.BadZipFile,
        NotImplementedError,
        RuntimeError,
    ):  # not an archive, or one that GitHub never makes
        return None
    exit_code = entry.get("exit-code")
    if not isinstance(exit_code, int) or isinstance(exit_code, bool):
        return None
    error = None
    if isinstance(entry.get("error"), str):
        error = {"message": entry["error"], "hint": str(entry.get("hint") or "")}
        error["type"] = str(entry.get("error-type") or "")
    return RunResult(exit_code, error, report if _fits(report, request) else None)


def _json(kept: zipfile.ZipFile, name: str) -> Any:
    """A file of the archive, parsed; None when it is missing, too large, or not JSON."""
    try:
        with kept.open(name) as file:
            content = file.read(LIMIT + 1)
    except KeyError:
        return None
    try:
        return json.loads(content) if len(content) <= LIMIT else None
    except (ValueError, RecursionError):
        return None


def _entry(results: Any, request: JobRequest) -> Mapping[str, Any] | None:
    """The one result, when it is of the adapter and commit that were dispatched."""
    if not isinstance(results, list) or len(results) != 1 or not isinstance(results[0], dict):
        return None
    entry: Mapping[str, Any] = results[0]
    return entry if entry.get("adapter") == f"{request.adapter}@{request.revision}" else None


def _fits(report: Any, request: JobRequest) -> bool:
    """Whether it is a report, and of the adapter, folder and commit that were dispatched."""
    try:
        document.validate(report, place=_RESULTS)
    except InputError:
        return False
    adapter = report["adapter"]
    found = (adapter["id"], adapter["revision"], adapter.get("subfolder", ""))
    return found == (request.adapter, request.revision, request.subfolder)
