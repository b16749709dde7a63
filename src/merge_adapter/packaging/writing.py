"""Files into the merged folder: hashed while they are written, under paths that cannot leave it."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from merge_adapter.errors import MalformedError
from merge_adapter.types import FileOrigin, OutputFile, Repository

_BLOCK = 1 << 20
"""Bytes copied at once."""
_LARGEST = 4 << 30
"""Bytes of one copied file at most: these are tokenizers and module weights, not models."""
_POINTER = b"version https://git-lfs.github.com/spec/"
"""How a Git LFS pointer begins, which a checkout without LFS has in place of a file."""
_LONGEST_NAME = 200
"""Characters of one part of a path; file systems end at 255 bytes."""


def safe_path(path: str, *, of: str) -> str:
    """`path` itself when it stays inside a folder on every system; MalformedError otherwise.

    `of` says where the path was read, for the message.
    """
    parts = path.split("/")
    safe = all(
        part not in ("", ".", "..")
        and len(part) <= _LONGEST_NAME
        and not any(character in '\\:*?"<>|' for character in part)
        and not any(unicodedata.category(character) in ("Cc", "Cf", "Cs") for character in part)
        for part in parts
    )
    if not safe:
        raise MalformedError(
            f"{of} names the path {path!r}, which is not a plain path inside the repository",
            hint="The repository may be hostile or broken; nothing of it was written there.",
        )
    return path


class Writer:
    """Writes into one folder and remembers what it wrote. A path is written once; the first one counts."""

    def __init__(self, destination: Path, *, taken: frozenset[str] = frozenset()) -> None:
        self._destination = destination
        self._taken = taken
        self._files: dict[str, OutputFile] = {}
        self.notes: list[str] = []

    @property
    def files(self) -> tuple[OutputFile, ...]:
        """What was written, sorted by path."""
        return tuple(self._files[path] for path in sorted(self._files))

    def has(self, path: str) -> bool:
        """Whether the path is written already, or belongs to the weights."""
        return path in self._files or path in self._taken

    def copy(self, repository: Repository, path: str, *, source: str, target: str = "") -> None:
        """Copy a file byte for byte to `target` (its own path when empty).

        Raises MalformedError for one that is too large, and for a Git LFS pointer.
        """
        target = safe_path(target or path, of=str(repository.origin))
        if self.has(target):
            return
        if repository.files.get(path, 0) > _LARGEST:
            raise MalformedError(
                f"{path} of {repository.origin} has {repository.files[path]} bytes, at most {_LARGEST} are copied"
            )
        place = self._place(target)
        digest = hashlib.sha256()
        size = 0
        with repository.local(path).open("rb") as read, place.open("wb") as write:
            while block := read.read(_BLOCK):
                if not size and block.startswith(_POINTER):
                    raise MalformedError(
                        f"{path} of {repository.origin} is a Git LFS pointer: the text that stands for a file not yet "
                        "downloaded",
                        hint="Run git lfs pull there, or download the repository with the hf command.",
                    )
                digest.update(block)
                size += len(block)
                write.write(block)
        self._files[target] = OutputFile(target, size, digest.hexdigest(), FileOrigin.COPIED, source)

    def write(self, path: str, content: bytes) -> None:
        """Write bytes of our own."""
        path = safe_path(path, of="merge-adapter")
        if self.has(path):
            return
        self._place(path).write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        self._files[path] = OutputFile(path, len(content), digest, FileOrigin.WRITTEN)

    def write_json(self, path: str, content: Mapping[str, Any]) -> None:
        """Write an object the way transformers lays out its configs, keys in the order given."""
        self.write(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())

    def note(self, text: str) -> None:
        """One sentence a person should read."""
        self.notes.append(text)

    def _place(self, path: str) -> Path:
        place = self._destination / path
        place.parent.mkdir(parents=True, exist_ok=True)
        return place
