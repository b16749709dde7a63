"""Writing weight files: every tensor at its final offset, hashed on the way, visible only when whole."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock

from merge_adapter.errors import MalformedError, StorageError

CHUNK = 4 * 1024 * 1024
"""Bytes copied or hashed at a time; small enough to stay in the cache of the processor's socket."""

_FICLONE = 0x40049409
"""ioctl of Linux: let a file share all blocks of another until one of them is written to."""
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_REFUSED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals to write into StorageError."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise StorageError(
                f"The disk that holds {path.parent} is full: {path.name} could not be written.",
                hint="`merge-adapter plan` tells how much is needed; free it or choose another --output.",
            ) from error
        if error.errno in _REFUSED:
            raise StorageError(
                f"{path} cannot be written: {os.strerror(error.errno or 0)}.", hint="Choose another --output."
            ) from error
        raise


class ShardWriter:
    """A file of known size that is written in pieces, in any order and from several threads.

    The file has a temporary name until `finish`, so that a process killed at any moment leaves no half file
    under the real one. It is not flushed to the disk: waiting for that can cost more than the whole merge, and
    `cp` does not either. Its sha256 grows with the unbroken run of bytes written
    from the start: pieces written in order are hashed from memory, others are read back when their turn
    comes.
    """

    def __init__(self, path: Path, size: int) -> None:
        self._path = path
        self._size = size
        self._temporary = path.with_name(f".{path.name}.partial")
        self._hash = hashlib.sha256()
        self._hashed = 0
        self._hashing = False
        self._waiting: dict[int, int] = {}
        self._lock = Lock()
        with storage_errors(path):
            self._descriptor = os.open(self._temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            with storage_errors(path):
                _reserve(self._descriptor, size)
        except BaseException:
            self.abandon()
            raise

    def write(self, offset: int, piece: memoryview) -> None:
        """Write `piece` at `offset`. Every byte of the file is to be written exactly once."""
        if not piece.nbytes:
            return
        with storage_errors(self._path):
            _write_exactly(self._descriptor, offset, piece)
        with self._lock:
            if self._hashing or offset != self._hashed:
                self._waiting[offset] = offset + piece.nbytes
                if self._hashing or self._hashed not in self._waiting:
                    return
            self._hashing = True
        if offset == self._hashed:
            self._hash.update(piece)
            self._hashed += piece.nbytes
        self._hash_waiting()

    def finish(self) -> str:
        """Give the file its name and return its sha256. All pieces must have been written."""
        if self._hashed != self._size or self._waiting:
            raise AssertionError(f"{self._path.name}: {self._hashed} of {self._size} bytes were written")
        with storage_errors(self._path):
            os.close(self._descriptor)
            self._descriptor = -1
            self._temporary.rename(self._path)
        return self._hash.hexdigest()

    def abandon(self) -> None:
        """Remove the unfinished file. Does nothing after `finish`."""
        if self._descriptor >= 0:
            with suppress(OSError):
                os.close(self._descriptor)
            self._descriptor = -1
            with suppress(OSError):
                self._temporary.unlink()

    @property
    def complete(self) -> bool:
        """Whether every byte has been written and hashed."""
        with self._lock:
            return self._hashed == self._size and not self._hashing

    def _hash_waiting(self) -> None:
        """Hash what others wrote right behind the part already hashed; the caller holds the turn."""
        buffer = memoryview(bytearray(0))
        while True:
            with self._lock:
                end = self._waiting.pop(self._hashed, None)
                if end is None:
                    self._hashing = False
                    return
            if not buffer.nbytes:
                buffer = memoryview(bytearray(CHUNK))
            while self._hashed < end:
                part = buffer[: min(CHUNK, end - self._hashed)]
                _read_back(self._descriptor, self._hashed, part)
                self._hash.update(part)
                self._hashed += part.nbytes


def copy_file(source: Path, target: Path, *, advance: Callable[[int], None]) -> str:
    """Copy a file by the file system's own means and return its sha256.

    A reflink where the file system can, else `copy_file_range`, else read and write; never a hard link,
    which would let a change of the copy reach the original. `advance` is told of every chunk; what it
    raises stops the copy, and nothing is left.
    """
    temporary = target.with_name(f".{target.name}.partial")
    try:
        with storage_errors(target), source.open("rb") as old, temporary.open("xb+") as new:
            digest = _copy(old.fileno(), new.fileno(), source, advance)
        temporary.rename(target)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    return digest


def _copy(old: int, new: int, source: Path, advance: Callable[[int], None]) -> str:
    size = os.fstat(old).st_size
    with suppress(OSError):
        os.posix_fadvise(old, 0, 0, os.POSIX_FADV_SEQUENTIAL)
    cloned = _clone(old, new)
    in_kernel = True
    buffer = memoryview(bytearray(min(CHUNK, max(size, 1))))
    digest, done = hashlib.sha256(), 0
    while done < size:
        part = buffer[: min(CHUNK, size - done)]
        count = os.preadv(old, [part], done)
        if not count:
            raise MalformedError(
                f"{source}: expected {size} bytes, got {done}; it was cut while being copied.",
                hint="Download the file again and leave it alone while the merge runs.",
            )
        if not cloned:
            in_kernel = in_kernel and _copy_range(old, new, done, count)
            if not in_kernel:
                _write_exactly(new, done, part[:count])
        digest.update(part[:count])
        done += count
        advance(count)
    return digest.hexdigest()


def _clone(old: int, new: int) -> bool:
    try:
        fcntl.ioctl(new, _FICLONE, old)
    except OSError:
        return False
    return True


def _copy_range(old: int, new: int, offset: int, count: int) -> bool:
    """Whether the kernel copied the range by itself."""
    done = 0
    try:
        while done < count:
            copied = os.copy_file_range(old, new, count - done, offset + done, offset + done)
            if not copied:
                return False
            done += copied
    except OSError as error:
        if error.errno in _FULL:
            raise
        return False
    return True


def _reserve(descriptor: int, size: int) -> None:
    """Take the space now, so that a full disk shows before hours of work and not after."""
    if not size:
        return
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno in _FULL:
            raise
        os.ftruncate(descriptor, size)


def _write_exactly(descriptor: int, offset: int, piece: memoryview) -> None:
    done = 0
    while done < piece.nbytes:
        done += os.pwrite(descriptor, piece[done:], offset + done)


def _read_back(descriptor: int, offset: int, buffer: memoryview) -> None:
    done = 0
    while done < buffer.nbytes:
        count = os.preadv(descriptor, [buffer[done:]], offset + done)
        if not count:
            raise AssertionError("a file shrank while it was being written")
        done += count
