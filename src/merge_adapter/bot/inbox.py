"""Webhook events on their way from the answer to the look-up.

An event is stored before its webhook is answered, once per key however often it is delivered; what the
look-up decided is stored together with the jobs it made, in one transaction.
"""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from merge_adapter.bot.events import HubEvent, PushEvent, event_from_json, event_to_json
from merge_adapter.bot.jobs import JobRequest
from merge_adapter.bot.store import Store
from merge_adapter.bot.submission import Submission, submit_within

_LONGEST_WAIT = 300.0
"""Seconds between two look-ups of one event while the Hub is away; it is never given up."""


@dataclass(frozen=True)
class Stored:
    """The event is on the disk."""

    event_id: int


@dataclass(frozen=True)
class Known:
    """It was delivered before."""


@dataclass(frozen=True)
class Pending:
    """An event that waits for its look-up."""

    id: int
    event: HubEvent
    failures: int


class Inbox:
    """Events in `store`, looked up by one server at a time."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def put(self, event: HubEvent) -> Future[Stored | Known]:
        """Store an event; the future is done when it is on the disk.

        A push that was looked up before is Known only as long as no other push to its branch was told of since, as a
        branch may go forth, back and forth again, and as its job has not failed, as people then deliver it again. Late
        deliveries look the same, and the look-up finds that they are.
        """
        now, body = self.store.clock(), event_to_json(event)

        def work(db: sqlite3.Connection) -> Stored | Known:
            if isinstance(event, PushEvent):
                _forget_what_may_come_again(db, event)
            row = db.execute(
                "INSERT INTO events (key, repo_id, body, received, not_before, state) "
                "VALUES (?, ?, ?, ?, ?, 'pending') ON CONFLICT (key) DO NOTHING RETURNING id",
                (event.key, event.repo_id, body, now, now),
            ).fetchone()
            return Known() if row is None else Stored(row["id"])

        return self.store.submit(work)

    def due(self, limit: int = 64) -> list[Pending]:
        """Events to look up now: of each repository the oldest one, so that they stay in order.

        One whose look-up was postponed keeps no later one waiting: every look-up asks for the head as it is then.
        """
        rows = self.store.read(
            "SELECT id, body, failures FROM events WHERE id IN "
            "(SELECT min(id) FROM events WHERE state = 'pending' AND not_before <= ? GROUP BY repo_id) "
            "ORDER BY id LIMIT ?",
            (self.store.clock(), limit),
        )
        return [Pending(row["id"], event_from_json(row["body"]), row["failures"]) for row in rows]

    def settle(
        self, pending: Pending, note: str, requests: Sequence[JobRequest] = (), *, limit: int | None = None
    ) -> tuple[Submission, ...]:
        """The look-up is over: store its result and the jobs it asks for, all or nothing. What became of each.

        `limit`: open jobs that who asks may have.
        """

        def work(db: sqlite3.Connection) -> tuple[Submission, ...]:
            now = self.store.clock()
            db.execute("UPDATE events SET state = 'done', note = ? WHERE id = ?", (note, pending.id))
            return tuple(submit_within(db, request, now, limit=limit) for request in requests)

        return self.store.write(work)

    def postpone(self, pending: Pending, note: str) -> None:
        """The Hub could not be asked: look again later."""
        wait = min(_LONGEST_WAIT, 2.0 ** min(pending.failures, 30)) * (1 + random.random() / 4)  # noqa: S311
        moment = self.store.clock() + wait
        self.store.write(
            lambda db: (
                db.execute(
                    "UPDATE events SET failures = failures + 1, not_before = ?, note = ? WHERE id = ?",
                    (moment, note, pending.id),
                )
                and None
            )
        )

    def waiting(self) -> int:
        """How many events wait for their look-up."""
        return int(self.store.read("SELECT count(*) FROM events WHERE state = 'pending'")[0][0])


def _forget_what_may_come_again(db: sqlite3.Connection, event: PushEvent) -> None:
    """Forget an earlier delivery of `event` that was looked up, if its branch moved since or its job failed."""
    db.execute(
        """
        DELETE FROM events WHERE key = :key AND state = 'done' AND (
            EXISTS (SELECT 1 FROM events AS later
                WHERE later.id > events.id AND substr(later.key, 1, length(:branch)) = :branch)
            OR EXISTS (SELECT 1 FROM jobs WHERE adapter = :repo AND revision = :sha AND state = 'failed'))
        """,
        {
            "key": event.key,
            "branch": f"{event.branch_key} ",
            "repo": event.repo_id,
            "sha": event.new_sha,
        },
    )
