"""Where output is built: a place beside the destination that becomes it only when it is whole.

Two runs that write to one destination cannot mix: the place is locked while it is in use, and what a killed
run left behind is cleared by the next. A destination that exists is never overwritten.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from merge_adapter.errors import MemoryShortError, StorageError, ran_out_of_memory
from merge_adapter.sizes import human_bytes

_WORK_FOLDERS = 64
"""Runs at a time on one machine, beyond which something is wrong."""
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_UNWRITABLE = {errno.EROFS, errno.EACCES, errno.EPERM}
_ELSEWHERE = "Free some space, or use another disk: --output names the place of a merge, TMPDIR that of temporary data."


class BusyError(StorageError):
    """Another run holds the place."""


@contextmanager
def storage_errors(place: Path) -> Iterator[None]:
    """Turn the operating system's refusals to write below `place` into StorageError."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            free = shutil.disk_usage(_existing(place)).free
            raise StorageError(
                f"the disk that holds {place} is full ({human_bytes(free)} free): {error.strerror}",
                hint=f"merge-adapter plan tells how much a merge needs. {_ELSEWHERE}",
            ) from error
        if error.errno in _UNWRITABLE:
            raise StorageError(f"{place} cannot be written: {error.strerror}") from error
        raise


@contextmanager
def memory_errors() -> Iterator[None]:
    """Turn the ways in which memory runs out into MemoryShortError."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not ran_out_of_memory(error):
            raise
        words = " ".join(str(error).split())[:200]
        raise MemoryShortError(
            "this machine, or its GPU, has too little memory" + (f": {words}" if words else ""),
            hint="merge-adapter plan tells how much a merge needs; fewer --probe-tokens make the gate need less.",
        ) from error


def check_destination(destination: Path) -> None:
    """Raise StorageError unless `destination` is free: absent, or an empty folder."""
    if not destination.exists():
        return
    if not destination.is_dir():
        raise StorageError(f"{destination} is a file, expected a folder or nothing")
    if any(destination.iterdir()):
        raise StorageError(
            f"{destination} exists and is not empty",
            hint="Nothing is overwritten: remove it, or name another --output.",
        )


def check_space(place: Path, needed: int) -> None:
    """Raise StorageError when the disk of `place` has less than `needed` bytes free."""
    free = shutil.disk_usage(_existing(place)).free
    if free < needed:
        raise StorageError(
            f"{place} needs {human_bytes(needed)}, but its disk has {human_bytes(free)} free",
            hint=_ELSEWHERE,
        )


@contextmanager
def partial_folder(destination: Path) -> Iterator[Path]:
    """An empty, locked folder beside `destination`, on the same disk; gone again when the context ends.

    The caller renames it when it is whole (`deliver`). Raises StorageError when another run holds it.
    """
    with storage_errors(destination):
        destination.parent.mkdir(parents=True, exist_ok=True)
        partial = destination.parent / f".{destination.name}.partial"
        descriptor = _locked(partial, destination)
    try:
        with storage_errors(destination):
            for leftover in partial.iterdir():
                shutil.rmtree(
                    leftover
                ) if leftover.is_dir() and not leftover.is_symlink() else leftover.unlink()
            yield partial
    finally:
        if _is_at(descriptor, partial):
            shutil.rmtree(partial, ignore_errors=True)
        os.close(descriptor)


@contextmanager
def temporary_files() -> Iterator[None]:
    """Let all temporary files of this process and of those that it starts lie in one locked folder, gone afterwards.

    Whoever makes such files clears them up, but a killed process clears nothing, and a dequantised base is as large as
    a model. So the next run clears what it left. A second run at the same time has a folder of its own.
    """
    root = Path(tempfile.gettempdir()) / f"merge-adapter-{os.getuid()}"
    with storage_errors(root):
        root.mkdir(mode=0o700, exist_ok=True)
        state = root.lstat()
    if not stat.S_ISDIR(state.st_mode) or state.st_uid != os.getuid():
        raise StorageError(f"{root} is not a folder of this user", hint="Remove it, or set TMPDIR.")
    _clear_leftovers(root)
    with _work_folder(root) as place:
        ours, everyones = tempfile.tempdir, os.environ.get("TMPDIR")
        tempfile.tempdir = os.environ["TMPDIR"] = str(place)
        try:
            yield
        finally:
            tempfile.tempdir = ours
            if everyones is None:
                del os.environ["TMPDIR"]
            else:
                os.environ["TMPDIR"] = everyones


@contextmanager
def _work_folder(root: Path) -> Iterator[Path]:
    """The first locked folder below `root` that no other run has."""
    with ExitStack() as stack:
        for number in range(_WORK_FOLDERS):
            try:
                place = stack.enter_context(partial_folder(root / f"run-{number}"))
                break
            except BusyError:
                continue
        else:
            raise BusyError(f"{_WORK_FOLDERS} runs are at work in {root}")
        yield place


def _clear_leftovers(root: Path) -> None:
    """Remove what runs that are no more left below `root`; a folder that is in use is locked."""
    for place in root.glob(".*.partial"):
        with suppress(BusyError, OSError), partial_folder(root / place.name[1 : -len(".partial")]):
            pass


def deliver(partial: Path, destination: Path) -> None:
    """Rename a whole folder into place. An empty folder there gives way.

    Nothing is forced to the disk: a merge is as safe from a killed process as it can be, and from a power cut as a
    copy of its files is. The report's hashes tell whether they survived one; waiting would cost as long as merging.
    """
    with storage_errors(destination):
        partial.rename(destination)


def _locked(partial: Path, destination: Path) -> int:
    """A descriptor that holds the lock on the folder now at `partial`."""
    while True:
        with suppress(FileExistsError):  # not `exist_ok`, which looks again, when it may be gone
            partial.mkdir()
        try:
            descriptor = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except FileNotFoundError:  # another run took it for a leftover and cleared it
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise BusyError(
                f"another merge is writing to {destination}", hint="Wait for it, or name another --output."
            ) from None
        # The folder may have been delivered or removed between open and lock: then the lock is on something else.
        if _is_at(descriptor, partial):
            return descriptor
        os.close(descriptor)


def _is_at(descriptor: int, place: Path) -> bool:
    """Whether the open folder is the one that lies at `place` now."""
    try:
        return os.path.samestat(os.fstat(descriptor), place.stat())
    except FileNotFoundError:
        return False


def _existing(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
