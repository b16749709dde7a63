"""Discussions and pull requests: records, their events, and who may do what."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from localhub.database import Database, new_id, now
from localhub.errors import BadRequestError, ConflictError, NotFoundError
from localhub.repositories import Repository


class Status(StrEnum):
    """States of a discussion; the last two are for pull requests only."""

    OPEN = "open"
    CLOSED = "closed"
    MERGED = "merged"
    DRAFT = "draft"


@dataclass(frozen=True)
class Discussion:
    """A discussion or pull request without its events."""

    repository: str
    num: int
    id: str
    title: str
    author: str
    status: Status
    is_pull_request: bool
    base: str | None
    """Full ref a pull request wants to change."""
    merge_commit: str | None
    base_commit: str | None
    """Tip of the base just before the merge."""
    created_at: str

    @property
    def ref(self) -> str:
        """Where the commits of a pull request lie."""
        return f"refs/pr/{self.num}"


@dataclass(frozen=True)
class Event:
    """One thing that happened in a discussion: `comment`, `status-change`, `title-change` or `commit`."""

    id: str
    type: str
    author: str
    data: dict[str, Any]
    created_at: str


def _discussion(row: sqlite3.Row) -> Discussion:
    return Discussion(
        repository=row["repository"],
        num=row["num"],
        id=row["id"],
        title=row["title"],
        author=row["author"],
        status=Status(row["status"]),
        is_pull_request=bool(row["pull_request"]),
        base=row["base"],
        merge_commit=row["merge_commit"],
        base_commit=row["base_commit"],
        created_at=row["created_at"],
    )


def _event(row: sqlite3.Row) -> Event:
    return Event(row["id"], row["type"], row["author"], json.loads(row["data"]), row["created_at"])


class Community:
    """The tables of discussions and events. Permissions are checked by the API."""

    def __init__(self, database: Database) -> None:
        self._database = database

    # ---------------------------------------------------------------------------------------- reading

    def discussions(
        self,
        repository: Repository,
        *,
        author: str | None = None,
        pull_requests: bool | None = None,
        statuses: Iterable[Status] | None = None,
    ) -> list[Discussion]:
        """Newest first, filtered where an argument is given."""
        rows = self._database.all(
            "SELECT * FROM discussions WHERE repository = ? ORDER BY num DESC", repository.id
        )
        wanted = None if statuses is None else set(statuses)
        return [
            discussion
            for discussion in map(_discussion, rows)
            if (author is None or discussion.author.lower() == author.lower())
            and (pull_requests is None or discussion.is_pull_request == pull_requests)
            and (wanted is None or discussion.status in wanted)
        ]

    def get(self, repository: Repository, num: int) -> Discussion:
        row = self._database.one(
            "SELECT * FROM discussions WHERE repository = ? AND num = ?", repository.id, num
        )
        if row is None:
            raise NotFoundError(f"Discussion {num} not found")
        return _discussion(row)

    def events(self, discussion: Discussion) -> list[Event]:
        rows = self._database.all(
            "SELECT * FROM events WHERE repository = ? AND num = ? ORDER BY position",
            *(discussion.repository, discussion.num),
        )
        return [_event(row) for row in rows]

    def event(self, discussion: Discussion, id: str) -> Event:
        row = self._database.one(
            "SELECT * FROM events WHERE repository = ? AND num = ? AND id = ?",
            *(discussion.repository, discussion.num, id),
        )
        if row is None:
            raise NotFoundError(f"Comment {id} not found")
        return _event(row)

    # ---------------------------------------------------------------------------------------- writing

    def open(
        self,
        repository: Repository,
        *,
        title: str,
        author: str,
        description: str,
        base: str | None = None,
        status: Status = Status.OPEN,
    ) -> tuple[Discussion, Event | None]:
        """A new discussion, or pull request when `base` is given; with its first comment, if any.

        Raises:
            BadRequestError: no title, or one of more than 200 characters.
        """
        title = check_title(title)
        with self._database.writing() as connection:
            row = connection.execute(
                "SELECT COALESCE(MAX(num), 0) + 1 AS num FROM discussions WHERE repository = ?",
                (repository.id,),
            ).fetchone()
            connection.execute(
                "INSERT INTO discussions VALUES (?, ?, ?, ?, ?, ?, ?, ?, NULL, NULL, ?)",
                (
                    repository.id,
                    row["num"],
                    new_id(),
                    title,
                    author,
                    status.value,
                    base is not None,
                    base,
                    now(),
                ),
            )
            discussion = self.get(repository, row["num"])
            comment = self.comment(discussion, author, description) if description else None
        return discussion, comment

    def add_event(self, discussion: Discussion, type: str, author: str, data: dict[str, Any]) -> Event:
        event = Event(new_id(), type, author, data, now())
        self._database.write(
            "INSERT INTO events (id, repository, num, type, author, data, created_at) VALUES (?, ?, ?, ?, ?, ?, ?)",
            *(
                event.id,
                discussion.repository,
                discussion.num,
                type,
                author,
                json.dumps(data),
                event.created_at,
            ),
        )
        return event

    def comment(self, discussion: Discussion, author: str, text: str) -> Event:
        """Raises BadRequestError for an empty comment or one over 64 KiB."""
        if not text.strip() or len(text) > 65536:
            raise BadRequestError("Comment must have between 1 and 65536 characters")
        moment = now()
        data = {
            "edited": False,
            "hidden": False,
            "latest": {"raw": text, "updatedAt": moment, "author": {"name": author}},
            "numEdits": 0,
            "history": [],
        }
        return self.add_event(discussion, "comment", author, data)

    def edit_comment(self, discussion: Discussion, event: Event, author: str, text: str) -> Event:
        """The comment with new text; the old one goes into its history."""
        if event.type != "comment" or event.data["hidden"]:
            raise BadRequestError("Only a visible comment can be edited")
        if not text.strip() or len(text) > 65536:
            raise BadRequestError("Comment must have between 1 and 65536 characters")
        history = [*event.data["history"], event.data["latest"]]
        latest = {"raw": text, "updatedAt": now(), "author": {"name": author}}
        data = {**event.data, "edited": True, "latest": latest, "numEdits": len(history), "history": history}
        return self._replace(discussion, event, data)

    def hide_comment(self, discussion: Discussion, event: Event, author: str) -> Event:
        """The comment without its text, for good."""
        if event.type != "comment":
            raise BadRequestError("Only a comment can be hidden")
        latest = {"raw": "This comment has been hidden", "updatedAt": now(), "author": {"name": author}}
        data = {**event.data, "hidden": True, "hiddenBy": author, "latest": latest, "history": []}
        return self._replace(discussion, event, data)

    def _replace(self, discussion: Discussion, event: Event, data: dict[str, Any]) -> Event:
        self._database.write("UPDATE events SET data = ? WHERE id = ?", json.dumps(data), event.id)
        return self.event(discussion, event.id)

    def rename(self, discussion: Discussion, author: str, title: str) -> Event:
        title = check_title(title)
        with self._database.writing() as connection:
            connection.execute(
                "UPDATE discussions SET title = ? WHERE repository = ? AND num = ?",
                (title, discussion.repository, discussion.num),
            )
            return self.add_event(discussion, "title-change", author, {"from": discussion.title, "to": title})

    def set_status(self, discussion: Discussion, author: str, status: Status) -> Event:
        """Open (which also makes a draft ready) or close.

        Raises:
            ConflictError: it already is in that state, or was merged.
        """
        if discussion.status is Status.MERGED:
            raise ConflictError("This pull request has already been merged")
        if discussion.status is status:
            raise ConflictError(f"Discussion is already {status.value}")
        with self._database.writing() as connection:
            connection.execute(
                "UPDATE discussions SET status = ? WHERE repository = ? AND num = ?",
                (status.value, discussion.repository, discussion.num),
            )
            return self.add_event(discussion, "status-change", author, {"status": status.value})

    def set_merged(self, discussion: Discussion, author: str, *, commit: str, base_commit: str) -> Event:
        with self._database.writing() as connection:
            connection.execute(
                "UPDATE discussions SET status = 'merged', merge_commit = ?, base_commit = ? "
                "WHERE repository = ? AND num = ?",
                (commit, base_commit, discussion.repository, discussion.num),
            )
            return self.add_event(discussion, "status-change", author, {"status": "merged"})


def check_title(title: str) -> str:
    """Raises BadRequestError unless it has 1 to 200 characters."""
    title = title.strip()
    if not 1 <= len(title) <= 200:
        raise BadRequestError(f"Title must have between 1 and 200 characters, got {len(title)}")
    return title
