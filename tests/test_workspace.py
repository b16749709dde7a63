"""The place output is built in: locked, cleared, and delivered whole or not at all."""

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from merge_adapter.errors import StorageError
from merge_adapter.workspace import (
    check_destination,
    check_space,
    deliver,
    partial_folder,
    storage_errors,
    work_folder,
)


def test_a_folder_appears_only_when_it_is_delivered(tmp_path: Path) -> None:
    destination = tmp_path / "out"
    with partial_folder(destination) as partial:
        (partial / "file").write_text("whole")
        assert not destination.exists()
        deliver(partial, destination)
    assert (destination / "file").read_text() == "whole"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), partial_folder(tmp_path / "out") as partial:
        (partial / "file").write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_is_cleared(tmp_path: Path) -> None:
    stale = tmp_path / ".out.partial"
    (stale / "below").mkdir(parents=True)
    (stale / "below" / "shard").write_text("stale")
    with partial_folder(tmp_path / "out") as partial:
        assert list(partial.iterdir()) == []


def test_two_runs_cannot_share_a_destination(tmp_path: Path) -> None:
    with partial_folder(tmp_path / "out") as first:
        (first / "file").write_text("first")
        with pytest.raises(StorageError, match="another merge"), partial_folder(tmp_path / "out"):
            pass
        assert (first / "file").read_text() == "first"


def test_a_delivered_folder_is_not_cleared_by_its_own_context(tmp_path: Path) -> None:
    with partial_folder(tmp_path / "out") as partial:
        (partial / "file").write_text("whole")
        deliver(partial, tmp_path / "out")
        (tmp_path / ".out.partial").mkdir()
    assert (tmp_path / "out" / "file").exists()


@pytest.mark.parametrize("kind", ["file", "full folder"])
def test_nothing_is_overwritten(tmp_path: Path, kind: str) -> None:
    destination = tmp_path / "out"
    if kind == "file":
        destination.write_text("")
    else:
        (destination / "mine").mkdir(parents=True)
    with pytest.raises(StorageError):
        check_destination(destination)


def test_an_empty_folder_may_be_the_destination(tmp_path: Path) -> None:
    destination = tmp_path / "out"
    destination.mkdir()
    check_destination(destination)
    with partial_folder(destination) as partial:
        (partial / "file").write_text("whole")
        deliver(partial, destination)
    assert (destination / "file").exists()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_refusals_of_the_disk_become_storage_errors(tmp_path: Path, code: int) -> None:
    with pytest.raises(StorageError), storage_errors(tmp_path):
        raise OSError(code, os.strerror(code))


def test_space_is_checked_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="needs"):
        check_space(tmp_path / "not" / "yet", 1 << 60)


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for temporary files of the test's own; the one below it that work folders are made in."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path / f"merge-adapter-{os.getuid()}"


def test_each_of_two_runs_of_a_job_has_a_work_folder_of_its_own(temporary: Path) -> None:
    with work_folder("job") as one, work_folder("job") as other:
        assert one != other
        assert one.parent == other.parent == temporary
        (one / "shard").write_bytes(b"1")
    assert list(temporary.iterdir()) == []


def test_what_a_killed_run_left_is_gone_when_any_other_begins(temporary: Path) -> None:
    left = temporary / ".killed-0.partial"
    left.mkdir(parents=True)
    (left / "shard").write_bytes(b"1")
    with work_folder("another") as place:
        assert not left.exists()
        assert list(temporary.iterdir()) == [place]


def test_a_place_that_is_not_a_folder_is_no_place_to_work(temporary: Path) -> None:
    temporary.symlink_to(temporary.parent)
    with pytest.raises(StorageError, match="is not a folder of this user"), work_folder("job"):
        pass


def test_runs_that_begin_and_end_at_once_leave_each_other_alone(temporary: Path) -> None:
    """Each clears what the others leave, at every moment of theirs; none stumbles, and none loses its folder."""

    def work(_: int) -> bool:
        with work_folder("job") as place:
            (place / "shard").write_bytes(b"1")
            return (place / "shard").read_bytes() == b"1"

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(400)))
    assert list(temporary.iterdir()) == []
