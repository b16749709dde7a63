"""Commits as clients send them: newline-delimited JSON of a header and operations."""

from __future__ import annotations

import base64
import binascii
import json
from dataclasses import dataclass, field
from typing import Any

from localhub.errors import BadRequestError, EntryNotFoundError
from localhub.git import GitRepository, check_path
from localhub.pointers import Pointer


@dataclass(frozen=True)
class LargeFile:
    """A large file by its content; `size` None when the client left it to the server."""

    sha256: str
    size: int | None


@dataclass
class CommitRequest:
    """What a client wants committed. Later operations on a path win over earlier ones."""

    summary: str = ""
    description: str = ""
    parent: str | None = None
    """The commit it was made for: a lock without `create_pr`, the start of the branch with it."""
    files: dict[str, bytes] = field(default_factory=dict)
    large: dict[str, LargeFile] = field(default_factory=dict)
    copies: dict[str, tuple[str, str | None]] = field(default_factory=dict)
    """Destination -> (source path, source revision), within the repository."""
    deleted: list[str] = field(default_factory=list)
    deleted_folders: list[str] = field(default_factory=list)

    @property
    def message(self) -> str:
        return f"{self.summary}\n\n{self.description}" if self.description else self.summary


def parse(raw: bytes) -> CommitRequest:
    """Read the body of a commit.

    Raises:
        BadRequestError: naming the line that is wrong.
    """
    request = CommitRequest()
    for number, line in enumerate(raw.splitlines(), 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
            key, value = item["key"], item["value"]
            _operation(request, key, value)
        except (ValueError, KeyError, TypeError, AttributeError, binascii.Error) as error:
            raise BadRequestError(f"Malformed commit, line {number}: {error!r}") from error
    if not request.summary.strip():
        raise BadRequestError("Commit summary must not be empty")
    return request


def _operation(request: CommitRequest, key: str, value: dict[str, Any]) -> None:
    if key == "header":
        request.summary = value["summary"]
        request.description = value.get("description") or ""
        request.parent = value.get("parentCommit")
        return
    path = check_path(str(value["path"]).rstrip("/") if key == "deletedFolder" else value["path"])
    if key in ("file", "lfsFile", "copy"):
        request.files.pop(path, None)
        request.large.pop(path, None)
        request.copies.pop(path, None)
    if key == "file":
        content = value["content"]
        encoded = value.get("encoding") == "base64"
        request.files[path] = base64.b64decode(content, validate=True) if encoded else content.encode()
    elif key == "lfsFile":
        if value.get("algo", "sha256") != "sha256":
            raise ValueError(f"unknown algo {value['algo']!r}")
        request.large[path] = LargeFile(str(value["oid"]), value.get("size"))
    elif key == "copy":
        request.copies[path] = (check_path(value["srcPath"]), value.get("srcRevision"))
    elif key == "deletedFile":
        request.deleted.append(path)
    elif key == "deletedFolder":
        request.deleted_folders.append(path)
    else:
        raise ValueError(f"unknown operation {key!r}")


def build_tree(git: GitRepository, head: str, request: CommitRequest, sizes: dict[str, int]) -> str:
    """The tree a request makes of the commit `head`.

    Args:
        sizes: bytes of each large file (by SHA-256), all of them in the store.

    Raises:
        EntryNotFoundError: a path to delete or copy is not there.
    """
    blobs = {path: git.store(content) for path, content in request.files.items()}
    for path, file in request.large.items():
        blobs[path] = git.store(Pointer(file.sha256, sizes[file.sha256]).encode())
    for path, (source, revision) in request.copies.items():
        blobs[path] = git.file(git.resolve(revision) if revision else head, source).oid
    deleted = [_existing(git, head, path, folder=False) for path in request.deleted]
    deleted += [_existing(git, head, path, folder=True) for path in request.deleted_folders]
    return git.edit(head, blobs, deleted)


def _existing(git: GitRepository, head: str, path: str, *, folder: bool) -> str:
    """The path, when it is there as what it is said to be; the client looks for this message."""
    what = "folder" if folder else "file"
    try:
        entry = git.entry(head, path)
    except EntryNotFoundError as error:
        raise EntryNotFoundError(f'A {what} with this name doesn\'t exist: "{path}"') from error
    if entry.is_folder != folder:
        raise EntryNotFoundError(f'A {what} with this name doesn\'t exist: "{path}"')
    return path
