"""One SQLite file for everything the bot must not forget.

Readers have a connection per thread. All writes of a process go through one thread, which commits what has
gathered since its last commit at once: a burst of webhooks costs a few fsyncs instead of one each, and nobody
waits for locks. Several processes (the server, its workers) may have the file open.
"""

from __future__ import annotations

import queue
import sqlite3
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Generic, TypeVar

from merge_adapter.errors import StorageError

T = TypeVar("T")
Clock = Callable[[], float]

_BUSY_TIMEOUT = 30.0
"""Seconds a writer waits for another process's transaction, each of which takes milliseconds."""
_GROUP = 256
"""Writes per commit at most, so that no caller waits for an endless transaction."""

SCHEMA_VERSION = 2
"""Of the tables; any other is refused."""
_SCHEMA = """
CREATE TABLE jobs (
    id TEXT PRIMARY KEY, kind TEXT NOT NULL, adapter TEXT NOT NULL, revision TEXT NOT NULL, ref TEXT NOT NULL,
    subfolder TEXT NOT NULL, target TEXT NOT NULL, options TEXT NOT NULL, source TEXT NOT NULL,
    requested_by TEXT NOT NULL, private INTEGER NOT NULL, reply TEXT, token BLOB, batch TEXT NOT NULL,
    observed REAL NOT NULL, dedupe TEXT NOT NULL, priority INTEGER NOT NULL,
    state TEXT NOT NULL, created REAL NOT NULL, not_before REAL NOT NULL, started REAL, finished REAL,
    owner TEXT, attempt INTEGER NOT NULL DEFAULT 0, failures INTEGER NOT NULL DEFAULT 0, lease_until REAL,
    cancel TEXT, stage TEXT, stage_done INTEGER, stage_total INTEGER, stage_unit TEXT, remote TEXT,
    round INTEGER NOT NULL DEFAULT 0, exit_code INTEGER, message TEXT, hint TEXT, verdict TEXT, publication TEXT,
    replied INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE INDEX jobs_by_state ON jobs (state, priority, created);
CREATE INDEX jobs_open ON jobs (target) WHERE state IN ('queued', 'running');
CREATE INDEX jobs_by_adapter ON jobs (adapter, subfolder, ref);
CREATE INDEX jobs_by_dedupe ON jobs (dedupe);
CREATE INDEX jobs_by_age ON jobs (created);
CREATE INDEX jobs_unanswered ON jobs (finished) WHERE reply IS NOT NULL AND replied = 0;
CREATE TABLE events (
    id INTEGER PRIMARY KEY AUTOINCREMENT, key TEXT NOT NULL UNIQUE, repo_id TEXT NOT NULL, body TEXT NOT NULL,
    received REAL NOT NULL, not_before REAL NOT NULL, failures INTEGER NOT NULL DEFAULT 0,
    state TEXT NOT NULL, note TEXT NOT NULL DEFAULT ''
) STRICT;
CREATE INDEX events_pending ON events (not_before) WHERE state = 'pending';
CREATE TABLE sessions (
    id TEXT PRIMARY KEY, user TEXT NOT NULL, organisations TEXT NOT NULL, token BLOB NOT NULL, expires REAL NOT NULL
) STRICT;
"""


