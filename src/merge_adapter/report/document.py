"""merge_report.json: what was merged into what, every file with its hash, and the verdict with its evidence.

The document is the interface others read: its JSON schema (`schema.json` beside this file) is checked
before a report is written and after one is read.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import Any

from merge_adapter import __version__
from merge_adapter.errors import MalformedError, NotFoundError
from merge_adapter.types import (
    Combination,
    MergeSettings,
    Origin,
    OutputFile,
    Publication,
    Resolved,
    SoftPrompt,
    Verdict,
    Verification,
)

REPORT_FILE = "merge_report.json"
SCHEMA = 1
_TOOLS = ("torch", "transformers", "peft", "huggingface_hub")


def not_verified() -> Verification:
    """The verdict of a merge that was told not to verify."""
    return Verification(Verdict.INCONCLUSIVE, ("The gate was not run (--no-verify).",))


def source_entry(origin: Origin) -> dict[str, Any]:
    """`id` and `revision` of a source. A local folder is told by its name alone: reports are published."""
    if origin.repo_id is not None:
        entry: dict[str, Any] = {"id": origin.repo_id, "revision": origin.revision}
    else:
        entry = {"id": origin.folder.name if origin.folder else None, "revision": None}
    if origin.subfolder:
        entry["subfolder"] = origin.subfolder
    return entry


def adapter_entry(sources: Resolved) -> dict[str, Any]:
    """The adapter, or the first of several, whose weights stand with `adapters`."""
    entry = source_entry(sources.adapter.repository.origin)
    if len(sources.adapters) == 1 and sources.adapter.weight != 1:
        entry["weight"] = sources.adapter.weight
    return {**entry, "method": sources.adapter.method}


def settings_entry(settings: MergeSettings, license: str | None = None) -> dict[str, Any]:
    """What the user chose, but for the dtype, which stands with the output. Publications are told apart by it."""
    entry: dict[str, Any] = {
        "strategy": settings.strategy.value,
        "quantized_base": settings.quantized_base.value,
        "trust_remote_code": settings.trust_remote_code,
    }
    if settings.soft_prompt is not SoftPrompt.REFUSE:
        entry["soft_prompt"] = settings.soft_prompt.value
    if license is not None:
        entry["license"] = license
    return entry


def combination_entry(combination: Combination) -> dict[str, Any]:
    """How several adapters were combined: PEFT's name of it, and the settings that it uses."""
    kind = combination.type.value
    entry: dict[str, Any] = {"type": kind}
    if combination.density is not None:
        entry["density"] = combination.density
    if "ties" in kind:
        entry["majority_sign"] = combination.majority_sign.value
    if combination.svd_rank is not None:
        entry["svd_rank"] = combination.svd_rank
    if "dare" in kind:
        entry["seed"] = combination.seed
    return entry


def several_entries(sources: Resolved) -> dict[str, Any]:
    """The sections `adapters` and `combination`; empty for a single adapter."""
    if len(sources.adapters) == 1:
        return {}
    return {
        "adapters": [
            {**source_entry(one.repository.origin), "method": one.method, "weight": one.weight}
            for one in sources.adapters
        ],
        "combination": combination_entry(sources.combination),
    }


def tool_entry() -> dict[str, str]:
    """Versions of this tool and of what decides its results."""
    return {
        "name": "merge-adapter",
        "version": __version__,
        "python": platform.python_version(),
        **{name: _version(name) for name in _TOOLS},
    }


def build(
    *,
    sources: Resolved,
    settings: MergeSettings,
    adapter_tensors: int,
    consumed: int,
    files: tuple[OutputFile, ...],
    merge: Mapping[str, Any],
    verification: Verification,
    notes: tuple[str, ...],
    license: str | None = None,
) -> dict[str, Any]:
    """The document. `merge` is its section of that name, in seconds and bytes; `license` one that was chosen."""
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "tool": tool_entry(),
        "adapter": {
            **adapter_entry(sources),
            "tensors": adapter_tensors,
            "consumed": consumed,
        },
        "base": source_entry(sources.base.repository.origin),
        "settings": settings_entry(settings, license),
        "output": {
            "dtype": settings.dtype.value,
            "files": [asdict(file) for file in sorted(files, key=lambda file: file.path)],
        },
        "merge": dict(merge),
        "verification": verification_entry(verification),
        "notes": list(notes),
    }
    document |= several_entries(sources)
    if sources.tokenizer is not None:
        document["tokenizer"] = source_entry(sources.tokenizer.origin)
    return document


