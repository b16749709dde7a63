"""The place output is built in: locked, cleared, and delivered whole or not at all."""

import errno
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from merge_adapter.errors import StorageError
from merge_adapter.workspace import (
    check_destination,
    check_space,
    deliver,
    partial_folder,
    storage_errors,
    temporary_files,
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


def test_sizes_in_messages_can_be_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small ones too: a model of some megabytes does not need 0.00 GB where 0.00 GB are free."""

    class Full:
        free = 1_500_000

    monkeypatch.setattr("shutil.disk_usage", lambda _place: Full())
    with pytest.raises(StorageError, match=r"needs 2\.5 MB, but its disk has 1\.5 MB free"):
        check_space(tmp_path, 2_500_000)


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for temporary files of the test's own; the one below it that those of a run lie in."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path / f"merge-adapter-{os.getuid()}"


def test_all_temporary_files_lie_in_one_folder_that_goes(temporary: Path) -> None:
    """Those of child processes too, and whoever forgot to clear up."""
    ask = [sys.executable, "-c", "import tempfile; print(tempfile.mkdtemp())"]
    with temporary_files():
        ours = Path(tempfile.mkdtemp())
        childs = Path(subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip())
        assert ours.is_dir()
        assert childs.is_dir()
        assert ours.parent == childs.parent
        assert ours.parent.parent == temporary
    assert list(temporary.iterdir()) == []
    assert Path(tempfile.gettempdir()) == Path(os.environ["TMPDIR"]) == temporary.parent


def test_each_of_two_runs_has_temporary_files_of_its_own(temporary: Path) -> None:
    second = (
        "import sys, tempfile; from merge_adapter.workspace import temporary_files\n"
        "with temporary_files(): print(tempfile.gettempdir(), flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", second], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        theirs = Path(process.stdout.readline().strip())
        with temporary_files():
            assert Path(tempfile.gettempdir()).parent == theirs.parent == temporary
            assert Path(tempfile.gettempdir()) != theirs
            assert theirs.is_dir()
    assert list(temporary.iterdir()) == []


def test_what_a_killed_run_left_is_gone_when_any_other_begins(temporary: Path) -> None:
    left = temporary / ".killed-0.partial"
    left.mkdir(parents=True)
    (left / "shard").write_bytes(b"1")
    with temporary_files():
        assert not left.exists()
        assert [str(place) for place in temporary.iterdir()] == [tempfile.gettempdir()]


def test_a_place_that_is_not_a_folder_is_no_place_to_work(temporary: Path) -> None:
    temporary.symlink_to(temporary.parent)
    with pytest.raises(StorageError, match="is not a folder of this user"), temporary_files():
        pass


def test_runs_that_begin_and_end_at_once_leave_each_other_alone(temporary: Path) -> None:
    """Each clears what the others leave, at every moment of theirs; none stumbles, and none loses its folder."""
    many = (
        "import tempfile; from pathlib import Path; from merge_adapter.workspace import temporary_files\n"
        "for _ in range(100):\n"
        "    with temporary_files():\n"
        "        place = Path(tempfile.gettempdir(), 'shard')\n"
        "        place.write_bytes(b'1')\n"
        "        assert place.read_bytes() == b'1'"
    )
    runs = [subprocess.Popen([sys.executable, "-c", many], stderr=subprocess.PIPE) for _ in range(4)]
    assert [(one.communicate()[1], one.returncode) for one in runs] == [(b"", 0)] * 4
    assert list(temporary.iterdir()) == []
