"""Several adapters side by side: whether they can belong to one model."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from merge_adapter.errors import InputError, MethodError, ShapeError
from merge_adapter.types import Adapter, Repository

_TOKENIZER = "tokenizer.json"
_TEMPLATES = ("chat_template.jinja", "tokenizer_config.json", "special_tokens_map.json")
"""Files that may differ between tokenizers of one vocabulary."""
_LIMIT = 64 << 20
"""Bytes of a tokenizer read at most; the largest in use are about half of that."""


def check_adapters(adapters: tuple[Adapter, ...]) -> None:
    """Raise InputError for a weight that is no number, or an adapter that was named twice, MethodError for two methods.

    PEFT loads adapters of one method at a time, so that nothing could judge a merge of several methods.
    """
    for adapter in adapters:
        if not math.isfinite(adapter.weight):
            raise InputError(
                f"the weight {adapter.weight} of {adapter.repository.origin} is not a finite number"
            )
    origins = [adapter.repository.origin for adapter in adapters]
    twice = next((origin for number, origin in enumerate(origins) if origin in origins[:number]), None)
    if twice is not None:
        raise InputError(
            f"{twice} was named twice", hint="Name each adapter once, and give it a weight with --weight."
        )
    methods = sorted({adapter.method for adapter in adapters})
    if len(methods) > 1:
        raise MethodError(
            f"The adapters are of different methods, {' and '.join(methods)}. PEFT loads those of one method together"
            " and no others, so that a merge of all in one step could not be compared with it.",
            hint="Merge them one by one: merge FIRST --output DIR, then merge SECOND --base-model DIR.",
        )


def compare_revisions(adapters: tuple[Adapter, ...]) -> Iterator[str]:
    """A note where the adapters record different revisions of the base, of which the first one's is used."""
    recorded = [adapter.config.get("revision") for adapter in adapters]
    stated = {revision for revision in recorded if isinstance(revision, str) and revision}
    if len(stated) > 1:
        yield "The adapters record different revisions of their base; it is read as the first adapter's config says."


def compare_tokenizers(adapters: tuple[Adapter, ...], chosen: Repository | None) -> Iterator[str]:
    """Notes on what differs between the adapters' own tokenizers, of which the merged model gets `chosen`.

    Raises ShapeError where two of them give different ids to tokens: one model cannot answer to both.
    """
    if len(adapters) < 2:
        return
    carrying = [adapter for adapter in adapters if _TOKENIZER in adapter.repository.files]
    for number, adapter in enumerate(carrying):
        other = carrying[0]
        if number and (differing := _differing(other.repository, adapter.repository)):
            raise ShapeError(
                f"The tokenizers of {other.repository.origin} and {adapter.repository.origin} give different ids to"
                f" {len(differing)} tokens, {', '.join(map(repr, differing[:4]))} among them.",
                hint="The adapters were trained with different vocabularies; merge them one by one, or retrain one.",
            )
    for adapter in adapters:
        repository = adapter.repository
        if chosen is None or repository.origin == chosen.origin:
            continue
        own = [path for path in (_TOKENIZER, *_TEMPLATES) if path in repository.files]
        changed = [path for path in own if _content(repository, path) != _content(chosen, path)]
        if changed:
            yield (
                f"The tokenizer files of {_name(adapter)} are not used; they differ from those used in"
                f" {', '.join(changed)}."
            )


def _name(adapter: Adapter) -> str:
    """The Hub id, or a folder's name alone: notes are published."""
    origin = adapter.repository.origin
    return origin.repo_id or (origin.folder.name if origin.folder is not None else "an adapter")


def _content(repository: Repository, path: str) -> bytes | None:
    size = repository.files.get(path)
    return repository.read(path) if size is not None and size <= _LIMIT else None


def _differing(left: Repository, right: Repository) -> list[str]:
    """Tokens whose ids differ, or are those of another token; tokens that one of the two lacks are no conflict."""
    first, second = _content(left, _TOKENIZER), _content(right, _TOKENIZER)
    if first == second:
        return []
    ours, theirs = _vocabulary(first), _vocabulary(second)
    names = {number: token for token, number in ours.items()}
    return sorted(
        token
        for token, number in theirs.items()
        if ours.get(token, number) != number or names.get(number, token) != token
    )


def _vocabulary(content: bytes | None) -> Mapping[str, Any]:
    """Token -> id as tokenizer.json says; pieces without ids (unigram) by their place."""
    try:
        parsed = json.loads(content or b"")
        pieces = parsed["model"]["vocab"]
        found = (
            dict(pieces) if isinstance(pieces, dict) else {piece[0]: at for at, piece in enumerate(pieces)}
        )
        return {**found, **{token["content"]: token["id"] for token in parsed.get("added_tokens") or ()}}
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        return {}
