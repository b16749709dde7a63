"""The folder against its report."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from merge_adapter.errors import InputError
from merge_adapter.publish.contents import check_contents
from merge_adapter.types import Silent


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "merged"
    (place / "sub").mkdir(parents=True)
    (place / "config.json").write_bytes(b"{}")
    (place / "sub" / "weights.bin").write_bytes(b"weights")
    (place / "secret.txt").write_bytes(b"not listed")
    return place


def report(folder: Path, *paths: str) -> dict[str, Any]:
    files = []
    for path in paths:
        content = (folder / path).read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        files.append({"path": path, "bytes": len(content), "sha256": digest, "origin": "written"})
    written = {"output": {"files": files}}
    (folder / "merge_report.json").write_text(json.dumps(written))
    return written


def test_only_listed_files_and_the_report_are_published(folder: Path) -> None:
    """Whatever else lies in the folder stays there."""
    files = check_contents(folder, report(folder, "config.json", "sub/weights.bin"), Silent())
    assert [file.path for file in files] == ["config.json", "sub/weights.bin", "merge_report.json"]


@pytest.mark.parametrize(
    ("content", "problem"), [(b"[]", "has sha256"), (b"{ }", "has 3 bytes, expected 2"), (None, "is missing")]
)
def test_a_file_that_changed_since_the_merge_is_refused(
    folder: Path, content: bytes | None, problem: str
) -> None:
    """A folder is published only as the gate judged it."""
    written = report(folder, "config.json", "sub/weights.bin")
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_bytes(content)
    with pytest.raises(InputError, match=problem) as caught:
        check_contents(folder, written, Silent())
    assert "config.json" in caught.value.message


@pytest.mark.parametrize("path", ["../outside", "/etc/passwd", "a/../b", "merge_report.json", "a\\b", ""])
def test_a_report_cannot_name_files_outside_the_folder(folder: Path, path: str) -> None:
    """`publish DIR` takes folders from anybody."""
    bad = {"output": {"files": [{"path": path, "bytes": 0, "sha256": "0" * 64, "origin": "written"}]}}
    with pytest.raises(InputError, match="not a path inside"):
        check_contents(folder, bad, Silent())


@pytest.mark.parametrize("content", ["{}", "no JSON", None])
def test_another_report_in_the_folder_is_refused(folder: Path, content: str | None) -> None:
    """What is uploaded as the report is the one that everything was checked by."""
    written = report(folder, "config.json")
    (folder / "merge_report.json").unlink()
    if content is not None:
        (folder / "merge_report.json").write_text(content)
    with pytest.raises(InputError, match="not the report"):
        check_contents(folder, written, Silent())


def test_a_link_that_leads_out_of_the_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    """Even when its content has the right hash."""
    outside = tmp_path / "outside"
    outside.write_bytes(b"{}")
    written = report(folder, "config.json")
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(outside)
    with pytest.raises(InputError, match="link"):
        check_contents(folder, written, Silent())