def verdict_only(sources: Resolved, verification: Verification) -> dict[str, Any]:
    """What `verify --json` prints: the sections of the report that exist when nothing was merged."""
    return {
        "schema": SCHEMA,
        "tool": tool_entry(),
        "adapter": adapter_entry(sources),
        **several_entries(sources),
        "base": source_entry(sources.base.repository.origin),
        "verification": verification_entry(verification),
        "notes": list(sources.notes),
    }


def verification_entry(verification: Verification) -> dict[str, Any]:
    """The section `verification`: verdict, reasons, and the evidence by part."""
    return {
        "verdict": verification.verdict.value,
        "reasons": list(verification.reasons),
        **verification.evidence,
    }


def publication_entry(publication: Publication) -> dict[str, Any]:
    """The section `publication`, which `run` adds."""
    return {
        "repo": publication.repo,
        "url": publication.url,
        "number": publication.number,
        "operation": publication.operation.value,
        "commit": publication.commit,
        "draft": publication.draft,
        "bytes_uploaded": publication.bytes_uploaded,
        "bytes_saved": publication.bytes_saved,
    }


def dump(document: Mapping[str, Any]) -> str:
    """JSON with a final newline. NaN and infinity have no JSON: they are an error here, not text."""
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write(document: Mapping[str, Any], folder: Path) -> Path:
    """Write `folder`/merge_report.json, whole or not at all, after checking it against the schema."""
    validate(document, place=f"the report for {folder.name}")
    path = folder / REPORT_FILE
    partial = path.with_suffix(".json.partial")
    partial.write_text(dump(document), encoding="utf-8")
    partial.replace(path)
    return path


def read(folder: Path) -> dict[str, Any]:
    """The report of a folder merged earlier.

    Raises NotFoundError when there is none, MalformedError when it is not a report of schema 1.
    """
    path = folder / REPORT_FILE
    if not path.is_file():
        raise NotFoundError(
            f"{folder} has no {REPORT_FILE}",
            hint="Only a folder that merge-adapter wrote can be published: merge-adapter merge … --output DIR",
        )
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise MalformedError(f"{path} is not readable JSON: {error}", hint="Merge again.") from error
    validate(document, place=str(path))
    return dict(document)


def validate(document: object, *, place: str) -> None:
    """Raise MalformedError naming the first field of `document` that breaks the schema."""
    _check(document, schema(), f"{place} is not a merge report of schema {SCHEMA}")


def validate_judgement(document: object, *, place: str) -> None:
    """The same for what `verify --json` prints: the sections that exist when nothing was merged."""
    whole = schema()
    wanted = {"$schema": whole["$schema"], "$ref": "#/$defs/judgement", "$defs": whole["$defs"]}
    _check(document, wanted, f"{place} is not a judgement of schema {SCHEMA}")


def _check(document: object, wanted: Mapping[str, Any], failing: str) -> None:
    from jsonschema import Draft202012Validator

    errors = sorted(Draft202012Validator(wanted).iter_errors(document), key=lambda error: list(error.path))
    if errors:
        first = errors[0]
        field = "/".join(str(part) for part in first.path) or "the document"
        raise MalformedError(
            f"{failing}: {field}: {first.message[:300]}",
            hint="Merge again with this version of merge-adapter.",
        )


@cache
def schema() -> dict[str, Any]:
    """The JSON schema of merge_report.json; its definition `judgement` is that of what `verify --json` prints."""
    return dict(json.loads(files("merge_adapter.report").joinpath("schema.json").read_text(encoding="utf-8")))


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"
