"""Which files of a repository hold its weights, and which tensors each of them holds.

Order of preference as in transformers: one safetensors file, safetensors shards with an index, then the
same two in pickled form.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any

from merge_adapter.checkpoint.header import Header, read_header
from merge_adapter.errors import MalformedError, NotFoundError
from merge_adapter.methods.change import TensorSpec
from merge_adapter.types import Repository

INDEX_LIMIT = 256 * 1024 * 1024
"""Bytes; the index of a model of a million tensors stays well below."""


@dataclass(frozen=True)
class WeightFile:
    """One file with weights."""

    path: str
    bytes: int
    header: Header
    """For a pickled file: what its header would be; offsets mean nothing there."""
    pickled: bool = False
    derived: bool = False
    """Whether its tensors are computed from those in the file, so that copying it would not do."""

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        return tuple(stored.spec for stored in self.header.tensors)


@dataclass(frozen=True)
class Layout:
    """The weight files of a repository."""

    files: tuple[WeightFile, ...]
    """In the order of their names."""
    index: str | None = None
    """Path of the index, None for a single file."""
    index_metadata: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Every tensor, in the order of the files."""
        return {spec.name: spec for file in self.files for spec in file.specs}

    @cached_property
    def home(self) -> Mapping[str, WeightFile]:
        """Tensor -> the file that holds it."""
        return {spec.name: file for file in self.files for spec in file.specs}

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)


def find_layout(repository: Repository, stem: str = "model", pickled_stem: str = "pytorch_model") -> Layout:
    """Read the index and the headers of a repository's weights, nothing else of a safetensors checkpoint.

    Pickled files are fetched whole, and opened with `weights_only=True`. Raises NotFoundError when there are
    no weights, MalformedError when index and files disagree.
    """
    files = repository.files
    if (single := f"{stem}.safetensors") in files:
        return Layout((_weight_file(repository, single),))
    if (index := f"{stem}.safetensors.index.json") in files:
        return _sharded(repository, index)
    if (single := f"{pickled_stem}.bin") in files:
        return Layout((_weight_file(repository, single),))
    if (index := f"{pickled_stem}.bin.index.json") in files:
        return _sharded(repository, index)
    listed = ", ".join(list(files)[:12]) or "no files at all"
    raise NotFoundError(
        f"{repository.origin} has no weights: expected {stem}.safetensors, {stem}.safetensors.index.json, "
        f"{pickled_stem}.bin or {pickled_stem}.bin.index.json, found {listed}.",
        hint="Name the folder or repository that holds the weights, or its subfolder.",
    )


def _weight_file(repository: Repository, path: str) -> WeightFile:
    size = repository.files[path]
    if path.endswith(".safetensors"):
        return WeightFile(path, size, read_header(repository, path))
    from merge_adapter.checkpoint.pickled import pickled_header  # imports torch

    return WeightFile(path, size, pickled_header(repository.local(path), path), pickled=True)


def _sharded(repository: Repository, index: str) -> Layout:
    weight_map, metadata = read_index(repository, index)
    paths = sorted(set(weight_map.values()))
    missing = [path for path in paths if path not in repository.files]
    if missing:
        raise NotFoundError(
            f"{repository.origin}: {index} names {len(missing)} file(s) that are not there: {', '.join(missing)}.",
            hint="Download the repository again; a shard is missing.",
        )
    layout = Layout(tuple(_weight_file(repository, path) for path in paths), index, metadata)
    _check_index(layout, weight_map, index)
    return layout


def read_index(repository: Repository, path: str) -> tuple[dict[str, str], dict[str, Any]]:
    """`weight_map` and `metadata` of an index, checked. Raises MalformedError."""
    if repository.files.get(path, 0) > INDEX_LIMIT:
        raise _malformed(path, f"an index of at most {INDEX_LIMIT} bytes", f"{repository.files[path]} bytes")
    try:
        content = json.loads(repository.read(path))
    except (ValueError, RecursionError) as error:
        raise _malformed(path, "JSON", f"{type(error).__name__}: {error}") from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise _malformed(path, "a weight_map from tensors to files", repr(weight_map)[:80])
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _is_plain(file):
            raise _malformed(path, f"a file beside the index for {name!r}", repr(file)[:200])
    metadata = content.get("metadata")
    return weight_map, metadata if isinstance(metadata, dict) else {}


def _is_plain(path: str) -> bool:
    """Whether a path stays inside the folder: relative, no `..`, no tricks with separators."""
    pure = PurePosixPath(path)
    return (
        bool(path) and not pure.is_absolute() and ".." not in pure.parts and not set(path) & set("\\:\0\n\r")
    )


def _check_index(layout: Layout, weight_map: Mapping[str, str], index: str) -> None:
    seen: dict[str, str] = {}
    for file in layout.files:
        for spec in file.specs:
            if spec.name in seen:
                raise _malformed(index, f"{spec.name!r} in one file", f"{seen[spec.name]} and {file.path}")
            seen[spec.name] = file.path
    lost = [name for name in weight_map if name not in seen]
    if lost:
        raise _malformed(
            index, "every tensor it lists in the files", f"{len(lost)} missing: {', '.join(lost[:5])}"
        )
    moved = [name for name, path in weight_map.items() if seen[name] != path]
    if moved:
        raise _malformed(index, f"{moved[0]!r} in {weight_map[moved[0]]}", f"it in {seen[moved[0]]}")
    unlisted = [name for name in seen if name not in weight_map]
    if unlisted:
        raise _malformed(
            index,
            "an entry for every tensor of the files",
            f"none for {len(unlisted)}: {', '.join(unlisted[:5])}",
        )


def _malformed(path: str, expected: str, got: str) -> MalformedError:
    return MalformedError(
        f"{path}: expected {expected}, got {got}.", hint="Download or save the checkpoint again."
    )
