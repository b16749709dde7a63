"""Webhooks: who watches what, and deliveries that are tried until they arrive.

An event is stored as one delivery per webhook before the request that caused it is answered; a thread
sends them, at most one attempt per webhook at a time and in order, with back-off. Deliveries left over
by a kill go out after the next start.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError
from urllib.request import HTTPRedirectHandler, Request, build_opener

from localhub.accounts import Accounts
from localhub.community import Discussion, Event
from localhub.database import Database, new_id, now
from localhub.errors import BadRequestError, NotFoundError
from localhub.gitstore import GitStore
from localhub.repositories import Repositories, Repository

BACKOFF = (0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
"""Seconds to wait after each failed attempt; given up after the last."""
TIMEOUT = 15.0
"""Seconds a receiver may take to answer."""
DOMAINS = frozenset({"repo", "discussion"})
WATCHED_TYPES = frozenset({"model", "dataset", "space", "user", "org", "bucket"})


@dataclass(frozen=True)
class Webhook:
    """One webhook of a user."""

    id: str
    user: str
    url: str | None
    job: dict[str, Any] | None
    """The job it starts instead of calling a URL."""
    watched: tuple[tuple[str, str], ...]
    """(type, name) pairs."""
    domains: frozenset[str]
    secret: str | None
    disabled: bool


@dataclass(frozen=True)
class Subject:
    """What an event is about."""

    repository: Repository
    base_url: str
    discussion: Discussion | None = None
    comment: Event | None = None
    refs: tuple[tuple[str, str | None, str | None], ...] = ()
    """(ref, old sha, new sha); None for created or deleted."""
    moved_to: Repository | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


def _webhook(row: sqlite3.Row) -> Webhook:
    return Webhook(
        id=row["id"],
        user=row["user"],
        url=row["url"],
        job=json.loads(row["job"]) if row["job"] else None,
        watched=tuple((kind, name) for kind, name in json.loads(row["watched"])),
        domains=frozenset(json.loads(row["domains"])),
        secret=row["secret"],
        disabled=bool(row["disabled"]),
    )


class Webhooks:
    """The table of webhooks and the queue of deliveries."""

    def __init__(
        self, database: Database, accounts: Accounts, repositories: Repositories, git: GitStore
    ) -> None:
        self._database = database
        self._accounts = accounts
        self._repositories = repositories
        self._git = git
        self.wake = threading.Event()

    # --------------------------------------------------------------------------------------- webhooks

    def of_user(self, user: str) -> list[Webhook]:
        rows = self._database.all("SELECT * FROM webhooks WHERE user = ? ORDER BY created_at, rowid", user)
        return [_webhook(row) for row in rows]

    def get(self, user: str, id: str) -> Webhook:
        row = self._database.one("SELECT * FROM webhooks WHERE id = ? AND user = ?", id, user)
        if row is None:
            raise NotFoundError(f"Webhook {id} not found")
        return _webhook(row)

    def save(
        self,
        user: str,
        *,
        id: str | None = None,
        url: str | None,
        job: dict[str, Any] | None,
        watched: Iterable[tuple[str, str]],
        domains: Iterable[str],
        secret: str | None,
    ) -> Webhook:
        """Create a webhook, or replace the one with this id.

        Raises:
            BadRequestError: not an http URL, nothing watched, or an unknown domain.
        """
        watched, domains = list(watched), list(domains)
        if job is None and not (url or "").startswith(("http://", "https://")):
            raise BadRequestError(f"Webhook url must start with http:// or https://, got {url!r}")
        if not watched or any(kind not in WATCHED_TYPES or not name for kind, name in watched):
            raise BadRequestError(f"watched needs items of type {sorted(WATCHED_TYPES)} with a name")
        if not domains or not DOMAINS.issuperset(domains):
            raise BadRequestError(f"domains must be among {sorted(DOMAINS)}, got {domains}")
        values = (
            url,
            json.dumps(job) if job else None,
            json.dumps(watched),
            json.dumps(sorted(set(domains))),
            secret,
        )
        if id is None:
            id = new_id()
            self._database.write(
                "INSERT INTO webhooks VALUES (?, ?, ?, ?, ?, ?, ?, 0, ?)", id, user, *values, now()
            )
        else:
            self._database.write(
                "UPDATE webhooks SET url = ?, job = ?, watched = ?, domains = ?, secret = ? WHERE id = ?",
                *(*values, id),
            )
        return self.get(user, id)

    def set_disabled(self, user: str, id: str, *, disabled: bool) -> Webhook:
        self._database.write("UPDATE webhooks SET disabled = ? WHERE id = ? AND user = ?", disabled, id, user)
        return self.get(user, id)

    def delete(self, user: str, id: str) -> None:
        self.get(user, id)
        with self._database.writing() as connection:
            connection.execute("DELETE FROM webhooks WHERE id = ?", (id,))
            connection.execute("DELETE FROM deliveries WHERE webhook = ? AND state = 'waiting'", (id,))

    # ----------------------------------------------------------------------------------------- events

    def emit(self, action: str, scope: str, subject: Subject) -> None:
        """Queue an event for every webhook that watches its repository and may see it."""
        domain = "discussion" if scope.startswith("discussion") else "repo"
        repository = subject.repository
        names = {
            (repository.type, repository.full_name.lower()),
            ("user", repository.owner.lower()),
            ("org", repository.owner.lower()),
        }
        rows = self._database.all("SELECT * FROM webhooks WHERE disabled = 0 ORDER BY rowid")
        hooks = [
            hook
            for hook in map(_webhook, rows)
            if domain in hook.domains
            and any((kind, name.lower()) in names for kind, name in hook.watched)
            and self._may_see(repository, hook.user)
        ]
        if not hooks:
            return
        payload = self.payload(action, scope, subject)
        for hook in hooks:
            self.queue(hook, payload)

    def _may_see(self, repository: Repository, user: str) -> bool:
        if not repository.private:
            return True
        owner = repository.owner
        return owner.lower() == user.lower() or self._accounts.role(owner, user) is not None

    def queue(self, hook: Webhook, payload: Mapping[str, Any]) -> None:
        """One delivery of a payload, stored; nothing when the webhook was deleted meanwhile."""
        full = {**payload, "webhook": {"id": hook.id, "version": 3}}
        with self._database.writing() as connection:
            connection.execute(
                "INSERT INTO deliveries (id, webhook, payload, due, state, created_at) "
                "SELECT ?, id, ?, ?, 'waiting', ? FROM webhooks WHERE id = ?",
                (new_id(), json.dumps(full), time.time(), now(), hook.id),
            )
            # Not before: whoever is woken must find it.
            self._database.after_commit(self.wake.set)

    def payload(self, action: str, scope: str, subject: Subject) -> dict[str, Any]:
        """The body of a webhook, version 3, without its `webhook` part."""
        body: dict[str, Any] = {
            "event": {"action": action, "scope": scope},
            "repo": self._repo_part(subject),
        }
        if subject.discussion is not None:
            body["discussion"] = self._discussion_part(subject, subject.discussion)
        if subject.comment is not None and subject.discussion is not None:
            body["comment"] = self._comment_part(subject, subject.discussion, subject.comment)
        if subject.refs:
            body["updatedRefs"] = [
                {"ref": ref, "oldSha": old, "newSha": new} for ref, old, new in subject.refs
            ]
        if subject.moved_to is not None:
            owner = self._accounts.get(subject.moved_to.owner)
            body["movedTo"] = {"name": subject.moved_to.full_name, "owner": {"id": owner.id}}
        return {**body, **subject.extra}

    def _repo_part(self, subject: Subject) -> dict[str, Any]:
        repository = subject.repository
        part: dict[str, Any] = {
            "type": repository.type,
            "name": repository.full_name,
            "id": repository.id,
            "private": repository.private,
            "url": {
                "web": f"{subject.base_url}{repository.web_path}",
                "api": f"{subject.base_url}{repository.api_path}",
            },
            "owner": {"id": self._accounts.get(repository.owner).id},
            "tags": [],
        }
        head = self._git.head(repository)
        if head is not None:
            part["headSha"] = head
        return part

    def _discussion_part(self, subject: Subject, discussion: Discussion) -> dict[str, Any]:
        path = f"{subject.repository.web_path}/discussions/{discussion.num}"
        part: dict[str, Any] = {
            "id": discussion.id,
            "title": discussion.title,
            "url": {
                "web": f"{subject.base_url}{path}",
                "api": f"{subject.base_url}{subject.repository.api_path}/discussions/{discussion.num}",
            },
            "status": discussion.status.value,
            "author": {"id": self._accounts.get(discussion.author).id},
            "isPullRequest": discussion.is_pull_request,
            "num": discussion.num,
            "pinned": False,
        }
        if discussion.is_pull_request:
            part["changes"] = {"base": discussion.base}
            if discussion.merge_commit:
                part["changes"]["mergeCommitId"] = discussion.merge_commit
        return part

    def _comment_part(self, subject: Subject, discussion: Discussion, comment: Event) -> dict[str, Any]:
        path = f"{subject.repository.web_path}/discussions/{discussion.num}"
        part: dict[str, Any] = {
            "id": comment.id,
            "author": {"id": self._accounts.get(comment.author).id},
            "hidden": comment.data["hidden"],
            "url": {"web": f"{subject.base_url}{path}#{comment.id}"},
        }
        if not comment.data["hidden"]:
            part["content"] = comment.data["latest"]["raw"]
        return part

    # ------------------------------------------------------------------------------------- deliveries

    def next_of_each(self) -> list[sqlite3.Row]:
        """The first waiting delivery of each webhook, whether or not its moment (`due`) has come."""
        return self._database.all(
            "SELECT d.*, w.url, w.job, w.secret, w.user FROM deliveries d JOIN webhooks w ON w.id = d.webhook "
            "WHERE d.position IN (SELECT MIN(position) FROM deliveries WHERE state = 'waiting' GROUP BY webhook) "
            "ORDER BY d.position"
        )

    def job_of(self, delivery: sqlite3.Row) -> tuple[str, dict[str, Any], dict[str, str]]:
        """For a webhook that starts a job: whose, which, and what it finds in its environment."""
        payload = json.loads(delivery["payload"])
        environment = {
            "WEBHOOK_PAYLOAD": delivery["payload"],
            "WEBHOOK_REPO_ID": payload["repo"]["name"],
            "WEBHOOK_REPO_TYPE": payload["repo"]["type"],
            "WEBHOOK_SECRET": delivery["secret"] or "",
        }
        return delivery["user"], json.loads(delivery["job"]), environment

    def deliveries(self, hook: str) -> list[dict[str, Any]]:
        """What became of each delivery of a webhook, newest first."""
        rows = self._database.all("SELECT * FROM deliveries WHERE webhook = ? ORDER BY position DESC", hook)
        return [
            {
                "id": row["id"],
                "state": row["state"],
                "attempts": row["attempts"],
                "status": row["status"],
                "error": row["error"],
                "createdAt": row["created_at"],
                "payload": json.loads(row["payload"]),
            }
            for row in rows
        ]

    def settle(self, row: sqlite3.Row, status: int | None, error: str | None) -> None:
        """Note the outcome of an attempt: delivered, to be tried again, or given up."""
        attempts = row["attempts"] + 1
        delivered = error is None
        if delivered:
            state, due = "delivered", row["due"]
        elif attempts > len(BACKOFF):
            state, due = "failed", row["due"]
        else:
            state, due = "waiting", time.time() + BACKOFF[attempts - 1]
        self._database.write(
            "UPDATE deliveries SET attempts = ?, status = ?, error = ?, state = ?, due = ? WHERE position = ? "
            "AND state = 'waiting'",
            *(attempts, status, error, state, due, row["position"]),
        )


class _NoRedirects(HTTPRedirectHandler):
    """A redirect would carry the secret to another place; the Hub does not follow them either."""

    def redirect_request(self, *_: Any) -> None:
        return None


_opener = build_opener(_NoRedirects)


def post(url: str, payload: str, secret: str | None) -> tuple[int | None, str | None]:
    """Send one payload: the HTTP status, if there was an answer, and what went wrong, if anything did."""
    headers = {"Content-Type": "application/json", "User-Agent": "localhub-webhook"}
    if secret:
        headers["X-Webhook-Secret"] = secret
    request = Request(url, data=payload.encode(), headers=headers, method="POST")  # noqa: S310 - checked by save
    try:
        with _opener.open(request, timeout=TIMEOUT) as response:
            return int(response.status), None
    except HTTPError as error:
        with error:
            return error.code, f"HTTP {error.code}"
    except (OSError, HTTPException, ValueError) as error:  # no connection, no HTTP, no URL
        return None, f"{type(error).__name__}: {error}"
