"""Configs of image, audio and video processors: compared as files, no processor is run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from merge_adapter.errors import MalformedError
from merge_adapter.packaging.tokenizer import PROCESSORS
from merge_adapter.types import Repository, Resolved
from merge_adapter.verify.findings import Finding, fault, warning
from merge_adapter.verify.loading import read_json

_INERT = (
    "auto_map",
    "_name_or_path",
    "name_or_path",
    "transformers_version",
    "_processor_class",
    "processor_class",
)
"""Keys that leave a picture as it is prepared: code to load, places, versions."""


def judge_processors(merged: Path, sources: Resolved) -> Iterator[Finding]:
    """Each must prepare pictures and sounds as the adapter's does, or as the base's."""
    for name in PROCESSORS:
        held = [
            _read(repository, name)
            for repository in (sources.adapter.repository, sources.base.repository)
            if name in repository.files
        ]
        if not held:
            continue
        if not (merged / name).is_file():
            yield warning(
                "config", name, "is missing: the model's pictures or sounds cannot be prepared by it"
            )
            continue
        try:
            own = _telling(read_json(merged / name))
        except MalformedError as error:
            yield fault("config", name, error.message)
            continue
        if own not in held:
            expected = held[0]
            keys = sorted(key for key in {*own, *expected} if own.get(key) != expected.get(key))
            yield fault("config", name, f"differs from adapter and base in {', '.join(keys[:5])}")


def _read(repository: Repository, name: str) -> dict[str, Any]:
    """A source's config; one that cannot be read counts as empty."""
    try:
        document = json.loads(repository.read(name))
    except ValueError:
        return {}
    return _telling(document) if isinstance(document, dict) else {}


def _telling(document: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in document.items() if key not in _INERT}
