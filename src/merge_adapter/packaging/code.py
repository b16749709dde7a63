"""Python files that a model brings along: published only when the user trusts them.

A config points at such code with `auto_map`. Without trust the pointer is taken out, so that the merged
repository runs no code; a model or tokenizer that transformers cannot build without the code is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from merge_adapter.errors import PolicyError
from merge_adapter.packaging.writing import Writer
from merge_adapter.types import Repository

AUTO_MAP = "auto_map"


def copy_code(repository: Repository, writer: Writer, *, source: str) -> None:
    """Copy every Python file of the repository, under its own path."""
    copied = [path for path in sorted(repository.files) if path.endswith(".py")]
    for path in copied:
        writer.copy(repository, path, source=source)
    if copied:
        writer.note(
            f"The {source}'s Python files were copied, as --trust-remote-code allows: {', '.join(copied)}."
        )


def without_code(config: Mapping[str, Any], *, file: str, repository: Repository) -> dict[str, Any]:
    """The config without `auto_map`.

    Raises PolicyError when transformers itself does not know what the config describes.
    """
    kept = {key: value for key, value in config.items() if key != AUTO_MAP}
    if AUTO_MAP in config and not _is_known(file, kept, repository):
        raise PolicyError(
            f"{file} of {repository.origin} needs Python code of its own repository, "
            f"and transformers has no {_described(kept)} itself",
            hint="Read that code; if you trust it, add --trust-remote-code.",
        )
    return kept


def _is_known(file: str, config: Mapping[str, Any], repository: Repository) -> bool:
    """Whether transformers has a class of its own for what the config describes."""
    if file == "config.json":
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

        return config.get("model_type") in CONFIG_MAPPING_NAMES
    if file == "tokenizer_config.json" and "tokenizer.json" in repository.files:
        return True  # transformers builds a tokenizer from that file alone
    import transformers

    name = _class_name(config)
    return name is not None and name.isidentifier() and hasattr(transformers, name)


def _class_name(config: Mapping[str, Any]) -> str | None:
    keys = ("tokenizer_class", "processor_class", "image_processor_type", "feature_extractor_type")
    return next((config[key] for key in keys if isinstance(config.get(key), str)), None)


def _described(config: Mapping[str, Any]) -> str:
    return repr(config.get("model_type") or _class_name(config) or "class for it")
