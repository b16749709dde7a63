"""Jobs read back from the store: one, some, and how many."""

# ruff: noqa: S608  # the SQL is put together from constants of this file alone; values go through question marks
from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass

from merge_adapter.bot.jobs import Job, JobKind, JobOptions, JobRequest, JobState, Reply, Source, Stage
from merge_adapter.bot.store import Store


@dataclass(frozen=True)
class Viewer:
    """Who looks. Private jobs are shown to who asked for them and to the owners of the adapter."""

    user: str = ""
    organisations: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    """Organisations whose repositories they may write to."""

    @property
    def namespaces(self) -> tuple[str, ...]:
        return (self.user, *self.organisations) if self.user else ()

    def may_see(self, job: Job) -> bool:
        request = job.request
        mine = bool(self.user) and request.requested_by == self.user
        return not request.private or mine or request.adapter.partition("/")[0] in self.namespaces

    def may_change(self, job: Job) -> bool:
        """Whether they may cancel it: who asked for it, or may write to the adapter."""
        owns = job.request.adapter.partition("/")[0] in (self.user, *self.writes)
        return bool(self.user) and (job.request.requested_by == self.user or owns)


@dataclass(frozen=True)
class JobFilter:
    """Which jobs to list."""

    states: tuple[JobState, ...] = ()
    """Empty: all."""
    text: str = ""
    """Part of the adapter's or target's name."""
    batch: str = ""
    viewer: Viewer | None = None
    """None: everything, for the bot itself."""


def find_job(store: Store, job_id: str) -> Job | None:
    """The job of that id."""
    rows = store.read("SELECT * FROM jobs WHERE id = ?", (job_id,))
    return job_from_row(rows[0]) if rows else None


def list_jobs(
    store: Store, wanted: JobFilter | None = None, *, limit: int = 50, offset: int = 0
) -> list[Job]:
    """Jobs, the newest first."""
    where, parameters = _where(wanted or JobFilter())
    rows = store.read(
        f"SELECT * FROM jobs WHERE {where} ORDER BY created DESC, rowid DESC LIMIT ? OFFSET ?",
        (*parameters, limit, offset),
    )
    return [job_from_row(row) for row in rows]


def count_jobs(store: Store, wanted: JobFilter | None = None) -> Mapping[JobState, int]:
    """How many jobs there are in each state that occurs."""
    where, parameters = _where(wanted or JobFilter())
    rows = store.read(f"SELECT state, count(*) AS n FROM jobs WHERE {where} GROUP BY state", parameters)
    return {JobState(row["state"]): row["n"] for row in rows}


def oldest_waiting(store: Store) -> float | None:
    """When the job was stored that waits longest and might run now."""
    rows = store.read(
        "SELECT min(created) AS oldest FROM jobs WHERE state = 'queued' AND not_before <= ?", (store.clock(),)
    )
    oldest: float | None = rows[0]["oldest"]
    return oldest


def job_from_row(row: sqlite3.Row) -> Job:
    """A row of the table as a Job."""
    reply = json.loads(row["reply"]) if row["reply"] else None
    request = JobRequest(
        adapter=row["adapter"],
        revision=row["revision"],
        source=Source(row["source"]),
        kind=JobKind(row["kind"]),
        ref=row["ref"],
        subfolder=row["subfolder"],
        options=JobOptions.from_json(row["options"]),
        requested_by=row["requested_by"],
        private=bool(row["private"]),
        reply=Reply(*reply) if reply else None,
        token=row["token"],
        batch=row["batch"],
        observed=row["observed"],
    )
    stage = (
        Stage(row["stage"], row["stage_done"] or 0, row["stage_total"], row["stage_unit"] or "")
        if row["stage"]
        else None
    )
    return Job(
        id=row["id"],
        request=request,
        state=JobState(row["state"]),
        created=row["created"],
        started=row["started"],
        finished=row["finished"],
        not_before=row["not_before"],
        owner=row["owner"],
        attempt=row["attempt"],
        failures=row["failures"],
        lease_until=row["lease_until"],
        cancel=row["cancel"],
        stage=stage,
        remote=row["remote"],
        round=row["round"],
        exit_code=row["exit_code"],
        message=row["message"] or "",
        hint=row["hint"] or "",
        verdict=row["verdict"],
        publication=json.loads(row["publication"]) if row["publication"] else None,
    )


def _where(wanted: JobFilter) -> tuple[str, tuple[str, ...]]:
    """A WHERE clause of constants, and what its question marks stand for."""
    clauses, parameters = ["1"], list[str]()
    if wanted.states:
        clauses.append(f"state IN ({', '.join('?' * len(wanted.states))})")
        parameters += [state.value for state in wanted.states]
    if wanted.text:
        clauses.append("(instr(lower(adapter), ?) OR instr(lower(target), ?))")
        parameters += [wanted.text.lower()] * 2
    if wanted.batch:
        clauses.append("batch = ?")
        parameters.append(wanted.batch)
    if wanted.viewer is not None:
        names = wanted.viewer.namespaces
        clauses.append(
            "(private = 0 OR (requested_by <> '' AND requested_by = ?) "
            f"OR substr(adapter, 1, instr(adapter, '/') - 1) IN ({', '.join('?' * len(names)) or 'NULL'}))"
        )
        parameters += [wanted.viewer.user, *names]
    return " AND ".join(clauses), tuple(parameters)
