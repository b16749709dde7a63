"""Image, audio and video processors: their configs compared as files, image processors run where that works here."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from merge_adapter.errors import MalformedError
from merge_adapter.packaging.tokenizer import PROCESSORS
from merge_adapter.types import Repository, Resolved
from merge_adapter.verify.findings import Finding, fault, note, warning
from merge_adapter.verify.models.loading import read_json
from merge_adapter.verify.probes.pictures import PROCESSOR, processed, processor_of

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
    found = list(_judge_configs(merged, sources))
    yield from found
    if not found:
        yield from judge_prepared(merged, sources)


def _judge_configs(merged: Path, sources: Resolved) -> Iterator[Finding]:
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


_SIZES = ((48, 64), (80, 50), (33, 90))
"""Height and width of the pictures that processors are given, so that resizing and cutting show."""


def judge_prepared(merged: Path, sources: Resolved) -> Iterator[Finding]:
    """Pictures drawn by code, through the merged repository's image processor and the adapter's or the base's.

    Where neither of those can be run here, Pillow being absent or their code the repository's own, a note says so.
    """
    repositories = [
        one for one in (sources.adapter.repository, sources.base.repository) if PROCESSOR in one.files
    ]
    expected = [found for one in repositories if (found := processor_of(_folder(one))) is not None]
    if not expected:
        if repositories and _prepares_pictures(repositories[0]):
            yield note("config", PROCESSOR, "was compared as a file: its image processor cannot be run here")
        return
    own = processor_of(merged)
    if own is None:
        yield fault("config", PROCESSOR, "cannot be loaded as an image processor; adapter's or base's can")
        return
    for number, (height, width) in enumerate(_SIZES):
        made = _made(own, number, height, width)
        right = [_made(one, number, height, width) for one in expected]
        if not any(_equal(made, one) for one in right):
            text = f"prepares a picture of {width} x {height} in another way than adapter and base"
            yield fault("config", PROCESSOR, text)
            return


def _folder(repository: Repository) -> Path:
    return repository.folder([name for name in (*PROCESSORS, "config.json") if name in repository.files])


def _prepares_pictures(repository: Repository) -> bool:
    return any(key.startswith("image_") for key in _read(repository, PROCESSOR))


def _made(processor: Any, number: int, height: int, width: int) -> dict[str, Tensor] | str:
    """What it makes of a picture, or the kind of its error: one that is refused must be refused by both."""
    try:
        return processed(processor, number, height=height, width=width)
    except Exception as error:  # noqa: BLE001 - foreign configs fail in every way there is
        return type(error).__name__


def _equal(left: dict[str, Tensor] | str, right: dict[str, Tensor] | str) -> bool:
    if isinstance(left, str) or isinstance(right, str):
        return left == right
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def _read(repository: Repository, name: str) -> dict[str, Any]:
    """A source's config; one that cannot be read counts as empty."""
    try:
        document = json.loads(repository.read(name))
    except ValueError:
        return {}
    return _telling(document) if isinstance(document, dict) else {}


def _telling(document: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in document.items() if key not in _INERT}
