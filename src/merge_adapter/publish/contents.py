"""What is uploaded: exactly the files that the report lists, and only while they are what it says."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_adapter.card import readdressed
from merge_adapter.errors import InputError
from merge_adapter.licences import read_licence
from merge_adapter.packaging.metadata import README
from merge_adapter.publish.settings import PublishSettings, Target
from merge_adapter.report.document import REPORT_FILE, dump
from merge_adapter.types import Progress

if TYPE_CHECKING:
    from merge_adapter.hub import Handed, Hub

_BLOCK = 4 << 20
"""Bytes hashed at a time."""


@dataclass(frozen=True)
class Gone:
    """A weight file that was made and judged, and has left this machine or was never on it."""

    handed: Handed | None = None
    """Its content as the Hub was given it; None for a file that is copied on the server."""
    fetch: Callable[[], AbstractContextManager[Path]] | None = None
    """Brings a file that is copied on the server here, for a Hub that refuses the copy."""


@dataclass(frozen=True)
class LocalFile:
    """One file to publish."""

    path: str
    """Inside the merged folder, with forward slashes."""
    place: Path | None
    """None for a file that is not on this machine: `gone` says where it is."""
    bytes: int
    sha256: str
    gone: Gone | None = None


def check_contents(
    folder: Path, report: Mapping[str, Any], progress: Progress, *, gone: Mapping[str, Gone] | None = None
) -> tuple[LocalFile, ...]:
    """The files of `report` and the report itself, after comparing each with its recorded size and hash.

    Those in `gone` are not in the folder; the Hub compares their hashes itself. Raises InputError naming every file
    that is missing or differs. Files the report does not list stay here.
    """
    gone = gone or {}
    elsewhere = [
        LocalFile(entry["path"], None, entry["bytes"], entry["sha256"], gone[entry["path"]])
        for entry in report["output"]["files"]
        if entry["path"] in gone
    ]
    listed = [entry for entry in report["output"]["files"] if entry["path"] not in gone]
    files: list[LocalFile] = []
    problems: list[str] = []
    root = folder.resolve()
    with progress.task("Checking the folder", sum(entry["bytes"] for entry in listed)) as task:
        for entry in listed:
            place = root.joinpath(*_parts(entry["path"]))
            problem = _compare(root, place, entry, task.advance)
            if problem:
                problems.append(f"{entry['path']}: {problem}")
            files.append(LocalFile(entry["path"], place, entry["bytes"], entry["sha256"]))
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise InputError(
            f"{folder} is not what its {REPORT_FILE} describes: {shown}",
            hint="Nothing was published. Merge again; a folder is published only as the gate judged it.",
        )
    return (*files, *elsewhere, _report_file(root, report))


def addressed(
    files: tuple[LocalFile, ...], report: Mapping[str, Any], folder: Path, target: Target, room: Path
) -> tuple[tuple[LocalFile, ...], Mapping[str, Any]]:
    """`files` and `report` with a card whose example loads the model from `target`.

    Where a folder goes was not known when it was merged. The new card and its report are written to `room`; the folder
    stays as it is.
    """
    card = next((file for file in files if file.path == README), None)
    if card is None or card.place is None:
        return files, report
    text = card.place.read_text(encoding="utf-8", errors="replace")
    content = readdressed(text, folder, target.repo_id, target.path_in_repo).encode()
    if content == text.encode():
        return files, report
    new = LocalFile(README, room / README, len(content), sha256_of([content]))
    (room / README).write_bytes(content)
    output = report["output"]
    entries = [
        entry | {"bytes": new.bytes, "sha256": new.sha256} if entry["path"] == README else entry
        for entry in output["files"]
    ]
    report = {**report, "output": {**output, "files": entries}}
    (room / REPORT_FILE).write_text(dump(report), encoding="utf-8")
    kept = tuple(file for file in files if file.path not in (README, REPORT_FILE))
    return (new, *kept, _report_file(room, report)), report


def check_card(folder: Path, settings: PublishSettings, *, hub: Hub) -> None:
    """Raise InputError for a card that the Hub would refuse, or that does not state the licence that was given."""
    place = folder / README
    if not place.is_file():
        return
    if settings.license is not None and settings.licence is not None:
        stated = read_licence(read_card(place))
        if stated.id != settings.licence.licence.id:
            raise InputError(
                f"the model card in {folder} states the licence {stated}, but {settings.license} was given",
                hint=f"It is written into the card by: merge-adapter run ADAPTER --license {settings.license}",
            )
    hub.check_card(place.read_text(encoding="utf-8", errors="replace"))


def read_card(place: Path) -> Mapping[str, Any]:
    """The metadata of a model card; empty where there is none, or none that the Hub would read."""
    from huggingface_hub import metadata_load
    from yaml import YAMLError

    if not place.is_file():
        return {}
    try:
        metadata = metadata_load(place)
    except (YAMLError, UnicodeDecodeError):
        return {}
    return metadata if isinstance(metadata, dict) else {}


def sha256_of(chunks: Iterable[bytes]) -> str:
    """Hex digest of `chunks` in order."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


def _parts(path: str) -> tuple[str, ...]:
    parts = tuple(path.split("/"))
    if any(part in ("", ".", "..") or "\\" in part for part in parts) or path == REPORT_FILE:
        raise InputError(
            f"the report lists {path!r}, which is not a path inside the folder", hint="Merge again."
        )
    return parts


def _compare(root: Path, place: Path, entry: Mapping[str, Any], advance: Any) -> str:
    """What is wrong with one file, "" when nothing is."""
    if not place.is_file():
        return "is missing"
    if not place.resolve().is_relative_to(root):
        return "is a link that leads out of the folder"
    size = place.stat().st_size
    if size != entry["bytes"]:
        return f"has {size} bytes, expected {entry['bytes']}"
    digest = hashlib.sha256()
    with place.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            advance(len(block))
    if digest.hexdigest() != entry["sha256"]:
        return f"has sha256 {digest.hexdigest()[:12]}…, expected {entry['sha256'][:12]}…"
    return ""


def _report_file(root: Path, report: Mapping[str, Any]) -> LocalFile:
    """The report as it lies in the folder, which must be the one that is published by."""
    place = root / REPORT_FILE
    content = place.read_bytes() if place.is_file() else b""
    try:
        same = json.loads(content) == json.loads(dump(report))
    except ValueError:
        same = False
    if not same:
        raise InputError(
            f"{place} is not the report that this folder is published by",
            hint="Nothing was published. Merge again; reports are not edited.",
        )
    return LocalFile(REPORT_FILE, place, len(content), sha256_of([content]))