class Store:
    """The file at `path`, made when missing. `clock` gives the time in seconds since the epoch.

    SQLite is never asked for the time: `unixepoch('subsec')` is NULL before 3.42, and a lease would never end.
    """

    def __init__(self, path: Path, *, clock: Clock = time.time) -> None:
        self.path = path
        self.clock = clock
        self._local = threading.local()
        self._readers: list[sqlite3.Connection] = []
        self._readers_lock = threading.Lock()
        self._pending: queue.SimpleQueue[_Write[Any] | None] = queue.SimpleQueue()
        self._closed = False
        self._closing = threading.Lock()
        """Nothing is put behind the end that `close` puts: it would never be written, and its caller wait for ever."""
        opened: Future[None] = Future()
        self._writer = threading.Thread(
            target=self._write_loop, args=(opened,), name="store-writer", daemon=True
        )
        self._writer.start()
        opened.result()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Commit what is pending and close every connection. Idempotent."""
        with self._closing:
            if not self._closed:
                self._closed = True
                self._pending.put(None)
        self._writer.join()
        with self._readers_lock:
            for connection in self._readers:
                connection.close()
            self._readers.clear()

    def submit(self, work: Callable[[sqlite3.Connection], T]) -> Future[T]:
        """Run `work` in the next transaction; the future holds its result once that is on the disk.

        An exception in `work` undoes its own statements alone. StorageError when nothing can be stored. A future that
        was cancelled before its turn (a request that was given up) stores nothing.
        """
        write = _Write(work)
        with self._closing:
            if self._closed:
                raise StorageError(f"{self.path} was closed")
            self._pending.put(write)
        return write.done

    def write(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """`submit`, and wait for it."""
        return self.submit(work).result()

    def check(self) -> None:
        """Raises StorageError when nothing can be stored: what is there already is written once more."""
        self.write(lambda db: db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}") and None)

    def read(self, sql: str, parameters: tuple[Any, ...] = ()) -> list[sqlite3.Row]:
        """Rows of a SELECT as of the last commit."""
        try:
            return self._reader().execute(sql, parameters).fetchall()
        except sqlite3.Error as error:
            raise _storage_error(self.path, error) from error

    def _reader(self) -> sqlite3.Connection:
        connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if connection is None:
            connection = sqlite3.connect(
                f"{self.path.absolute().as_uri()}?mode=ro",
                uri=True,
                timeout=_BUSY_TIMEOUT,
                isolation_level=None,
                check_same_thread=False,  # closed by `close`, from another thread
            )
            connection.row_factory = sqlite3.Row
            self._local.connection = connection
            with self._readers_lock:
                self._readers.append(connection)
        return connection

    def _write_loop(self, opened: Future[None]) -> None:
        try:
            connection = _open_writer(self.path)
        except (sqlite3.Error, OSError) as error:
            opened.set_exception(_storage_error(self.path, error))
            return
        except StorageError as error:
            opened.set_exception(error)
            return
        opened.set_result(None)
        running = True
        while running:
            waiting, running = self._gather()
            group = [write for write in waiting if write.done.set_running_or_notify_cancel()]
            if group:
                _commit_group(connection, group, self.path)
        connection.close()

    def _gather(self) -> tuple[list[_Write[Any]], bool]:
        """The writes that wait now, at least one; False once the store closes."""
        group: list[_Write[Any]] = []
        item = self._pending.get()
        while item is not None:
            group.append(item)
            if len(group) == _GROUP:
                return group, True
            try:
                item = self._pending.get_nowait()
            except queue.Empty:
                return group, True
        return group, False


class _Write(Generic[T]):
    """One write that waits, and the future its caller waits on."""

    def __init__(self, work: Callable[[sqlite3.Connection], T]) -> None:
        self.work = work
        self.done: Future[T] = Future()


def _open_writer(path: Path) -> sqlite3.Connection:
    path.parent.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(path, timeout=_BUSY_TIMEOUT, isolation_level=None)
    path.chmod(0o600)  # it holds sealed tokens and names of private repositories
    connection.row_factory = sqlite3.Row
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("BEGIN IMMEDIATE")
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version == 0:
        for statement in _SCHEMA.split(";\n"):
            connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    connection.execute("COMMIT")
    if version not in (0, SCHEMA_VERSION):
        connection.close()
        raise StorageError(
            f"{path} was written by another version of merge-adapter (schema {version}, expected {SCHEMA_VERSION})",
            hint="Run that version, or move the file away: jobs that wait in it are then forgotten.",
        )
    return connection


def _commit_group(connection: sqlite3.Connection, group: list[_Write[Any]], path: Path) -> None:
    """Run each write under its own savepoint and commit them together."""
    done: list[tuple[_Write[Any], Any]] = []
    try:
        connection.execute("BEGIN IMMEDIATE")
        for write in group:
            connection.execute("SAVEPOINT one")
            try:
                result = write.work(connection)
            except Exception as error:
                if not connection.in_transaction:  # SQLite undid everything: the disk is full or failing
                    raise
                connection.execute("ROLLBACK TO one")
                write.done.set_exception(
                    _storage_error(path, error) if isinstance(error, sqlite3.Error) else error
                )
            else:
                done.append((write, result))
            connection.execute("RELEASE one")
        connection.execute("COMMIT")
    except Exception as error:  # noqa: BLE001  # each caller is told; the writer lives on for the next
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        failure = _storage_error(path, error) if isinstance(error, (sqlite3.Error, OSError)) else error
        for write in group:
            if not write.done.done():
                write.done.set_exception(failure)
        return
    for write, result in done:
        write.done.set_result(result)


def _storage_error(path: Path, error: Exception) -> StorageError:
    return StorageError(
        f"the bot's store {path} cannot be used: {error}",
        hint="Check that the disk has room and that the folder is writable; nothing accepted so far is lost.",
    )
