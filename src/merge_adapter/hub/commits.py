"""One commit to one ref: large files shard by shard, then everything at once, never twice.

What the Hub has already is not sent: files equal to those of the parent are left out by the client, and large files
that a source repository holds are copied on the server.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete
from huggingface_hub.errors import FileDuplicationError, HfHubHTTPError
from huggingface_hub.hf_api import RepoFile

from merge_adapter.errors import HubError, MergeAdapterError
from merge_adapter.hub.errors import ConflictError
from merge_adapter.hub.session import RETRIED_STATUSES, once
from merge_adapter.types import Progress

if TYPE_CHECKING:
    from merge_adapter.hub.client import Hub
    from merge_adapter.hub.repository import HubRepository

Operation = CommitOperationAdd | CommitOperationCopy | CommitOperationDelete


@dataclass(frozen=True)
class Handed:
    """A large file whose content the Hub holds already, for a commit still to come. Made by `hand_over`."""

    operation: CommitOperationAdd


@dataclass(frozen=True)
class Upload:
    """One file of the commit."""

    path_in_repo: str
    place: Path | None
    """Where it lies; None for one that was handed over or that a repository of the Hub holds."""
    bytes: int
    sha256: str
    handed: Handed | None = None
    """Set for content that was handed over before."""
    fetch: Callable[[], AbstractContextManager[Path]] | None = None
    """Brings a file without a `place` to this machine, for a Hub that refuses to copy it on the server."""


@dataclass(frozen=True)
class Commit:
    """What a commit took."""

    sha: str
    bytes_sent: int
    """Bytes of the files that were handed to the Hub; xet may have deduplicated parts of them."""
    bytes_copied: int
    """Bytes of the files copied on the server, or there already."""


def hand_over(hub: Hub, repo_id: str, ref: str, upload: Upload) -> Handed | None:
    """Give the Hub the content of one large file ahead of the commit to `ref`; the file may then go away.

    None when the Hub would rather have the file inside the commit itself, as it does with small ones: then it must
    stay. Raises HubError. Content handed over twice is sent once.
    """
    operation = _addition(upload)
    _preupload_one(hub, repo_id, ref, operation, free_memory=True)
    return Handed(operation) if operation._is_uploaded else None


def commit(
    hub: Hub,
    repo_id: str,
    ref: str,
    uploads: Sequence[Upload],
    *,
    parent: HubRepository,
    delete: Sequence[str],
    sources: Sequence[HubRepository],
    message: str,
    body: str,
    progress: Progress,
) -> Commit:
    """Put `uploads` on `ref`, whose head must be `parent`, and take `delete` away.

    Raises ConflictError when the ref moved meanwhile, HubError otherwise. An interrupted call can be repeated: what
    was uploaded stays with the Hub.
    """
    there = {path: entry.lfs.sha256 for path, entry in parent.entries.items() if entry.lfs}
    copies, rest = _copied_on_server(uploads, sources, there, within=parent.repo_id)
    removed = [CommitOperationDelete(path_in_repo=path, is_folder=False) for path in delete]
    sender = _Sender(hub, repo_id, ref, parent.revision, message, body)
    additions = [_addition(upload) for upload in rest]
    sent = _preupload(sender, additions, rest, progress)
    copied = sum(upload.bytes for upload in uploads) - sent
    if copies:
        try:
            sha = sender.send([*additions, *copies, *removed], uploads)
            return Commit(sha, sent, copied)
        except MergeAdapterError as error:
            if not _refused_copy(error.__cause__):
                raise
        progress.note("The Hub refused to copy files between the repositories; they are uploaded instead.")
        inside = [copy for copy in copies if copy.src_repo_id is None]
        paths = {copy.path_in_repo for copy in copies if copy.src_repo_id is not None}
        missing = [_brought(hub, repo_id, ref, upload) for upload in uploads if upload.path_in_repo in paths]
        more = [_addition(upload) for upload in missing]
        sent += _preupload(sender, more, missing, progress)
        copied = sum(upload.bytes for upload in uploads) - sent
        additions += more
        copies = inside
    return Commit(sender.send([*additions, *copies, *removed], uploads), sent, copied)


@dataclass(frozen=True)
class _Sender:
    """The commit's destination and words."""

    hub: Hub
    repo_id: str
    ref: str
    parent: str
    message: str
    body: str

    def preupload(self, addition: CommitOperationAdd) -> None:
        _preupload_one(self.hub, self.repo_id, self.ref, addition, free_memory=False)

    def send(self, operations: Sequence[Operation], uploads: Sequence[Upload]) -> str:
        """Commit; the sha. A lost answer is resolved by looking at the ref."""

        def look() -> str | None:
            head = self.hub.open(self.repo_id, revision=self.ref)
            if head.revision == self.parent:
                return None
            if holds(head.entries, uploads):
                return head.revision
            raise ConflictError(f"{self.ref} of {self.repo_id} was changed by somebody else meanwhile")

        with self.hub.calling(
            f"commit to {self.ref} of {self.repo_id}", repo_id=self.repo_id, revision=self.ref
        ):
            return once(
                lambda: (
                    self.hub.api.create_commit(
                        self.repo_id,
                        operations,
                        commit_message=self.message,
                        commit_description=self.body,
                        revision=self.ref,
                        parent_commit=self.parent,
                    ).oid
                ),
                look,
                self.hub.patience,
            )


