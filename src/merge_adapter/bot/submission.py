"""How a job comes into the queue: what stands for it already, what it replaces, and its row."""

# ruff: noqa: S608  # the SQL is put together from constants of this file alone; values go through question marks
from __future__ import annotations

import json
import secrets
import sqlite3
from dataclasses import dataclass

from merge_adapter.bot.jobs import PRIORITY, JobRequest, Source


@dataclass(frozen=True)
class Submitted:
    """The job is stored."""

    job_id: str
    replaced: tuple[str, ...] = ()
    """Older jobs of the same adapter and ref that this one cancels."""


@dataclass(frozen=True)
class Duplicate:
    """The same thing was asked for before, or something newer was."""

    job_id: str


@dataclass(frozen=True)
class OverLimit:
    """The asker has as many open jobs as one may have."""

    limit: int


Submission = Submitted | Duplicate | OverLimit


_SAME_ADAPTER = "kind = ? AND adapter = ? AND subfolder = ? AND ref = ? AND target = ?"


def submit_within(
    db: sqlite3.Connection, request: JobRequest, now: float, *, limit: int | None = None
) -> Submission:
    """Store a job in the caller's transaction.

    Duplicate: a job for the same stands already, or for a newer commit. OverLimit: who asks has `limit` open jobs.
    Open jobs for older commits of the same adapter and ref are cancelled.
    """
    known = _standing_for(db, request) or _newer_than(db, request, now)
    if known is not None:
        return Duplicate(known)
    if limit is not None and _open_jobs(db, request.requested_by) >= limit:
        return OverLimit(limit)
    replaced = cancel_within(
        db,
        f"{_SAME_ADAPTER} AND revision <> ?",
        (*_same_adapter(request), request.revision),
        f"replaced by commit {request.revision[:12]}",
        now,
    )
    return Submitted(_insert(db, request, now), replaced)


def cancel_within(
    db: sqlite3.Connection, where: str, parameters: tuple[str, ...], reason: str, now: float
) -> tuple[str, ...]:
    """Cancel the open jobs that `where` (a constant) selects; their ids."""
    ended = db.execute(
        f"UPDATE jobs SET state = 'cancelled', cancel = ?, message = ?, finished = ?, token = NULL "
        f"WHERE state = 'queued' AND remote IS NULL AND {where} RETURNING id",
        (reason, reason, now, *parameters),
    ).fetchall()
    asked = db.execute(
        f"UPDATE jobs SET cancel = coalesce(cancel, ?), not_before = min(not_before, ?) "
        f"WHERE state IN ('queued', 'running') AND {where} RETURNING id",
        (reason, now, *parameters),
    ).fetchall()
    return tuple(row["id"] for row in (*ended, *asked))


def _standing_for(db: sqlite3.Connection, request: JobRequest) -> str | None:
    """A job for the same that is open and wanted.

    Or, for a push, that was ever carried out and no other commit since: a replayed webhook starts nothing, while a
    person may ask again.
    """
    row = db.execute(
        f"""
        SELECT id FROM jobs AS same WHERE dedupe = ? AND (
            (state IN ('queued', 'running') AND cancel IS NULL)
            OR (? AND state NOT IN ('failed', 'queued', 'running') AND NOT EXISTS (
                SELECT 1 FROM jobs AS later
                WHERE {_SAME_ADAPTER} AND later.revision <> same.revision AND later.rowid > same.rowid)))
        """,
        (request.dedupe, request.source is Source.WEBHOOK, *_same_adapter(request)),
    ).fetchone()
    return None if row is None else str(row["id"])


def _newer_than(db: sqlite3.Connection, request: JobRequest, now: float) -> str | None:
    """A job for another commit, which the Hub named when it was asked later than for `request`.

    An observation in the future tells that the clock was set back, and says nothing about order.
    """
    row = db.execute(
        f"SELECT id FROM jobs WHERE {_SAME_ADAPTER} AND revision <> ? AND observed > ? AND observed <= ?",
        (*_same_adapter(request), request.revision, request.observed, now),
    ).fetchone()
    return None if row is None else str(row["id"])


def _same_adapter(request: JobRequest) -> tuple[str, ...]:
    """The values of `_SAME_ADAPTER`."""
    return request.kind.value, request.adapter, request.subfolder, request.ref, request.target.lower()


def _open_jobs(db: sqlite3.Connection, user: str) -> int:
    row = db.execute(
        "SELECT count(*) FROM jobs WHERE requested_by = ? AND state IN ('queued', 'running')", (user,)
    ).fetchone()
    return int(row[0])


def _insert(db: sqlite3.Connection, request: JobRequest, now: float) -> str:
    """The id of the new row."""
    job_id = secrets.token_hex(6)
    values = {
        "id": job_id,
        "kind": request.kind.value,
        "adapter": request.adapter,
        "revision": request.revision,
        "ref": request.ref,
        "subfolder": request.subfolder,
        "target": request.target.lower(),
        "options": request.options.to_json(),
        "source": request.source.value,
        "requested_by": request.requested_by,
        "private": int(request.private),
        "reply": json.dumps([request.reply.repo_id, request.reply.number]) if request.reply else None,
        "token": request.token,
        "batch": request.batch,
        "observed": request.observed,
        "dedupe": request.dedupe,
        "priority": PRIORITY[request.source],
        "state": "queued",
        "created": now,
        "not_before": now,
    }
    marks = ", ".join("?" * len(values))
    db.execute(f"INSERT INTO jobs ({', '.join(values)}) VALUES ({marks})", tuple(values.values()))
    return job_id
