"""Tokenizer, chat template and processors of the merged model.

The tokenizer is one repository's, whole: the adapter's when it carries a whole one, else the base's. The chat
template is the adapter's when it carries one, else the base's. Where the two come from different
repositories, a note says so.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from merge_adapter.packaging.code import AUTO_MAP, without_code
from merge_adapter.packaging.configs import without_places
from merge_adapter.packaging.reading import check_json, read_limited, read_object
from merge_adapter.packaging.writing import Writer
from merge_adapter.types import MergeSettings, Repository, Resolved

CONFIG = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
_TEMPLATES_FOLDER = "additional_chat_templates"
_FILES = frozenset(
    (
        "added_tokens.json",
        "bpe.codes",
        "emoji.json",
        "entity_vocab.json",
        "merges.txt",
        "normalizer.json",
        "sentencepiece.bpe.model",
        "sentencepiece.model",
        "source.spm",
        "special_tokens_map.json",
        "spiece.model",
        "spm.model",
        "target.spm",
        "target_vocab.json",
        "tekken.json",
        "tokenizer.json",
        "tokenizer.model",
        "vocab.bpe",
        "vocab.json",
        "vocab.txt",
    )
)
"""The vocabulary files of transformers' tokenizers; `tokenizer_config.json` is read and may be edited."""
_TIKTOKEN = re.compile(r"[\w.-]+\.tiktoken")
_TEMPLATE_FILES = re.compile(rf"chat_template\.(jinja|json)|{_TEMPLATES_FOLDER}/[\w.-]+\.jinja")
_TEMPLATE_NAME = re.compile(r"[\w.-]{1,64}")
PROCESSORS = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "audio_processor_config.json",
)


def write_tokenizer(sources: Resolved, writer: Writer, settings: MergeSettings) -> None:
    """Tokenizer and chat template from where `sources` says. MalformedError for files that are cut or broken."""
    repository = sources.tokenizer
    if repository is None:
        writer.note("Neither the adapter nor the base model has a tokenizer; the merged model has none.")
        return
    source = source_of(repository, sources)
    for path in sorted(repository.files):
        if path in _FILES or _TIKTOKEN.fullmatch(path):
            if path.endswith(".json"):
                check_json(repository, path)
            writer.copy(repository, path, source=source)
    other = template_beside(sources)
    if CONFIG in repository.files:
        write_config(
            repository, CONFIG, writer, settings, source=source, drop=("chat_template",) * bool(other)
        )
    if not other:
        for path in _template_files(repository):
            writer.copy(repository, path, source=source)
        return
    for path, template in other.items():
        writer.write(path, template)
    whose = "adapter" if source == "base" else "base"
    writer.note(f"The tokenizer is the {source}'s, the chat template the {whose}'s.")


def templates_of(sources: Resolved) -> dict[str, bytes]:
    """The chat template's files that the merged model gets, wherever they come from; empty where there are none."""
    for repository in (sources.adapter.repository, sources.base.repository):
        if sources.tokenizer is not None and _has_template(repository):
            return _template_of(repository)
    return {}


def template_beside(sources: Resolved) -> dict[str, bytes]:
    """The chat template's files where it is not of the tokenizer's own repository; empty where it is, or is none.

    The adapter's template counts before the base's: it was trained through it. Paths are those of transformers.
    """
    if sources.tokenizer is None:
        return {}
    for repository in (sources.adapter.repository, sources.base.repository):
        if _has_template(repository):
            return {} if repository.origin == sources.tokenizer.origin else _template_of(repository)
    return {}


def write_processors(sources: Resolved, writer: Writer, settings: MergeSettings) -> None:
    """Configs of image, audio and video processors: the adapter's where it carries them, else the base's."""
    for path in PROCESSORS:
        for repository in (sources.adapter.repository, sources.base.repository):
            if path in repository.files:
                write_config(repository, path, writer, settings, source=source_of(repository, sources))
                break


def source_of(repository: Repository, sources: Resolved) -> str:
    """`adapter` or `base`, as OutputFile.source says it."""
    return "base" if repository.origin == sources.base.repository.origin else "adapter"


def write_config(
    repository: Repository,
    path: str,
    writer: Writer,
    settings: MergeSettings,
    *,
    source: str,
    drop: tuple[str, ...] = (),
) -> None:
    """Copy a JSON config, or write it without code, machine paths and the keys in `drop` where it has such."""
    config = read_object(repository, path)
    edited = without_places({key: value for key, value in config.items() if key not in drop})
    if not settings.trust_remote_code and AUTO_MAP in edited:
        edited = without_code(edited, file=path, repository=repository)
        writer.note(f"{path} no longer points at Python code of the {source}'s repository.")
    if edited == config:
        writer.copy(repository, path, source=source)
    else:
        writer.write_json(path, edited)


def _template_files(repository: Repository) -> list[str]:
    return [path for path in sorted(repository.files) if _TEMPLATE_FILES.fullmatch(path)]


def _has_template(repository: Repository) -> bool:
    return bool(_template_files(repository)) or (
        CONFIG in repository.files and bool(read_object(repository, CONFIG).get("chat_template"))
    )


def _template_of(repository: Repository) -> dict[str, bytes]:
    """Its template files, and as files the templates that its tokenizer config holds."""
    files = {path: read_limited(repository, path) for path in _template_files(repository)}
    if CONFIG in repository.files:
        for name, text in _templates_inside(read_object(repository, CONFIG)).items():
            path = TEMPLATE if name == "default" else f"{_TEMPLATES_FOLDER}/{name}.jinja"
            files.setdefault(path, text.encode())
    return files


def _templates_inside(config: Mapping[str, Any]) -> dict[str, str]:
    """Name -> template from a tokenizer config: one text, or a list of {name, template}."""
    found = config.get("chat_template")
    if isinstance(found, str):
        return {"default": found}
    return {
        entry["name"]: entry["template"]
        for entry in (found if isinstance(found, list) else [])
        if isinstance(entry, dict)
        and isinstance(entry.get("template"), str)
        and isinstance(entry.get("name"), str)
        and _TEMPLATE_NAME.fullmatch(entry["name"])
        and not entry["name"].startswith(".")
    }
