"""What a runner is, and what is the same wherever a job runs."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from merge_adapter.bot.jobs import (
    Job,
    JobKind,
    JobOptions,
    JobState,
    Outcome,
    Stage,
    state_of_exit,
)
from merge_adapter.bot.settings import BotSettings
from merge_adapter.errors import ExitCode, StorageError
from merge_adapter.hub.access import redact
from merge_adapter.hub.errors import RefusedError
from merge_adapter.report.lines import parse_line

LOG_FILE = "log.txt"
REPORT_FILE = "report.json"
_LOG_LIMIT = 4 << 20
"""Bytes of a job's log that are kept."""
_MERGE_OPTIONS = (
    "base_model",
    "base_revision",
    "dtype",
    "quantized_base",
    "combination",
    "density",
    "svd_rank",
)
"""Options of a merge and of a verification alike."""


@dataclass(frozen=True)
class Interrupted:
    """The runner stopped because it was told to. Nothing of the job goes on, unless it runs elsewhere and was not
    cancelled: then a later attempt follows it from there."""


class Watch:
    """How a runner tells what its job does, and learns that it is to stop. Used from any thread."""

    def __init__(self, folder: Path, token: str) -> None:
        self.folder = folder
        self.stop = threading.Event()
        """Set when the job is cancelled, the lease is lost, or the worker ends."""
        self.cancelled = threading.Event()
        """Set, before `stop`, when nobody wants the job any more."""
        self._token = token
        self._lock = threading.Lock()
        self._stage: Stage | None = None
        self._remote: str | None = None
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # it may tell of private repositories
        self._log = (folder / LOG_FILE).open("a", encoding="utf-8", errors="replace")
        self._room = max(0, _LOG_LIMIT - self._log.tell())

    @property
    def stage(self) -> Stage | None:
        """What the job does now."""
        return self._stage

    @property
    def remote(self) -> str | None:
        """Where it runs, once the runner said so."""
        return self._remote

    def runs_at(self, remote: str) -> None:
        """The job was started elsewhere: stored, so that a later attempt finds it instead of starting another."""
        self._remote = remote

    def line(self, text: str) -> None:
        """One line of the job's output: a stage, or something for its log. Tokens are blotted out.

        A log that cannot be written is cut off: whoever reads the job's output must go on reading it.
        """
        found = parse_line(text)
        if found is not None:
            begins = self._stage is None or self._stage.label != found.label
            self._stage = Stage(found.label, found.done, found.total, found.unit)
            if not begins:
                return
            text = found.label
        shown = redact(text.rstrip("\r\n"), token=self._token or None) + "\n"
        with self._lock:
            if self._log.closed or not self._room:
                return
            shown = shown if len(shown) <= self._room else "… the rest of the log was cut off\n"
            self._room = max(0, self._room - len(shown)) if not shown.startswith("…") else 0
            try:
                self._log.write(shown)
                self._log.flush()
            except OSError:
                self._room = 0

    def close(self) -> None:
        with self._lock, contextlib.suppress(OSError):
            self._log.close()


class Runner(Protocol):
    """One place where jobs run."""

    def run(self, job: Job, token: str, watch: Watch, *, slot: int) -> Outcome | Interrupted:
        """Carry the job out and say how it ended. `token` is used for this job alone; `slot` counts from 0.

        A failed outcome with exit code 5 is tried again later, from the beginning. Raises what the place where it runs
        raises; a RemoteError or an OSError is tried again too, and what `watch.runs_at` told is followed then.
        """
        ...


def arguments_of(
    job: Job, settings: BotSettings, *, device: str = "auto", disk_budget: str = ""
) -> list[str]:
    """The command line of a job, without the program's name. Never a secret."""
    request, options = job.request, job.request.options
    adapter = f"{request.adapter}@{request.revision}"
    if request.kind is JobKind.VERIFY:
        arguments = ["verify", options.merged or "", "--adapter", adapter]
    else:
        arguments = ["run", adapter]
        for base in settings.allow_base:
            arguments += ["--allow-base", base]
        if disk_budget:
            arguments += ["--disk-budget", disk_budget]
        if options.private is not None:
            arguments.append("--private" if options.private else "--public")
    arguments += combined(options)
    chosen = {
        "--subfolder": request.subfolder,
        "--target-repo": options.target_repo,
        "--license": options.license,
        "--probe-tokens": str(settings.probe_tokens or ""),
        "--device": device,
        **merge_options(options, verify=request.kind is JobKind.VERIFY),
    }
    for name, value in chosen.items():
        if value:
            arguments += [name, value]
    return [*arguments, "--json"]


def combined(options: JobOptions) -> list[str]:
    """The further adapters and all weights, as arguments."""
    # A negative weight of its own would be read as an option.
    more = [text for adapter in options.adapters for text in ("--adapter", adapter)]
    return [*more, *(f"--weight={weight}" for weight in options.weights)]


def merge_options(options: JobOptions, *, verify: bool = False) -> dict[str, str]:
    """The options of the command line that say what is merged and how; those that are not chosen are left out."""
    names = _MERGE_OPTIONS if verify else (*_MERGE_OPTIONS, "strategy", "soft_prompt")
    chosen = options.chosen()
    return {f"--{name.replace('_', '-')}": str(chosen[name]) for name in names if name in chosen}


def outcome_of(exit_code: int, document: Mapping[str, Any] | None, *, last_line: str = "") -> Outcome:
    """How a job ended, from its exit code and the document it printed."""
    document = document or {}
    error = document.get("error")
    verification = document.get("verification")
    verdict, reasons = None, []
    if isinstance(verification, dict):
        verdict, reasons = verification.get("verdict"), list(verification.get("reasons") or [])
    if isinstance(error, dict):
        message, hint = str(error.get("message", "")), str(error.get("hint", ""))
    elif exit_code == ExitCode.NOT_EQUIVALENT:
        message, hint = " ".join(map(str, reasons[:3])), "The evidence stands in the report."
    elif exit_code < 0:
        message, hint = (
            f"the job was ended by signal {-exit_code}",
            "Most often the machine ran out of memory.",
        )
    else:
        message, hint = ("" if exit_code == 0 else last_line), ""
    publication = document.get("publication")
    state = state_of_exit(exit_code)
    if state is JobState.DONE and "verification" not in document:
        state, message = JobState.FAILED, "the job ended without a report"
    kind = str(error.get("type", "")) if isinstance(error, dict) else ""
    if kind == RefusedError.__name__:
        state = JobState.REFUSED
    elif kind == StorageError.__name__:  # the machine's fault, and not for ever
        state = JobState.FAILED
    return Outcome(
        state,
        exit_code,
        message,
        hint,
        verdict if isinstance(verdict, str) else None,
        publication if isinstance(publication, dict) else None,
        kind,
    )


def keep_report(folder: Path, document: Mapping[str, Any]) -> None:
    """Keep a job's report beside its log, whole or not at all."""
    if "verification" not in document:
        return
    part = folder / f"{REPORT_FILE}.{os.getpid()}.part"  # a worker that lost its lease may write one too
    part.write_text(json.dumps(document), encoding="utf-8")
    part.replace(folder / REPORT_FILE)