def holds(entries: Mapping[str, RepoFile], uploads: Sequence[Upload]) -> bool:
    """Whether a tree holds every one of `uploads`, by size, and by hash where the tree tells one of content."""
    for upload in uploads:
        entry = entries.get(upload.path_in_repo)
        if entry is None or entry.size != upload.bytes:
            return False
        if entry.lfs is not None and entry.lfs.sha256 != upload.sha256:
            return False
    return True


def _copied_on_server(
    uploads: Sequence[Upload], sources: Sequence[HubRepository], there: Mapping[str, str], *, within: str
) -> tuple[list[CommitOperationCopy], list[Upload]]:
    """Split `uploads` into copies of large files that a source holds with the same hash, and the rest.

    `within` is the repository that is committed to. What it holds itself, at another commit, is taken first: such a
    copy needs neither xet nor a storage region in common.
    """
    held: dict[str, tuple[HubRepository, str]] = {}
    for source in sorted(sources, key=lambda one: one.repo_id != within):
        for path, entry in source.entries.items():
            if entry.lfs is not None and (entry.xet_hash is not None or source.repo_id == within):
                held.setdefault(entry.lfs.sha256, (source, path))
    copies: list[CommitOperationCopy] = []
    rest: list[Upload] = []
    for upload in uploads:
        if there.get(upload.path_in_repo) == upload.sha256:
            continue  # the client would upload it again before it finds that nothing changed
        found = held.get(upload.sha256)
        if found is None:
            rest.append(upload)
            continue
        source, path = found
        across = source.repo_id != within
        copies.append(
            CommitOperationCopy(
                src_path_in_repo=path,
                path_in_repo=upload.path_in_repo,
                src_revision=source.revision,
                src_repo_id=source.repo_id if across else None,
                src_repo_type="model" if across else None,
            )
        )
    return copies, rest


def _addition(upload: Upload) -> CommitOperationAdd:
    if upload.handed is not None:
        return upload.handed.operation
    if upload.place is None:
        raise HubError(
            f"{upload.path_in_repo} left this machine, and the Hub does not hold it any more",
            hint="Run the same command again: it makes the file anew.",
        )
    return CommitOperationAdd(path_in_repo=upload.path_in_repo, path_or_fileobj=upload.place)


def _brought(hub: Hub, repo_id: str, ref: str, upload: Upload) -> Upload:
    """An upload whose content can be sent: one that lies nowhere here is fetched, handed over, and goes away again."""
    if upload.place is not None or upload.handed is not None or upload.fetch is None:
        return upload
    with upload.fetch() as place:
        return replace(upload, handed=hand_over(hub, repo_id, ref, replace(upload, place=place)))


def _preupload_one(
    hub: Hub, repo_id: str, ref: str, addition: CommitOperationAdd, *, free_memory: bool
) -> None:
    with hub.calling(f"upload {addition.path_in_repo} to {repo_id}", repo_id=repo_id, revision=ref):
        # The client repeats each request of an upload by itself.
        hub.api.preupload_lfs_files(repo_id, [addition], revision=ref, free_memory=free_memory)


def _preupload(
    sender: _Sender,
    additions: Sequence[CommitOperationAdd],
    uploads: Sequence[Upload],
    progress: Progress,
) -> int:
    """Hand over the large files one by one, so that an interruption loses one at most. Bytes of all files."""
    total = sum(upload.bytes for upload in uploads)
    with progress.task(f"Uploading to {sender.repo_id}", total) as task:
        for addition, upload in zip(additions, uploads, strict=True):
            sender.preupload(addition)
            task.advance(upload.bytes)
    return total


def _refused_copy(error: BaseException | None) -> bool:
    """Whether it was the copy that was refused, for good: another region, a server without xet."""
    if isinstance(error, FileDuplicationError):
        return True
    if not isinstance(error, HfHubHTTPError):
        return False
    url = error.response.request.url
    return error.response.status_code not in RETRIED_STATUSES and url.path.endswith("/lfs-files/duplicate")
