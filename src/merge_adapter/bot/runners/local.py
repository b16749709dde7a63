"""Jobs on this machine: each in a process of its own, which ends with its worker."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from merge_adapter.bot.jobs import Job, JobState, Outcome
from merge_adapter.bot.runners.base import Interrupted, Watch, arguments_of, keep_report, outcome_of
from merge_adapter.bot.settings import PREFIX, BotSettings
from merge_adapter.errors import ExitCode
from merge_adapter.report.lines import VARIABLE

_GRACE = 20.0
"""Seconds a job may take to clear up after it was told to stop."""
_DRAIN = 5.0
"""Seconds that the rest of a job's output may take to arrive once it has ended."""
_FOLDER = "merge-adapter-job-"
"""How the names of jobs' folders begin; the job's id follows."""
_WITHHELD = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC", "OAUTH_", "GITHUB_TOKEN", PREFIX)
"""How the names begin of variables a job does not inherit: the bot's own credentials and settings."""


class LocalRunner:
    """Runs `merge-adapter run … --json` and reads what it prints."""

    def __init__(self, settings: BotSettings) -> None:
        self._settings = settings

    def run(self, job: Job, token: str, watch: Watch, *, slot: int) -> Outcome | Interrupted:
        """See `Runner`. Folders of this machine cannot be meant: the job's working directory is empty."""
        arguments = arguments_of(
            job,
            self._settings,
            device=self._settings.device_of(slot),
            disk_budget=self._settings.disk_budget,
        )
        empty = _own_folder(job.id)
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", "merge_adapter.bot.runners.child", *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=empty,
                env={**self._environment(token), "TMPDIR": empty},
                start_new_session=True,  # Ctrl-C is for the server, which hands leases back
            )
            return self._follow(process, watch)
        finally:
            shutil.rmtree(empty, ignore_errors=True)

    def _environment(self, token: str) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if not withheld(name)}
        return {
            **inherited,
            "HF_TOKEN": token,
            **({"HF_ENDPOINT": self._settings.endpoint} if self._settings.endpoint else {}),
            VARIABLE: "lines",
            "PYTHONUNBUFFERED": "1",
            "NO_COLOR": "1",
        }

    def _follow(self, process: subprocess.Popen[bytes], watch: Watch) -> Outcome | Interrupted:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        printed: list[bytes] = []
        last: deque[str] = deque(maxlen=3)
        readers = (
            threading.Thread(target=lambda: printed.append(process.stdout.read()), daemon=True),  # type: ignore[union-attr]  # asserted above
            threading.Thread(target=_read_lines, args=(process.stderr, watch, last), daemon=True),
        )
        for reader in readers:
            reader.start()
        deadline = time.monotonic() + self._settings.job_timeout
        try:
            while process.poll() is None and not watch.stop.is_set() and time.monotonic() < deadline:
                watch.stop.wait(0.05)
            stopped = process.poll() is None
        finally:
            _end(process)
        for reader in readers:
            reader.join(_DRAIN)
        for stream in (process.stdin, process.stdout, process.stderr):
            with contextlib.suppress(OSError):
                stream.close()
        document = _document(b"".join(printed))
        finished = (
            process.returncode == ExitCode.DONE and "verification" in document
        )  # before it heard of the stop
        if stopped and not finished:
            return Interrupted() if watch.stop.is_set() else _timed_out(self._settings.job_timeout)
        keep_report(watch.folder, document)
        return outcome_of(process.returncode, document, last_line=_telling(last, process.returncode))


def _own_folder(job_id: str) -> str:
    """An empty folder for the job's work. Those of earlier attempts, whose worker was killed, are removed."""
    remove_left_behind(lambda found: found == job_id)
    return tempfile.mkdtemp(prefix=f"{_FOLDER}{job_id}-")


def remove_left_behind(over: Callable[[str], bool]) -> None:
    """Remove the folders that killed workers left, of those jobs (by their id) that are `over`: nobody works there."""
    for left in Path(tempfile.gettempdir()).glob(f"{_FOLDER}*"):
        if over(left.name.removeprefix(_FOLDER).partition("-")[0]):
            shutil.rmtree(left, ignore_errors=True)


def withheld(name: str) -> bool:
    """Whether a variable of this environment is kept from jobs."""
    return name.startswith(_WITHHELD)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask a process that still runs to stop, then make it."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _telling(last: deque[str], code: int) -> str:
    """Of the last lines the one that says what went wrong: a bug's exception stands above the two that report it."""
    if code == ExitCode.BUG and len(last) == 3:
        return last[0]
    return last[-1] if last else ""


def _read_lines(stream: IO[bytes], watch: Watch, last: deque[str]) -> None:
    """Log every line; remember the last that say something. A line without end is cut into pieces."""
    while chunk := stream.readline(16384):
        text = chunk.decode("utf-8", errors="replace")
        watch.line(text)
        if text.strip():
            last.append(text.strip())


def _document(printed: bytes) -> Mapping[str, Any]:
    try:
        parsed = json.loads(printed or b"{}")
    except ValueError:
        return {}
    return parsed if isinstance(parsed, dict) else {}


def _timed_out(seconds: float) -> Outcome:
    return Outcome(
        JobState.FAILED,
        int(ExitCode.BUG),
        f"stopped after {seconds:.0f} seconds",
        "Raise job_timeout in the bot's settings, or run it on a faster machine.",
    )
