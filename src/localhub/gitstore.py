"""Where the git repositories lie: bare ones that any git can clone by their path, each with its lock."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pygit2

from localhub.attributes import DEFAULT_ATTRIBUTES
from localhub.git import MAIN, GitRepository, signature
from localhub.repositories import Repository


class GitStore:
    """All bare repositories, `repos/<type>s/<owner>/<name>.git` below the data folder."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._locks: dict[str, threading.RLock] = {}
        self._making = threading.Lock()
        self._trash = root.parent / "trash"
        for git in root.glob("*/*/*.git"):
            # What a killed Hub left: git would refuse to move the ref for ever. One Hub at a time has this folder.
            for lock in (*git.glob("*.lock"), *(git / "refs").rglob("*.lock")):
                lock.unlink()

    def path(self, repository: Repository) -> Path:
        """Where a repository lies; owner and name were validated when it was created."""
        return self._root / f"{repository.type}s" / repository.owner / f"{repository.name}.git"

    def lock(self, repository: Repository) -> threading.RLock:
        """Held while refs of the repository change, or the place where it lies."""
        with self._making:
            return self._locks.setdefault(repository.id, threading.RLock())

    def create(self, repository: Repository, author: str) -> None:
        """A bare repository whose `main` holds one commit with `.gitattributes`."""
        path = self.path(repository)
        shutil.rmtree(path, ignore_errors=True)
        temporary = self._trash / f"new-{repository.id}"
        temporary.parent.mkdir(parents=True, exist_ok=True)
        git = pygit2.init_repository(str(temporary), bare=True, initial_head="main")
        blob = git.create_blob(DEFAULT_ATTRIBUTES.encode())
        builder = git.TreeBuilder()
        builder.insert(".gitattributes", blob, pygit2.enums.FileMode.BLOB)
        who = signature(author)
        git.create_commit(MAIN, who, who, "initial commit", builder.write(), [])
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.rename(path)

    def open(self, repository: Repository) -> GitRepository:
        """Raises FileNotFoundError when it does not lie there (any more)."""
        path = self.path(repository)
        try:
            return GitRepository(path)
        except pygit2.GitError as error:
            if path.exists():
                raise
            raise FileNotFoundError(path) from error

    def head(self, repository: Repository) -> str | None:
        """The tip of `main`; None when there is none, or no repository any more."""
        try:
            return self.open(repository).ref(MAIN)
        except FileNotFoundError:
            return None

    def move(self, old: Repository, new: Repository) -> None:
        target = self.path(new)
        shutil.rmtree(target, ignore_errors=True)  # what a crash left: nobody has this name now
        target.parent.mkdir(parents=True, exist_ok=True)
        self.path(old).rename(target)

    def put_away(self, repository: Repository) -> None:
        """Free its place for another of that name; `empty_trash` frees the space."""
        self._trash.mkdir(parents=True, exist_ok=True)
        path = self.path(repository)
        if path.exists():
            path.rename(self._trash / repository.id)

    def empty_trash(self, repository: Repository) -> None:
        """Free the space of a repository that was put away."""
        shutil.rmtree(self._trash / repository.id, ignore_errors=True)
