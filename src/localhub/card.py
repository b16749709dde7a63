"""Model cards: the YAML block at the top of README.md, and the tags the Hub makes of it."""

from __future__ import annotations

import re
from typing import Any

import yaml

_BLOCK = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)(?:^|\n)---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
RELATIONS = ("adapter", "merge", "quantized", "finetune")


def card_block(readme: str) -> str | None:
    """The YAML text of a card, None when there is none."""
    match = _BLOCK.match(readme)
    return match[1] if match else None


def card_metadata(readme: str) -> dict[str, Any]:
    """The metadata of a card as JSON-ready values; {} when missing or malformed."""
    block = card_block(readme)
    if block is None:
        return {}
    try:
        metadata = yaml.load(block, Loader=_Plain)  # noqa: S506 - a subclass of SafeLoader
    except yaml.YAMLError:
        return {}
    return metadata if isinstance(metadata, dict) else {}


class _Plain(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
    """Leaves dates as text, so that the result is JSON."""


_Plain.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def body(readme: str) -> str:
    """The text below the metadata."""
    match = _BLOCK.match(readme)
    return readme[match.end() :] if match else readme


def listed(value: object) -> list[str]:
    """A value that may be one string or a list of them."""
    if isinstance(value, str):
        return [value]
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []


def tags_of(card: dict[str, Any], paths: list[str]) -> list[str]:
    """The tags the Hub shows and filters by: those of the card, and what the files tell."""
    tags = [
        *listed(card.get("library_name")),
        *(["safetensors"] if any(path.endswith(".safetensors") for path in paths) else []),
        *listed(card.get("tags")),
        *listed(card.get("pipeline_tag")),
        *listed(card.get("language")),
        *(f"dataset:{name}" for name in listed(card.get("datasets"))),
    ]
    if "adapter_config.json" in paths:
        tags.append("peft")
    bases = listed(card.get("base_model"))
    relation = card.get("base_model_relation") or _relation(bases, paths)
    for base in bases:
        tags += [f"base_model:{base}", f"base_model:{relation}:{base}"]
    tags += [f"license:{name}" for name in listed(card.get("license"))]
    if "config.json" in paths and "adapter_config.json" not in paths and not card.get("library_name"):
        tags.append("transformers")
    tags.append("region:us")
    return list(dict.fromkeys(tags))


def _relation(bases: list[str], paths: list[str]) -> str:
    """How a model relates to its base when the card does not say."""
    if "adapter_config.json" in paths:
        return "adapter"
    if len(bases) > 1:
        return "merge"
    return "quantized" if any(path.endswith(".gguf") for path in paths) else "finetune"
