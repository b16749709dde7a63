"""What stays behind in the workspace for later steps: the report, and the merged folder where it was asked for."""

from __future__ import annotations

import os
import shutil
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from merge_adapter.action.candidates import Candidate
from merge_adapter.action.events import Trigger
from merge_adapter.action.inputs import Inputs
from merge_adapter.report import document

if TYPE_CHECKING:
    from merge_adapter.pipeline import RunOutcome

REPORT_FOLDER = "merge-adapter-report"
_KEPT = ("merge_report.html", "README.md")
"""Beside merge_report.json: the report's page and the model card."""


def place(
    inputs: Inputs, candidate: Candidate, trigger: Trigger, *, workspace: Path, scratch: Path
) -> Path | None:
    """Where the merged folder of `candidate` is to be, or None where nobody needs it after it is published.

    A release gets files of that folder attached, so there it is kept until the step ends.
    """
    if inputs.output is not None:
        return workspace / inputs.output / candidate.slug
    return scratch / candidate.slug if trigger.release is not None else None


def keep_report(workspace: Path, candidate: Candidate, outcome: RunOutcome) -> tuple[PurePosixPath, ...]:
    """Write the report below the workspace. Returns the paths from there, merge_report.json first.

    They belong to the workspace's owner, not to the container's root, so that later steps can remove them.
    """
    folder = _fresh_folder(workspace, candidate)
    report = folder / document.REPORT_FILE
    report.write_text(document.dump(outcome.report), encoding="utf-8")
    kept = [report]
    if outcome.merged is not None:
        for name in _KEPT:
            source = outcome.merged.folder / name
            if source.is_file():
                kept.append(Path(shutil.copyfile(source, folder / name)))
        if outcome.merged.folder.is_relative_to(workspace):
            _give_to_owner(workspace, outcome.merged.folder)
    _give_to_owner(workspace, folder)
    return tuple(PurePosixPath(path.relative_to(workspace).as_posix()) for path in kept)


def _fresh_folder(workspace: Path, candidate: Candidate) -> Path:
    """An empty folder for the report. What a commit put there, links above all, is not written through."""
    above = workspace / REPORT_FOLDER
    if above.is_symlink():
        above.unlink()
    folder = above / candidate.slug
    if folder.is_symlink():
        folder.unlink()
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
