"""What repositories of sentence-transformers say of their transformer: where it lies, and what it was trained to do."""

from __future__ import annotations

import json
import re
from typing import Any

from merge_adapter.types import Repository

MODULES = "modules.json"
_LIMIT = 1 << 20
"""Bytes of a JSON file read at most; they have a few hundred."""
_SETTINGS = re.compile(r"sentence_[a-z]+_config\.json")
_TASKS = {"feature-extraction": "FEATURE_EXTRACTION", "sequence-classification": "SEQ_CLS"}
"""Tasks of sentence-transformers, the first of which is understood where none is stated -> PEFT's."""


def listed_modules(repository: Repository) -> tuple[dict[str, Any], ...]:
    """The entries of modules.json; () where there is none, or none that can be read."""
    listed = _read(repository, MODULES)
    return tuple(entry for entry in listed if isinstance(entry, dict)) if isinstance(listed, list) else ()


def transformer_folder(repository: Repository) -> str | None:
    """The folder of the transformer, "" for the root; None unless modules.json lists exactly one."""
    found = [
        entry.get("path")
        for entry in listed_modules(repository)
        if str(entry.get("type", "")).rpartition(".")[2] == "Transformer"
    ]
    return found[0].strip("/") if len(found) == 1 and isinstance(found[0], str) else None


def is_transformer_alone(repository: Repository) -> bool:
    """Whether these are the files of a transformer alone, in a folder of a model that has more modules."""
    return (
        bool(repository.origin.subfolder) and MODULES not in repository.files and bool(_settings(repository))
    )


def trained_task(repository: Repository) -> str | None:
    """PEFT's task type for what the transformer at the root was trained to do; None where that is not said.

    Adapters that sentence-transformers has trained need not say it themselves.
    """
    if transformer_folder(repository) != "":
        return None
    held = _settings(repository)
    settings = _read(repository, held[0]) if held else None
    stated = settings.get("transformer_task", "feature-extraction") if isinstance(settings, dict) else None
    return _TASKS.get(stated) if isinstance(stated, str) else None


def _settings(repository: Repository) -> list[str]:
    """What sentence-transformers saves beside a transformer's own files."""
    return [path for path in repository.files if _SETTINGS.fullmatch(path)]


def _read(repository: Repository, path: str) -> Any:
    size = repository.files.get(path)
    if size is None or size > _LIMIT:
        return None
    try:
        return json.loads(repository.read(path))
    except (ValueError, RecursionError):
        return None
