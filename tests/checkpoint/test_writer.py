"""Files written in pieces: the right bytes and hash in any order, and nothing left when it fails."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from merge_adapter.checkpoint import writer as writing
from merge_adapter.checkpoint.writer import ShardWriter, copy_file
from merge_adapter.errors import StorageError


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 300), min_size=1, max_size=12), st.integers(0, 2**32))
def test_pieces_in_any_order_make_the_same_file(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], seed: int
) -> None:
    """Bytes and sha256 are those of the pieces laid end to end."""
    target = tmp_path_factory.mktemp("writer") / "x"
    content = random.Random(seed).randbytes(sum(sizes))
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    pieces = [(start, content[start : start + size]) for start, size in zip(starts, sizes, strict=True)]
    random.Random(seed).shuffle(pieces)
    made = ShardWriter(target, len(content))
    for start, piece in pieces:
        assert not target.exists()
        made.write(start, memoryview(piece))
    assert made.finish() == hashlib.sha256(content).hexdigest()
    assert target.read_bytes() == content
    assert [path.name for path in target.parent.iterdir()] == ["x"]


def test_pieces_from_many_threads_make_the_same_file(tmp_path: Path) -> None:
    """Writers race; one hashes what the others wrote."""
    content = random.Random(1).randbytes(3_000_000)
    starts = list(range(0, len(content), 10_007))
    random.Random(2).shuffle(starts)
    made = ShardWriter(tmp_path / "x", len(content))

    def work(mine: list[int]) -> None:
        for start in mine:
            made.write(start, memoryview(content)[start : start + 10_007])

    threads = [threading.Thread(target=work, args=(starts[number::4],)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made.complete
    assert made.finish() == hashlib.sha256(content).hexdigest()
    assert (tmp_path / "x").read_bytes() == content


def test_an_unfinished_file_disappears(tmp_path: Path) -> None:
    """Its own name was never taken."""
    made = ShardWriter(tmp_path / "x", 100)
    made.write(0, memoryview(bytes(50)))
    made.abandon()
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_full_from_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The space is taken first, so it shows before any work."""

    def full(descriptor: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writing.os, "posix_fallocate", full)
    with pytest.raises(StorageError, match="is full"):
        ShardWriter(tmp_path / "x", 100)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """Refusals of the operating system are StorageErrors too. (Tests may run as root, whom nothing refuses.)"""

    def refused(*arguments: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(writing.os, "open", refused)
    with pytest.raises(StorageError, match="cannot be written"):
        ShardWriter(tmp_path / "x", 10)


@pytest.mark.parametrize("kernel", [True, False])
def test_a_copy_is_equal_and_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, kernel: bool
) -> None:
    """Never a hard link: a change of the copy does not reach the original."""
    if not kernel:

        def refused(*arguments: object) -> int:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

        monkeypatch.setattr(writing.os, "copy_file_range", refused)
        monkeypatch.setattr(writing, "_clone", lambda old, new: False)
    content = random.Random(3).randbytes(writing.CHUNK * 2 + 77)
    (tmp_path / "a").write_bytes(content)
    seen: list[int] = []
    digest = copy_file(tmp_path / "a", tmp_path / "b", advance=seen.append)
    assert digest == hashlib.sha256(content).hexdigest()
    assert sum(seen) == len(content)
    assert (tmp_path / "b").read_bytes() == content
    assert (tmp_path / "a").stat().st_ino != (tmp_path / "b").stat().st_ino
    with (tmp_path / "b").open("r+b") as copy:
        copy.write(b"changed")
    assert (tmp_path / "a").read_bytes() == content


def test_a_copy_that_is_stopped_leaves_nothing(tmp_path: Path) -> None:
    """What `advance` raises ends the copy."""
    (tmp_path / "a").write_bytes(bytes(writing.CHUNK * 2))

    def stop(count: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        copy_file(tmp_path / "a", tmp_path / "b", advance=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
