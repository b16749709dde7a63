"""A folder on this machine as a Repository."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path, PurePosixPath

from merge_adapter.errors import NotFoundError
from merge_adapter.types import Origin, Repository

_SKIPPED = frozenset({".git", ".cache", "__pycache__"})
"""Folders that are bookkeeping, never part of a model."""


def folder_at(text: str, *, start: Path = Path()) -> Path | None:
    """The folder of this machine that `text` names from `start`, links followed; None where it names none.

    Text that can be no path names none either: strangers write it.
    """
    try:
        path = start / Path(text).expanduser()
        return path.resolve() if text and path.is_dir() else None
    except (OSError, RuntimeError):  # longer than a name may be; the home of a user who is not known
        return None


class Folder(Repository):
    """The files of a local folder below `subfolder`.

    Symbolic links to files are followed (the Hub's cache is made of them), links to folders are not.
    Raises NotFoundError when the folder does not exist.
    """

    def __init__(self, path: Path, subfolder: str = "") -> None:
        inner = PurePosixPath(subfolder)
        if inner.is_absolute() or ".." in inner.parts:
            raise NotFoundError(f"The subfolder {subfolder!r} is not a path inside {path}.")
        self._root = path / inner
        self._origin = Origin(folder=path, subfolder="" if subfolder in ("", ".") else inner.as_posix())
        if not self._root.is_dir():
            what = "is a file, not a folder" if self._root.is_file() else "does not exist"
            raise NotFoundError(
                f"The folder {self._root} {what}.", hint="Check the path; a Hub id is OWNER/NAME."
            )

    @property
    def origin(self) -> Origin:
        return self._origin

    @cached_property
    def files(self) -> Mapping[str, int]:
        """Every file, sorted by path: path -> bytes."""
        found: dict[str, int] = {}
        for folder, names, files in os.walk(self._root):
            names[:] = sorted(name for name in names if name not in _SKIPPED)
            for name in files:
                path = Path(folder) / name
                if path.is_file():
                    found[path.relative_to(self._root).as_posix()] = path.stat().st_size
        return dict(sorted(found.items()))

    def read(self, path: str, *, offset: int = 0, length: int | None = None) -> bytes:
        with self.local(path).open("rb") as file:
            file.seek(offset)
            return file.read(-1 if length is None else length)

    def local(self, path: str) -> Path:
        if path not in self.files:
            raise NotFoundError(f"{self._root} has no file {path!r}.")
        return self._root / path

    def folder(self, paths: Iterable[str]) -> Path:
        for path in paths:
            self.local(path)
        return self._root
