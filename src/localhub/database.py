"""One SQLite file for everything that is neither git nor a large file.

WAL journal, so that a kill -9 at any moment loses no answered write; one connection per thread, and
writes in IMMEDIATE transactions, so that two writers wait for each other instead of failing. Threads of
this process wait in a lock: SQLite's own wait is a poll that may pass over one of many writers for ever.

Whoever needs a repository's lock (`GitStore.lock`) too takes that one first, so that no two wait for
each other.
"""

from __future__ import annotations

import secrets
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

SCHEMA = """
CREATE TABLE IF NOT EXISTS accounts (
    name TEXT PRIMARY KEY COLLATE NOCASE, id TEXT NOT NULL, type TEXT NOT NULL, fullname TEXT NOT NULL,
    created_at TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS members (
    organization TEXT NOT NULL COLLATE NOCASE, user TEXT NOT NULL COLLATE NOCASE, role TEXT NOT NULL,
    PRIMARY KEY (organization, user));
CREATE TABLE IF NOT EXISTS tokens (
    digest TEXT PRIMARY KEY, user TEXT NOT NULL COLLATE NOCASE, name TEXT NOT NULL, role TEXT NOT NULL,
    resource TEXT, expires REAL, created_at TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS repositories (
    id TEXT PRIMARY KEY, type TEXT NOT NULL, owner TEXT NOT NULL COLLATE NOCASE,
    name TEXT NOT NULL COLLATE NOCASE, private INTEGER NOT NULL, gated TEXT NOT NULL,
    disabled INTEGER NOT NULL DEFAULT 0, discussions_disabled INTEGER NOT NULL DEFAULT 0,
    sdk TEXT, created_at TEXT NOT NULL, modified_at TEXT NOT NULL, downloads INTEGER NOT NULL DEFAULT 0,
    UNIQUE (type, owner, name));
CREATE TABLE IF NOT EXISTS moved (
    type TEXT NOT NULL, owner TEXT NOT NULL COLLATE NOCASE, name TEXT NOT NULL COLLATE NOCASE,
    repository TEXT NOT NULL, PRIMARY KEY (type, owner, name));
CREATE TABLE IF NOT EXISTS access_requests (
    id TEXT PRIMARY KEY, repository TEXT NOT NULL, user TEXT NOT NULL COLLATE NOCASE, status TEXT NOT NULL,
    fields TEXT NOT NULL, created_at TEXT NOT NULL, UNIQUE (repository, user));
CREATE TABLE IF NOT EXISTS discussions (
    repository TEXT NOT NULL, num INTEGER NOT NULL, id TEXT NOT NULL, title TEXT NOT NULL,
    author TEXT NOT NULL, status TEXT NOT NULL, pull_request INTEGER NOT NULL, base TEXT,
    merge_commit TEXT, base_commit TEXT, created_at TEXT NOT NULL, PRIMARY KEY (repository, num));
CREATE TABLE IF NOT EXISTS events (
    position INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, repository TEXT NOT NULL,
    num INTEGER NOT NULL, type TEXT NOT NULL, author TEXT NOT NULL, data TEXT NOT NULL,
    created_at TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS events_of_discussion ON events (repository, num);
CREATE TABLE IF NOT EXISTS webhooks (
    id TEXT PRIMARY KEY, user TEXT NOT NULL COLLATE NOCASE, url TEXT, job TEXT, watched TEXT NOT NULL,
    domains TEXT NOT NULL, secret TEXT, disabled INTEGER NOT NULL DEFAULT 0, created_at TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS deliveries (
    position INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, webhook TEXT NOT NULL,
    payload TEXT NOT NULL, attempts INTEGER NOT NULL DEFAULT 0, due REAL NOT NULL, state TEXT NOT NULL,
    status INTEGER, error TEXT, created_at TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS deliveries_due ON deliveries (state, due);
CREATE TABLE IF NOT EXISTS jobs (
    id TEXT PRIMARY KEY, owner TEXT NOT NULL COLLATE NOCASE, initiator TEXT NOT NULL, spec TEXT NOT NULL,
    stage TEXT NOT NULL, message TEXT, created_at TEXT NOT NULL, started_at TEXT, finished_at TEXT);
CREATE TABLE IF NOT EXISTS collections (
    slug TEXT PRIMARY KEY, id TEXT NOT NULL, owner TEXT NOT NULL COLLATE NOCASE, title TEXT NOT NULL,
    description TEXT, private INTEGER NOT NULL, theme TEXT NOT NULL, position INTEGER NOT NULL,
    updated_at TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS collection_items (
    id TEXT PRIMARY KEY, slug TEXT NOT NULL, type TEXT NOT NULL, item TEXT NOT NULL, note TEXT,
    position INTEGER NOT NULL, UNIQUE (slug, type, item));
CREATE TABLE IF NOT EXISTS xet_files (
    sha256 TEXT PRIMARY KEY, hash TEXT NOT NULL, size INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS xet_chunks (
    hash TEXT NOT NULL, xorb TEXT NOT NULL, repository TEXT NOT NULL, PRIMARY KEY (hash, xorb, repository))
    WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS large_files (
    repository TEXT NOT NULL, sha256 TEXT NOT NULL, PRIMARY KEY (repository, sha256));
CREATE TABLE IF NOT EXISTS secrets (name TEXT PRIMARY KEY, value TEXT NOT NULL);
"""


class Database:
    """SQLite with rows that read by column name."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._local = threading.local()
        self._writer = threading.Lock()
        connection = self._connection()
        connection.execute("PRAGMA journal_mode = WAL")
        connection.executescript(SCHEMA)

    def _connection(self) -> sqlite3.Connection:
        connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if connection is None:
            # isolation_level None: transactions begin where `writing` says, not where sqlite3 guesses.
            connection = sqlite3.connect(self._path, timeout=60, isolation_level=None)
            connection.row_factory = sqlite3.Row
            connection.execute("PRAGMA synchronous = NORMAL")
            self._local.connection = connection
        return connection

    def all(self, sql: str, *parameters: Any) -> list[sqlite3.Row]:
        """Every row of a query."""
        return self._connection().execute(sql, parameters).fetchall()

    def one(self, sql: str, *parameters: Any) -> sqlite3.Row | None:
        """The first row of a query, or None."""
        row: sqlite3.Row | None = self._connection().execute(sql, parameters).fetchone()
        return row

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction: committed when the block ends, rolled back when it raises. Nests into the outer one.

        What is read inside is what the writes find: nobody else writes meanwhile.
        """
        connection = self._connection()
        if connection.in_transaction:
            yield connection
            return
        with self._writer:
            connection.execute("BEGIN IMMEDIATE")
            self._local.then = []
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                # Also after a COMMIT that failed: the transaction would stay open and keep all others out.
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise
            then: list[Callable[[], None]] = self._local.then
        for action in then:
            action()

    def after_commit(self, action: Callable[[], None]) -> None:
        """Run `action` when the transaction of this thread is committed; at once when there is none."""
        if self._connection().in_transaction:
            self._local.then.append(action)
        else:
            action()

    def write(self, sql: str, *parameters: Any) -> int:
        """One statement in its own transaction; the number of rows it touched."""
        with self.writing() as connection:
            return connection.execute(sql, parameters).rowcount


def new_id() -> str:
    """24 hex digits, the form of the Hub's object ids."""
    return secrets.token_hex(12)


def now() -> str:
    """This moment as the Hub writes it, in UTC with milliseconds."""
    return timestamp(datetime.now(UTC))


def timestamp(moment: datetime) -> str:
    """A moment as the Hub writes it: 2026-01-31T12:00:00.000Z."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"
