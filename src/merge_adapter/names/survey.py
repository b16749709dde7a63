"""Which model types transformers loads without touching a name: the data behind `direct`.

Run `python -m merge_adapter.names.survey` after changing the pinned transformers; a test compares the stored
answer with a fresh one. The survey reads source text and configuration classes, builds no model, and takes a
few seconds.

A model type is direct when none of the following holds, each of which can make a name or an orientation in memory
differ from disk:

- transformers registers a conversion for the type, for one of its sub-configurations' types, or for any class that its
  modeling files mention;
- its modeling files mention `Conv1D`, whose weight is stored transposed;
- its modeling files could not be found or read.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DATA = Path(__file__).with_name("model_types.json")

_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def survey() -> dict[str, Any]:
    """`{"transformers": version, "direct": [...], "other": [...]}`: every model type it has, sorted."""
    import transformers
    from transformers import CONFIG_MAPPING
    from transformers.conversion_mapping import _build_checkpoint_conversion_mapping

    registered = set(_build_checkpoint_conversion_mapping()) - {"legacy"}
    direct: list[str] = []
    other: list[str] = []
    for model_type in sorted(CONFIG_MAPPING.keys()):
        try:
            configuration = CONFIG_MAPPING[model_type]
        except (ImportError, AttributeError):
            other.append(model_type)
            continue
        names = _words(configuration)
        types = set(_types(configuration))
        plain = names is not None and not (names & (registered | {"Conv1D"})) and not (types & registered)
        (direct if plain and model_type not in registered else other).append(model_type)
    return {"transformers": transformers.__version__, "direct": direct, "other": other}


def _types(configuration: Any) -> Iterator[str]:
    """The model type of a configuration class and of all below it."""
    yield configuration.model_type
    for part in (getattr(configuration, "sub_configs", None) or {}).values():
        if hasattr(part, "model_type"):
            yield from _types(part)


def _words(configuration: Any) -> set[str] | None:
    """Every identifier in the modeling files beside this configuration class; None when there are none."""
    module = importlib.util.find_spec(configuration.__module__)
    if module is None or module.origin is None:
        return None
    files = sorted(Path(module.origin).parent.glob("modeling_*.py"))
    if not files:
        return None
    return {word for file in files for word in _IDENTIFIER.findall(file.read_text(encoding="utf-8"))}


def write() -> None:
    """Store a fresh survey beside this file."""
    DATA.write_text(json.dumps(survey(), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write()
