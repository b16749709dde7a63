"""Repositories of old sentence-transformers, whose transformer lies in a folder of its own, such as `0_Transformer`.

Shown as newer versions save them: the transformer's files at the root, the other modules where they were. So the
merged model loads with transformers as well, and every later stage sees one layout.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path

from merge_adapter.checkpoint.sentence import MODULES, listed_modules, transformer_folder
from merge_adapter.errors import NotFoundError
from merge_adapter.types import Origin, Repository


class Lifted(Repository):
    """A repository with the files of one folder at its root, and a modules.json that says so."""

    def __init__(self, repository: Repository, folder: str, modules: bytes) -> None:
        self._repository = repository
        self._modules = modules
        self._place: Path | None = None
        kept = {path: path for path in repository.files if not path.startswith(f"{folder}/")}
        inside = {
            path.removeprefix(f"{folder}/"): path
            for path in repository.files
            if path.startswith(f"{folder}/")
        }
        self._paths = {**kept, **inside}
        self._files = {path: repository.files[held] for path, held in sorted(self._paths.items())}
        self._files[MODULES] = len(modules)

    @property
    def origin(self) -> Origin:
        return self._repository.origin

    @property
    def files(self) -> Mapping[str, int]:
        return self._files

    def read(self, path: str, *, offset: int = 0, length: int | None = None) -> bytes:
        if path == MODULES:
            return self._modules[offset : None if length is None else offset + length]
        return self._repository.read(self._held(path), offset=offset, length=length)

    def local(self, path: str) -> Path:
        if path == MODULES:
            return self.folder([MODULES]) / MODULES
        return self._repository.local(self._held(path))

    def folder(self, paths: Iterable[str]) -> Path:
        """Links to the files under their new paths, in a folder that goes when this object does."""
        if self._place is None:
            self._place = Path(tempfile.mkdtemp(prefix="merge-adapter-base-"))
            weakref.finalize(self, shutil.rmtree, self._place, ignore_errors=True)
        for path in paths:
            target = self._place / path
            if target.exists():
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            if path == MODULES:
                target.write_bytes(self._modules)
            else:
                target.symlink_to(self.local(path).resolve())
        return self._place

    def _held(self, path: str) -> str:
        if path not in self._paths:
            raise NotFoundError(f"{self.origin} has no file {path!r}.")
        return self._paths[path]


def lifted(repository: Repository, config: str) -> Lifted | None:
    """The repository with its transformer at the root; None unless modules.json names the one folder that has it.

    `config` is the file that a transformer has: config.json, or adapter_config.json where an adapter was saved for it.
    """
    folder = transformer_folder(repository)
    if config in repository.files or not folder or f"{folder}/{config}" not in repository.files:
        return None
    modules = [
        {**entry, "path": ""} if str(entry.get("path")).strip("/") == folder else entry
        for entry in listed_modules(repository)
    ]
    return Lifted(repository, folder, (json.dumps(modules, indent=2) + "\n").encode())
