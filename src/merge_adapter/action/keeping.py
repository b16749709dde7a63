"""What stays behind in the workspace for later steps: the report, and the merged folder where it was asked for."""

from __future__ import annotations

import os
import shutil
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from merge_adapter.action.candidates import Candidate
from merge_adapter.checkpoint.folder import Folder
from merge_adapter.report import document
from merge_adapter.types import Repository

if TYPE_CHECKING:
    from merge_adapter.action.step import Step
    from merge_adapter.pipeline import RunOutcome

REPORT_FOLDER = "merge-adapter-report"
_KEPT = ("merge_report.html", "README.md")
"""Beside merge_report.json: the report's page and the model card."""


def place(step: Step, candidate: Candidate, scratch: Path) -> Path | None:
    """Where the merged folder of `candidate` is to be, or None where nobody needs it after it is published.

    A release gets files of that folder attached, so there it is kept until the step ends; a disk budget may not have
    the room.
    """
    inputs = step.inputs
    if inputs.output is not None:
        return step.runner.workspace / inputs.output / candidate.slug
    is_needed = step.trigger.release is not None and inputs.disk_budget is None
    return scratch / candidate.slug if is_needed else None


def papers(step: Step, candidate: Candidate, outcome: RunOutcome) -> Repository | None:
    """Where page and card can be read: in the merged folder, while there is one; for a release else on the Hub."""
    if outcome.merged is not None and outcome.merged.folder.is_dir():
        return Folder(outcome.merged.folder)
    if step.trigger.release is None or outcome.publication is None or candidate.folder is None:
        return None
    return step.hub.open(
        outcome.publication.repo,
        revision=outcome.publication.commit,
        subfolder=(candidate.named_in(step.inputs.path_in_repo) or "").strip("/"),
    )


def keep_report(
    workspace: Path, candidate: Candidate, outcome: RunOutcome, source: Repository | None
) -> tuple[PurePosixPath, ...]:
    """Write the report below the workspace, with page and card from `source`. Returns the paths, that of the report
    first.

    They belong to the workspace's owner, not to the container's root, so that later steps can remove them.
    """
    folder = _fresh_folder(workspace, candidate)
    report = folder / document.REPORT_FILE
    report.write_text(document.dump(outcome.report), encoding="utf-8")
    kept = [report]
    for name in _KEPT:
        if source is not None and name in source.files:
            (folder / name).write_bytes(source.read(name))
            kept.append(folder / name)
    if outcome.merged is not None and outcome.merged.folder.is_relative_to(workspace):
        _give_to_owner(workspace, outcome.merged.folder)
    _give_to_owner(workspace, folder)
    return tuple(PurePosixPath(path.relative_to(workspace).as_posix()) for path in kept)


def _fresh_folder(workspace: Path, candidate: Candidate) -> Path:
    """An empty folder for the report. What a commit put there, links above all, is not written through."""
    above = workspace / REPORT_FOLDER
    folder = above / candidate.slug
    for place in (above, folder):
        if place.is_symlink() or (place.exists() and not place.is_dir()):
            place.unlink()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _give_to_owner(workspace: Path, folder: Path) -> None:
    """Hand `folder`, what is in it and the folders above it to whom the workspace belongs."""
    owner = workspace.stat()
    if os.geteuid() != 0 or owner.st_uid == 0:
        return
    above = [parent for parent in folder.parents if parent.is_relative_to(workspace) and parent != workspace]
    for path in (*above, folder, *folder.rglob("*")):
        os.chown(path, owner.st_uid, owner.st_gid, follow_symlinks=False)
