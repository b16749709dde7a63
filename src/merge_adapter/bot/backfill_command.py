"""`backfill`: the table, the run, the summary."""

from __future__ import annotations

import json
import signal
import sys
import threading
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from merge_adapter.bot import choices
from merge_adapter.bot.answers import THE_BOTS, of_whom
from merge_adapter.bot.backfill import Summary, carry_out
from merge_adapter.bot.jobs import Job, JobState
from merge_adapter.bot.logs import logging_to
from merge_adapter.bot.runners.flavours import price_text
from merge_adapter.bot.settings import BotSettings, RunnerKind
from merge_adapter.bot.survey import Candidate, Standing, priced, survey
from merge_adapter.errors import ExitCode, InputError
from merge_adapter.hub import Hub
from merge_adapter.hub.catalogue import adapters_of, models_in_collection
from merge_adapter.sizes import human_bytes

_STYLE = {
    Standing.MERGED: "green",
    Standing.TO_DO: "bold",
    Standing.REFUSED: "yellow",
    Standing.UNKNOWN: "red",
}

_WIDTH = 160
"""Columns of a table that goes into a file or a pipe, where nobody told how wide it may be."""


def run_backfill(
    settings: BotSettings,
    hub: Hub,
    *,
    authors: tuple[str, ...],
    collections: tuple[str, ...],
    file: Path | None,
    go: bool,
    parallel: int,
    as_json: bool,
) -> ExitCode:
    """Show what is to do, and with `go` do it.

    The exit code: REMOTE when the Hub did not tell of each adapter, NOT_EQUIVALENT when something was tried and not
    everything is done.
    """
    names = _names(hub, authors, collections, file)
    console = Console(stderr=True, highlight=False)
    with console.status(f"Looking at {len(names)} adapters"):
        candidates = survey(names, hub, settings)
        if settings.runner is RunnerKind.HF_JOBS:
            candidates = priced(candidates, hub, settings)
    summary = _carry_out(candidates, settings, parallel, console) if go else None
    if as_json:
        sys.stdout.write(json.dumps(_document(candidates, summary), indent=2) + "\n")
    else:
        shown = Console(highlight=False, width=None if sys.stdout.isatty() else _WIDTH)
        if candidates:
            shown.print(_table(candidates))
        shown.print(_totals(candidates, summary))
    return _exit_code(candidates, summary)


def _exit_code(candidates: tuple[Candidate, ...], summary: Summary | None) -> ExitCode:
    if summary is not None and summary.interrupted:
        return ExitCode.INTERRUPTED
    if any(one.standing is Standing.UNKNOWN for one in candidates):
        return ExitCode.REMOTE
    return ExitCode.DONE if summary is None or summary.complete else ExitCode.NOT_EQUIVALENT


def _names(
    hub: Hub, authors: tuple[str, ...], collections: tuple[str, ...], file: Path | None
) -> tuple[str, ...]:
    """Adapter ids, each once, in the order they were named."""
    names: dict[str, None] = {}
    for author in authors:
        names |= dict.fromkeys(adapters_of(hub, choices.owner(author)))
    for slug in collections:
        names |= dict.fromkeys(models_in_collection(hub, slug))
    if file is not None:
        for line in _lines(file):
            if name := line.partition("#")[0].strip():
                names[choices.repo_id(name, what="adapter")] = None
    if not (authors or collections or file):
        raise InputError("nothing was named", hint="Give --author OWNER, --collection SLUG or --file FILE.")
    return tuple(names)


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(
            encoding="utf-8-sig"
        ).splitlines()  # Windows' editors put a mark before the first
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read as UTF-8: {error}") from error


def _carry_out(
    candidates: tuple[Candidate, ...], settings: BotSettings, parallel: int, console: Console
) -> Summary:
    stop = threading.Event()
    handlers = {name: signal.signal(name, lambda *_: stop.set()) for name in (signal.SIGINT, signal.SIGTERM)}

    def told(job: Job) -> None:
        more = of_whom(job.message, THE_BOTS) or (job.publication or {}).get("url", "")
        console.print(Text(f"{job.request.place}: {job.state.value} {more}".rstrip()), soft_wrap=True)

    try:
        with logging_to(settings.log_file):
            return carry_out(candidates, settings, parallel=parallel, stop=stop, told=told)
    finally:
        for name, handler in handlers.items():
            signal.signal(name, handler)


def _table(candidates: tuple[Candidate, ...]) -> Table:
    table = Table(box=None, padding=(0, 2), header_style="dim")
    columns = ["adapter", "base", "state", "uploads", "memory", "disk"]
    elsewhere = any(one.hardware for one in candidates)
    for heading in [*columns, *(["hardware"] if elsewhere else []), ""]:
        table.add_column(heading, overflow="fold")
    for one in candidates:
        todo = one.standing is Standing.TO_DO
        sizes = (one.bytes_uploaded, one.memory_bytes, one.disk_bytes)
        cells = [Text(human_bytes(size) if todo else "") for size in sizes]
        if elsewhere:
            cells.append(Text("" if one.dollars is None else f"{one.hardware}, {price_text(one.dollars)}"))
        state = Text(one.standing.value, style=_STYLE[one.standing])
        name = f"{one.repo_id}/{one.subfolder}" if one.subfolder else one.repo_id
        table.add_row(Text(name), Text(one.base), state, *cells, Text(one.note))
    return table


def _totals(candidates: tuple[Candidate, ...], summary: Summary | None) -> Text:
    if not candidates:
        return Text("no adapter was found that this token can see")
    count = {standing: sum(one.standing is standing for one in candidates) for standing in Standing}
    lines = [", ".join(f"{number} {standing.value}" for standing, number in count.items() if number)]
    if summary is None:
        if todo := [one for one in candidates if one.standing is Standing.TO_DO]:
            upload = sum(one.bytes_uploaded for one in todo)
            prices = [one.dollars for one in todo if one.dollars is not None]
            costs = f", costs {price_text(sum(prices))}" if prices else ""
            lines.append(f"uploads about {human_bytes(upload)}{costs}; carry it out with --go")
    else:
        ended = ", ".join(f"{number} {state.value}" for state, number in sorted(summary.counts.items()))
        lines.append(f"carried out: {ended or 'nothing was to do'}")
        if summary.interrupted:
            lines.append("stopped; the same command goes on where this one was")
    return Text("\n".join(line for line in lines if line))


def _document(candidates: tuple[Candidate, ...], summary: Summary | None) -> dict[str, object]:
    jobs = summary.jobs if summary else ()
    return {
        "schema": 1,
        "adapters": [
            {
                "id": one.repo_id,
                "revision": one.revision or None,
                "subfolder": one.subfolder,
                "base": one.base or None,
                "state": one.standing.value,
                "note": one.note,
                "bytes_written": one.bytes_written,
                "bytes_uploaded": one.bytes_uploaded,
                "memory_bytes": one.memory_bytes,
                "disk_bytes": one.disk_bytes,
                "hardware": one.hardware or None,
                "dollars": one.dollars,
            }
            for one in candidates
        ],
        "jobs": [
            {
                "id": job.id,
                "adapter": job.request.adapter,
                "subfolder": job.request.subfolder,
                "state": job.state.value,
                "message": job.message,
                "publication": dict(job.publication) if job.publication else None,
            }
            for job in jobs
        ],
        "open": sum(job.state in (JobState.QUEUED, JobState.RUNNING) for job in jobs),
    }
