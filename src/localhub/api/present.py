"""How records look as the Hub's JSON."""

from __future__ import annotations

import html
from typing import Any

from localhub.accounts import Account, Accounts
from localhub.card import card_metadata, tags_of
from localhub.community import Community, Discussion, Event
from localhub.database import timestamp
from localhub.git import Commit, Entry, GitRepository
from localhub.large import LargeFiles
from localhub.pointers import MAX_POINTER_BYTES
from localhub.repositories import Repository


def account(record: Account) -> dict[str, Any]:
    """A user as the author of something."""
    return {
        "_id": record.id,
        "name": record.name,
        "fullname": record.fullname,
        "type": record.type,
        "isPro": False,
        "isHf": False,
        "avatarUrl": "",
    }


def tree_entry(entry: Entry, large: LargeFiles, last: Commit | None = None) -> dict[str, Any]:
    """An entry of tree and paths-info; `last` is the commit that changed it, for `expand`."""
    shown: dict[str, Any] = {
        "type": "directory" if entry.is_folder else "file",
        "oid": entry.oid,
        "size": entry.size,
        "path": entry.path,
    }
    if entry.pointer is not None:
        shown["lfs"] = {
            "oid": entry.pointer.sha256,
            "size": entry.pointer.size,
            "pointerSize": entry.pointer_size,
        }
        xet_hash = large.xet_hash(entry.pointer.sha256)
        if xet_hash:
            shown["xetHash"] = xet_hash
    if last is not None:
        shown["lastCommit"] = {"id": last.sha, "title": last.title, "date": timestamp(last.moment)}
    return shown


def commit(record: Commit) -> dict[str, Any]:
    """A commit of the history."""
    return {
        "id": record.sha,
        "title": record.title,
        "message": record.body,
        "authors": [{"user": record.author, "avatar": ""}],
        "date": timestamp(record.moment),
        "formatted": {"title": html.escape(record.title), "message": html.escape(record.body)},
    }


def repository(
    record: Repository,
    git: GitRepository,
    sha: str,
    *,
    blobs: bool = False,
) -> dict[str, Any]:
    """A repository as model_info and list_models give it.

    Args:
        blobs: with size and ids of each file.
    """
    readme = git.text(sha, "README.md")
    card = card_metadata(readme or "")
    entries = [entry for entry in git.entries(sha, recursive=True) if not entry.is_folder]
    head = git.commit(sha)
    shown: dict[str, Any] = {
        "_id": record.id,
        "id": record.full_name,
        "author": record.owner,
        "sha": sha,
        "lastModified": timestamp(head.moment),
        "createdAt": record.created_at,
        "private": record.private,
        "gated": record.gated.value or False,
        "disabled": record.disabled,
        "downloads": record.downloads,
        "likes": 0,
        "tags": tags_of(card, [entry.path for entry in entries]),
        "cardData": card or None,
        "usedStorage": sum(entry.size for entry in entries),
        "siblings": [_sibling(entry, blobs=blobs) for entry in entries],
    }
    if record.type == "model":
        shown["modelId"] = record.full_name
        for key in ("library_name", "pipeline_tag"):
            if isinstance(card.get(key), str):
                shown[key] = card[key]
    if record.type == "space":
        shown["sdk"] = record.sdk
        shown["subdomain"] = f"{record.owner}-{record.name}".lower().replace(".", "-")
    return shown


def _sibling(entry: Entry, *, blobs: bool) -> dict[str, Any]:
    shown: dict[str, Any] = {"rfilename": entry.path}
    if blobs:
        shown |= {"size": entry.size, "blobId": entry.oid}
        if entry.pointer is not None:
            size = entry.pointer_size or MAX_POINTER_BYTES
            shown["lfs"] = {"sha256": entry.pointer.sha256, "size": entry.pointer.size, "pointerSize": size}
    return shown


def event(record: Event, accounts: Accounts) -> dict[str, Any]:
    """An event of a discussion."""
    data = record.data
    if record.type == "comment":
        latest = data["latest"]
        data = {**data, "latest": {**latest, "html": f"<p>{html.escape(latest['raw'])}</p>"}}
    return {
        "id": record.id,
        "author": account(accounts.get(record.author)),
        "createdAt": record.created_at,
        "type": record.type,
        "data": data,
    }


def discussion(record: Discussion, repository: Repository, accounts: Accounts) -> dict[str, Any]:
    """A discussion in a list."""
    return {
        "id": record.id,
        "num": record.num,
        "title": record.title,
        "author": account(accounts.get(record.author)),
        "status": record.status.value,
        "isPullRequest": record.is_pull_request,
        "createdAt": record.created_at,
        "pinned": False,
        "repo": {"name": repository.full_name, "type": repository.type},
    }


def discussion_details(
    record: Discussion,
    repository: Repository,
    accounts: Accounts,
    community: Community,
    git: GitRepository,
    *,
    diff: bool,
) -> dict[str, Any]:
    """A discussion with its events, and for a pull request its diff and conflicts."""
    events = [event(one, accounts) for one in community.events(record)]
    shown = {**discussion(record, repository, accounts), "events": events, "numComments": len(events)}
    if not record.is_pull_request:
        return shown
    assert record.base is not None
    changes: dict[str, Any] = {"base": record.base}
    if record.merge_commit:
        changes["mergeCommitId"] = record.merge_commit
    shown |= {"changes": changes, "filesWithConflicts": []}
    head, base = git.ref(record.ref), git.ref(record.base)
    if record.status.value in ("open", "draft") and head and base:
        shown["filesWithConflicts"] = git.merge(base, head)[1]
    if diff:
        shown["diff"] = pull_request_patch(record, git)
    return shown


def pull_request_patch(record: Discussion, git: GitRepository) -> str:
    """What a pull request changes, or changed when it was merged."""
    if record.merge_commit and record.base_commit:
        return git.patch(record.base_commit, record.merge_commit)
    head, base = git.ref(record.ref), git.ref(record.base or "")
    if head is None or base is None:
        return ""
    return git.patch(git.merge_base(base, head), head)
