"""The git side of one repository: what its commits hold, and new ones.

One `GitRepository` per request, since libgit2 objects are not shared between threads. Whoever moves a ref
holds the repository's lock (`GitStore.lock`) from the look at the old tip on, so that of two writers the
second sees what the first did; libgit2 also refuses a commit whose parent is no longer the tip.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pygit2
from pygit2.enums import ObjectType, SortMode

from localhub.errors import BadRequestError, ConflictError, EntryNotFoundError, RevisionNotFoundError
from localhub.pointers import MAX_POINTER_BYTES, Pointer, parse_pointer

_SHA = re.compile(r"[0-9a-f]{7,40}")
_REF_NAME = re.compile(r"(?!/|.*(?:[/.]\.|//|@\{|\\))[^\x00-\x20\x7f~^:?*\[]+(?<!\.lock)(?<![/.])")
MAIN = "refs/heads/main"
UNREADABLE = (KeyError, pygit2.GitError)
"""What reading raises when objects are missing."""


@dataclass(frozen=True)
class Entry:
    """A file or folder of a tree."""

    path: str
    oid: str
    """Git object id."""
    is_folder: bool
    size: int
    """Bytes of the content itself (of the large file, not of its pointer); 0 for folders."""
    pointer: Pointer | None
    pointer_size: int = 0


@dataclass(frozen=True)
class Commit:
    """One commit of the history."""

    sha: str
    parents: tuple[str, ...]
    author: str
    moment: datetime
    message: str

    @property
    def title(self) -> str:
        return self.message.partition("\n")[0]

    @property
    def body(self) -> str:
        return self.message.partition("\n")[2].strip()


def check_path(path: str) -> str:
    """The path of a file in a repository, refused when it could not be one.

    Raises:
        BadRequestError: absolute, with empty, `.`, `..` or `.git` components, or control characters.
    """
    parts = path.split("/")
    bad = any(part in ("", ".", "..") or part.lower() == ".git" for part in parts)
    if bad or any(ord(c) < 32 or ord(c) == 127 for c in path) or "\\" in path:
        raise BadRequestError(f"Invalid path in repository: {path!r}")
    return path


def signature(name: str) -> Any:
    """Who commits, and now."""
    return pygit2.Signature(name, f"{name}@users.noreply.localhub")


class GitRepository:
    """One open bare repository."""

    def __init__(self, path: Path) -> None:
        self._git = pygit2.Repository(str(path))

    # ---------------------------------------------------------------------------------------- reading

    def resolve(self, revision: str) -> str:
        """The 40-digit sha of a branch, tag, full ref, commit (7 to 40 digits) or `HEAD`.

        Raises:
            RevisionNotFoundError: nothing goes by that name.
        """
        if revision == "HEAD":
            revision = MAIN
        names = [revision] if revision.startswith("refs/") else []
        names += [f"refs/heads/{revision}", f"refs/tags/{revision}", f"refs/{revision}"]
        for name in names:
            target = self.ref(name)
            if target is not None:
                return target
        if _SHA.fullmatch(revision):
            try:
                found = self._git.get(revision)
                return str(found.peel(pygit2.Commit).id)
            except (AttributeError, ValueError, KeyError, pygit2.GitError):
                pass
        raise RevisionNotFoundError(revision)

    def ref(self, name: str) -> str | None:
        """The commit a full ref name leads to, None when it does not exist."""
        try:
            return str(self._git.lookup_reference(name).peel(pygit2.Commit).id)
        except (KeyError, ValueError, pygit2.GitError):
            return None

    def refs(self, prefix: str) -> dict[str, str]:
        """Full ref names below a prefix such as `refs/heads/`, with the commits they lead to."""
        found = {}
        for name in sorted(self._git.references):
            if name.startswith(prefix):
                target = self.ref(name)
                if target is not None:
                    found[name] = target
        return found

    def _tree(self, sha: str) -> Any:
        return self._git[sha].peel(pygit2.Tree)

    def _entry(self, path: str, item: Any) -> Entry:
        if item.type == ObjectType.TREE:
            return Entry(path, str(item.id), is_folder=True, size=0, pointer=None)
        size: int = item.size
        pointer = parse_pointer(item.data) if size <= MAX_POINTER_BYTES else None
        if pointer is not None:
            return Entry(
                path, str(item.id), is_folder=False, size=pointer.size, pointer=pointer, pointer_size=size
            )
        return Entry(path, str(item.id), is_folder=False, size=size, pointer=None)

    def entry(self, sha: str, path: str) -> Entry:
        """One file or folder.

        Raises:
            EntryNotFoundError: no such path at that commit.
        """
        if path == "":
            return Entry("", str(self._tree(sha).id), is_folder=True, size=0, pointer=None)
        try:
            return self._entry(path, self._tree(sha)[path])
        except (KeyError, ValueError, pygit2.GitError) as error:
            raise EntryNotFoundError from error

    def file(self, sha: str, path: str) -> Entry:
        """One file; a folder counts as missing."""
        entry = self.entry(sha, path)
        if entry.is_folder:
            raise EntryNotFoundError
        return entry

    def entries(self, sha: str, path: str = "", *, recursive: bool = False) -> Iterator[Entry]:
        """The entries below a folder in git's order, folders before what they hold."""
        tree = self._tree(sha)
        if path:
            try:
                tree = tree[path]
            except (KeyError, ValueError) as error:
                raise EntryNotFoundError(f"{path} does not exist on this revision") from error
            if tree.type != ObjectType.TREE:
                raise EntryNotFoundError(f"{path} is not a folder")
        yield from self._walk(tree, f"{path}/" if path else "", recursive=recursive)

    def _walk(self, tree: Any, prefix: str, *, recursive: bool) -> Iterator[Entry]:
        for item in tree:
            yield self._entry(prefix + item.name, item)
            if recursive and item.type == ObjectType.TREE:
                yield from self._walk(item, f"{prefix}{item.name}/", recursive=True)

    def read(self, oid: str) -> bytes:
        """The bytes git holds for a blob; of a large file, its pointer."""
        data: bytes = self._git[oid].data
        return data

    def text(self, sha: str, path: str) -> str | None:
        """A small text file, None when it is missing or large."""
        try:
            entry = self.file(sha, path)
        except EntryNotFoundError:
            return None
        return None if entry.pointer else self.read(entry.oid).decode("utf-8", "replace")

    def commit(self, sha: str) -> Commit:
        return _commit(self._git[sha].peel(pygit2.Commit))

    def log(self, sha: str) -> Iterator[Commit]:
        """The history from a commit back, newest first."""
        for commit in self._git.walk(sha, SortMode.TOPOLOGICAL | SortMode.TIME):
            yield _commit(commit)

    def last_changes(self, sha: str, paths: Iterable[str]) -> dict[str, Commit]:
        """For each path, the commit that last changed it."""
        left = set(paths)
        found: dict[str, Commit] = {}
        for commit in self._git.walk(sha, SortMode.TOPOLOGICAL | SortMode.TIME):
            if not left:
                break
            parent = commit.parents[0].tree if commit.parents else None
            for path in list(left):
                if _oid(commit.tree, path) != (_oid(parent, path) if parent is not None else None):
                    found[path] = _commit(commit)
                    left.discard(path)
        return found

    def ahead(self, base: str, head: str) -> list[Commit]:
        """Commits of `head` that `base` lacks, oldest first."""
        walker = self._git.walk(head, SortMode.TOPOLOGICAL | SortMode.TIME)
        walker.hide(base)
        return [_commit(commit) for commit in walker][::-1]

    def merge_base(self, one: str, other: str) -> str | None:
        found = self._git.merge_base(one, other)
        return str(found) if found else None

    def patch(self, old: str | None, new: str) -> str:
        """The unified diff between two commits; `old` None shows all of `new`."""
        if old is None:
            diff = self._tree(new).diff_to_tree(swap=True)
        else:
            diff = self._git.diff(self._git[old], self._git[new])
        diff.find_similar()
        return str(diff.patch or "")

    # ---------------------------------------------------------------------------------------- writing

    def store(self, data: bytes) -> str:
        """Store a blob; its object id."""
        return str(self._git.create_blob(data))

    def edit(self, sha: str, files: Mapping[str, str], deleted: Iterable[str]) -> str:
        """A tree: that of a commit without `deleted` paths (files or folders), with `files` (path -> blob id).

        Raises:
            EntryNotFoundError: a path to delete is not there.
        """
        index = pygit2.Index()
        index.read_tree(self._tree(sha))
        for path in deleted:
            entry = self.entry(sha, path)
            if entry.is_folder:
                index.remove_all([_literal(path) + "/*"])
            else:
                index.remove(path)
        for path, oid in files.items():
            index.add(pygit2.IndexEntry(path, pygit2.Oid(hex=oid), pygit2.enums.FileMode.BLOB))
        return str(index.write_tree(self._git))

    def tree_id(self, sha: str) -> str:
        return str(self._tree(sha).id)

    def add_commit(self, ref: str | None, tree: str, parents: list[str], message: str, author: str) -> str:
        """Commit a tree; moves `ref`, whose tip must be the first parent."""
        who = signature(author)
        sha = self._git.create_commit(
            ref, who, who, message, pygit2.Oid(hex=tree), [pygit2.Oid(hex=p) for p in parents]
        )
        return str(sha)

    def set_ref(self, name: str, sha: str, *, force: bool = False) -> None:
        """Create a ref (full name), or move it with `force`.

        Raises:
            BadRequestError: not a name git allows. ConflictError: it exists.
        """
        if not _REF_NAME.fullmatch(name):
            raise BadRequestError(f"Invalid ref name: {name!r}")
        if not force and self.ref(name) is not None:
            raise ConflictError(f"Reference already exists: {name}")
        self._git.references.create(name, pygit2.Oid(hex=sha), force=force)

    def tag(self, name: str, sha: str, message: str, author: str) -> None:
        """An annotated tag when there is a message, else a light one."""
        full = f"refs/tags/{name}"
        if not message:
            self.set_ref(full, sha)
            return
        if not _REF_NAME.fullmatch(full):
            raise BadRequestError(f"Invalid tag name: {name!r}")
        if self.ref(full) is not None:
            raise ConflictError(f"Tag reference already exists: {name}")
        self._git.create_tag(name, pygit2.Oid(hex=sha), ObjectType.COMMIT, signature(author), message)

    def delete_ref(self, name: str) -> None:
        """Raises RevisionNotFoundError when it is not there."""
        if self.ref(name) is None:
            raise RevisionNotFoundError(name.partition("/")[2].partition("/")[2])
        self._git.references.delete(name)

    def merge(self, base: str, head: str) -> tuple[str, list[str]]:
        """Merge two commits in memory: the tree, or "" and the paths in conflict."""
        ancestor = self._git.merge_base(base, head)
        ours, theirs = self._git[base].peel(pygit2.Tree), self._git[head].peel(pygit2.Tree)
        old = self._git[ancestor].peel(pygit2.Tree) if ancestor else self._git[self._empty_tree()]
        index = self._git.merge_trees(old, ours, theirs)
        if index.conflicts is not None:
            paths = {side.path for sides in index.conflicts for side in sides if side is not None}
            if paths:
                return "", sorted(paths)
        return str(index.write_tree(self._git)), []

    def _empty_tree(self) -> Any:
        return self._git.TreeBuilder().write()


def _literal(path: str) -> str:
    """The path with the characters git globs by escaped."""
    return re.sub(r"([*?\[\\])", r"\\\1", path)


def _oid(tree: Any, path: str) -> str | None:
    try:
        return str(tree[path].id)
    except KeyError:
        return None


def _commit(commit: Any) -> Commit:
    return Commit(
        str(commit.id),
        tuple(str(parent) for parent in commit.parent_ids),
        commit.author.name,
        datetime.fromtimestamp(commit.commit_time, UTC),
        commit.message,
    )
