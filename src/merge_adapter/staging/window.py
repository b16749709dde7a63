"""A folder with the weight files of a repository, each at its full size, of which only what is in use takes space.

Files are sparse: the header is there from the start, the data where it was fetched. Libraries that map weights can
open the model at once, and see each shard's data from the moment it has been fetched until it is let go.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from merge_adapter.checkpoint.layout import Layout, WeightFile
from merge_adapter.errors import MalformedError, StorageError
from merge_adapter.types import Repository
from merge_adapter.workspace import storage_errors

BLOCK = 8 << 20
"""Bytes of one request: long enough for its answer to be most of its time."""
CONNECTIONS = 4
"""Requests in flight. One connection seldom fills a line."""
LENGTH_FIELD = 8
"""Bytes of a safetensors file that say how long its header is."""
_READ = 4 << 20
_PROBE = 4 << 20


class Window:
    """The sparse folder. Fetching and letting go of different files is thread-safe."""

    def __init__(
        self, repository: Repository, layout: Layout, folder: Path, *, hashes: Mapping[str, str] | None = None
    ) -> None:
        """Make the files in the existing, empty `folder`, headers and index read, nothing else.

        `hashes` are the sha256 that the repository states for its files; what was fetched is compared with them.
        """
        self._repository = repository
        self._folder = folder
        self._hashes = hashes or {}
        self._starts = {file.path: file.header.data_start for file in layout.files}
        self._sizes = {file.path: file.bytes for file in layout.files}
        with storage_errors(folder):
            for file in layout.files:
                sparse_file(folder / file.path, head_of(repository, file), file.bytes)
            if layout.index is not None:
                (folder / layout.index).write_bytes(repository.read(layout.index))

    def fetch(
        self,
        path: str,
        *,
        check: Callable[[], None] = lambda: None,
        advance: Callable[[int], None] = lambda _: None,
    ) -> None:
        """Bring the data of one file here, and compare the whole with its hash.

        `check` is called between blocks and may raise to stop. Raises MalformedError when the content is not what the
        repository says it is, StorageError for a full disk, and what the repository raises.
        """
        size, start = self._sizes[path], self._starts[path]
        place = self._folder / path
        with storage_errors(place), place.open("r+b") as file:
            descriptor = file.fileno()
            digest = hashlib.sha256(os.pread(descriptor, start, 0))
            for offset, content in self._blocks(path, start, size, check):
                _write(descriptor, content, offset)
                digest.update(content)
                advance(len(content))
        expected = self._hashes.get(path)
        if expected is not None and digest.hexdigest() != expected:
            raise MalformedError(
                f"{path} of {self._repository.origin} arrived with sha256 {digest.hexdigest()[:12]}…, expected "
                f"{expected[:12]}…",
                hint="Run the same command again; if it happens again, the file on the Hub is damaged.",
            )

    def fetch_range(self, path: str, start: int, stop: int) -> None:
        """Bring bytes [start, stop) of one file here."""
        place = self._folder / path
        with storage_errors(place), place.open("r+b") as file:
            for offset, content in self._blocks(path, start, stop, lambda: None):
                _write(file.fileno(), content, offset)

    def data_range(self, path: str, start: int, stop: int) -> tuple[int, int]:
        """The part of bytes [start, stop) that is tensor data."""
        return max(start, self._starts[path]), min(stop, self._sizes[path])

    def drop(self, path: str) -> None:
        """Give the space of a file's data back. Who has it mapped sees zeros from now on."""
        start = self._starts[path]
        with (self._folder / path).open("r+b") as file:
            file.truncate(start)
            file.truncate(self._sizes[path])

    def _blocks(
        self, path: str, start: int, stop: int, check: Callable[[], None]
    ) -> Iterator[tuple[int, bytes]]:
        """The blocks of a range in their order, a few of them on their way at a time."""

        def read(offset: int) -> bytes:
            length = min(BLOCK, stop - offset)
            content = self._repository.read(path, offset=offset, length=length)
            if len(content) != length:
                raise MalformedError(
                    f"{path} of {self._repository.origin}: expected {length} bytes at byte {offset}, got "
                    f"{len(content)}",
                    hint="Run the same command again.",
                )
            return content

        waiting: list[tuple[int, Future[bytes]]] = []
        with ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="fetch") as pool:
            try:
                for offset in range(start, stop, BLOCK):
                    waiting.append((offset, pool.submit(read, offset)))
                    if len(waiting) == CONNECTIONS:
                        check()
                        first, arriving = waiting.pop(0)
                        yield first, arriving.result()
                for first, arriving in waiting:
                    check()
                    yield first, arriving.result()
            finally:
                pool.shutdown(wait=True, cancel_futures=True)


def head_of(repository: Repository, file: WeightFile) -> bytes:
    """The bytes before a file's data, asked for in the two parts in which they were read before."""
    length = repository.read(file.path, length=LENGTH_FIELD)
    return length + repository.read(
        file.path, offset=LENGTH_FIELD, length=file.header.data_start - LENGTH_FIELD
    )


def sparse_file(place: Path, head: bytes, size: int) -> None:
    """A file of `size` bytes that begins with `head` and holds nothing else."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with place.open("wb") as file:
        file.write(head)
        file.truncate(size)


def check_sparse(folder: Path) -> None:
    """Raise StorageError unless files in `folder` can be larger than the space they take."""
    probe = folder / ".sparse"
    with storage_errors(probe):
        sparse_file(probe, b"", _PROBE)
        taken = probe.stat().st_blocks * 512
        probe.unlink()
    if taken >= _PROBE:
        raise StorageError(
            f"the file system of {folder} keeps no sparse files, so that a disk budget cannot be held there",
            hint="Set TMPDIR to a folder on ext4, xfs, btrfs or tmpfs, or leave the disk budget out.",
        )


def disk_use(folders: Iterable[Path]) -> int:
    """Bytes that the files below `folders` take on the disk; those that go away meanwhile are left out."""
    seen: set[tuple[int, int]] = set()
    total = 0
    for folder in folders:
        for root, _, names in os.walk(folder):
            for name in names:
                try:
                    state = (Path(root) / name).lstat()
                except OSError:
                    continue
                if (state.st_dev, state.st_ino) not in seen:
                    seen.add((state.st_dev, state.st_ino))
                    total += state.st_blocks * 512
    return total


def _write(descriptor: int, content: bytes, offset: int) -> None:
    done = 0
    while done < len(content):
        done += os.pwrite(descriptor, content[done : done + _READ], offset + done)
