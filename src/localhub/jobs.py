"""Jobs: recorded as the Hub records them and, when allowed, run as processes on this machine.

A job is a shell-less command with its own environment; its output goes to a log of JSON lines. Images are
recorded but not used: what the command needs must be installed beside localhub.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from localhub.database import Database, new_id, now
from localhub.errors import BadRequestError, ConflictError, NotFoundError

SLOTS = 4
"""Jobs that run at once; others wait in SCHEDULING."""
DEFAULT_TIMEOUT = 1800
"""Seconds, as on the Hub."""
_INHERITED = ("PATH", "HOME", "LANG", "TMPDIR", "LD_LIBRARY_PATH", "OMP_NUM_THREADS")


class Stage(StrEnum):
    """Where a job stands; the names of the Hub."""

    SCHEDULING = "SCHEDULING"
    RUNNING = "RUNNING"
    COMPLETED = "COMPLETED"
    CANCELED = "CANCELED"
    ERROR = "ERROR"


FINAL = (Stage.COMPLETED, Stage.CANCELED, Stage.ERROR)


@dataclass(frozen=True)
class Job:
    """One job."""

    id: str
    owner: str
    initiator: dict[str, str]
    spec: dict[str, Any]
    """As the client sent it, secrets included: never shown."""
    stage: Stage
    message: str | None
    created_at: str
    started_at: str | None
    finished_at: str | None


def _job(row: sqlite3.Row) -> Job:
    return Job(
        id=row["id"],
        owner=row["owner"],
        initiator=json.loads(row["initiator"]),
        spec=json.loads(row["spec"]),
        stage=Stage(row["stage"]),
        message=row["message"],
        created_at=row["created_at"],
        started_at=row["started_at"],
        finished_at=row["finished_at"],
    )


class Jobs:
    """The table of jobs and, with `run`, the processes."""

    def __init__(self, database: Database, logs: Path, *, run: bool) -> None:
        self._database = database
        self._logs = logs
        self._run = run
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._stopping = False
        self._lock = threading.Lock()
        """Held while a process starts, and by whoever ends processes: none slips through in between."""
        self._pool = ThreadPoolExecutor(SLOTS, thread_name_prefix="job")
        logs.mkdir(parents=True, exist_ok=True)
        # Their processes ended with the Hub, or nobody reads their output any more.
        database.write(
            "UPDATE jobs SET stage = 'ERROR', message = 'The Hub was restarted', finished_at = ? "
            "WHERE stage = 'RUNNING'",
            now(),
        )

    def resume(self) -> None:
        """Start what was waiting when the Hub last ended."""
        if self._run:
            for row in self._database.all(
                "SELECT * FROM jobs WHERE stage = 'SCHEDULING' ORDER BY created_at, rowid"
            ):
                self._submit(row["id"])

    def _submit(self, id: str) -> None:
        """Let it run when there is a slot; a Hub that is ending leaves it to the next one."""
        with self._lock:
            if not self._stopping:
                self._pool.submit(self._work, id)

    def create(self, owner: str, initiator: dict[str, str], spec: dict[str, Any]) -> Job:
        """Record a job, and run it when jobs are run here.

        Raises:
            BadRequestError: no command, no image, or an environment that is not text.
        """
        command = spec.get("command")
        if not isinstance(command, list) or not command or not all(isinstance(c, str) for c in command):
            raise BadRequestError("command must be a non-empty list of strings")
        if not spec.get("dockerImage") and not spec.get("spaceId"):
            raise BadRequestError("dockerImage or spaceId is required")
        for key in ("environment", "secrets"):
            if not isinstance(spec.get(key, {}), dict):
                raise BadRequestError(f"{key} must be an object")
        id = new_id()
        self._database.write(
            "INSERT INTO jobs (id, owner, initiator, spec, stage, message, created_at) VALUES (?, ?, ?, ?, ?, ?, ?)",
            *(id, owner, json.dumps(initiator), json.dumps(spec), Stage.SCHEDULING.value),
            *(None if self._run else "Recorded only: the Hub was started without --run-jobs", now()),
        )
        if self._run:
            self._submit(id)
        return self.get(owner, id)

    def get(self, owner: str, id: str) -> Job:
        row = self._database.one("SELECT * FROM jobs WHERE id = ? AND owner = ?", id, owner)
        if row is None:
            raise NotFoundError(f"Job {id} not found")
        return _job(row)

    def of_owner(self, owner: str) -> list[Job]:
        """Newest first."""
        rows = self._database.all(
            "SELECT * FROM jobs WHERE owner = ? ORDER BY created_at DESC, rowid DESC", owner
        )
        return [_job(row) for row in rows]

    def cancel(self, owner: str, id: str) -> Job:
        """Stop a job.

        Raises:
            ConflictError: it has already ended.
        """
        job = self.get(owner, id)
        if job.stage in FINAL:
            raise ConflictError(f"Job is already {job.stage.value}")
        self._finish(id, Stage.CANCELED, None)
        with self._lock:
            process = self._processes.get(id)
        if process is not None:
            _end(process)
        return self.get(owner, id)

    def set_labels(self, owner: str, id: str, labels: dict[str, str]) -> Job:
        with self._database.writing():
            job = self.get(owner, id)
            self._database.write(
                "UPDATE jobs SET spec = ? WHERE id = ?", json.dumps({**job.spec, "labels": labels}), id
            )
            return self.get(owner, id)

    def log_path(self, id: str) -> Path:
        """Its output as JSON lines of `timestamp` and `data`; exists once it runs. `id` is one of a job."""
        return self._logs / f"{id}.jsonl"

    def stop(self) -> None:
        """End all processes; their jobs end in ERROR. What waits for a slot runs after the next start."""
        with self._lock:
            self._stopping = True
            self._pool.shutdown(wait=False, cancel_futures=True)
            running = list(self._processes.items())
        for id, process in running:
            self._finish(id, Stage.ERROR, "The Hub was stopped")
            _end(process)

    # ---------------------------------------------------------------------------------------- running

    def _work(self, id: str) -> None:
        row = self._database.one("SELECT * FROM jobs WHERE id = ?", id)
        assert row is not None
        spec = _job(row).spec
        with self._lock:
            # From here until the process is listed nobody looks for it, neither `cancel` nor `stop`.
            if self._stopping or not self._begin(id):
                return
            try:
                process = self._processes[id] = self._spawn(id, spec)
            except (OSError, ValueError) as error:
                reason = error.strerror if isinstance(error, OSError) else error
                self._finish(id, Stage.ERROR, f"Cannot start {spec['command'][0]!r}: {reason}")
                return
        timeout = float(spec.get("timeoutSeconds") or DEFAULT_TIMEOUT)
        watchdog = threading.Timer(timeout, self._time_out, (id, process, timeout))
        watchdog.daemon = True
        watchdog.start()
        try:
            self._copy_output(id, process)
        finally:
            code = process.wait()
            watchdog.cancel()
            with self._lock:
                del self._processes[id]
        stage = Stage.COMPLETED if code == 0 else Stage.ERROR
        self._finish(id, stage, None if code == 0 else f"Job failed with exit code: {code}")

    def _begin(self, id: str) -> bool:
        """Whether the job was waiting, and is RUNNING from now on."""
        return bool(
            self._database.write(
                "UPDATE jobs SET stage = 'RUNNING', started_at = ? WHERE id = ? AND stage = 'SCHEDULING'",
                *(now(), id),
            )
        )

    def _spawn(self, id: str, spec: dict[str, Any]) -> subprocess.Popen[bytes]:
        folder = self._logs / id
        folder.mkdir(exist_ok=True)
        environment = {key: os.environ[key] for key in _INHERITED if key in os.environ}
        # `python` is the one that runs localhub, with what is installed for it.
        environment["PATH"] = (
            f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', os.defpath)}"
        )
        environment |= {"JOB_ID": id, "ACCELERATOR": "", "CPU_CORES": str(os.cpu_count() or 1)}
        for part in ("environment", "secrets"):
            environment |= {str(key): str(value) for key, value in spec.get(part, {}).items()}
        command = [*spec["command"], *(spec.get("arguments") or [])]
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=environment,
            # Its own group, so that cancelling reaches what it starts.
            start_new_session=True,
        )

    def _copy_output(self, id: str, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        with self.log_path(id).open("a") as log, process.stdout as output:
            self._log(log, f"===== Job started at {datetime.now(UTC):%Y-%m-%d %H:%M:%S} =====")
            for line in output:
                self._log(log, line.decode("utf-8", "replace").rstrip("\r\n"))

    @staticmethod
    def _log(log: Any, text: str) -> None:
        log.write(json.dumps({"timestamp": now(), "data": text}) + "\n")
        log.flush()

    def _time_out(self, id: str, process: subprocess.Popen[bytes], seconds: float) -> None:
        self._finish(id, Stage.ERROR, f"Job timeout after {seconds:.0f} seconds")
        _end(process)

    def _finish(self, id: str, stage: Stage, message: str | None) -> None:
        """The first of cancel, timeout and exit decides."""
        self._database.write(
            "UPDATE jobs SET stage = ?, message = ?, finished_at = ? "
            "WHERE id = ? AND stage IN ('SCHEDULING', 'RUNNING')",
            *(stage.value, message, now(), id),
        )


def _end(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM to the whole group; SIGKILL to what is left of it when its leader has ended, or after two seconds."""
    try:
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(2)
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):  # nobody is left, or only what nobody has reaped
        return
    process.wait()
