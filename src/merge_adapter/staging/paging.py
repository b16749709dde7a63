"""Weights brought here when they are read, and let go for others: how a model answers that the disk cannot hold.

A forward pass reads every weight once. So the model costs its size in downloads for each pass, and the disk of its
largest tensor.
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from threading import Lock, Thread
from typing import Any

from torch import Tensor, UntypedStorage

from merge_adapter.errors import MergeAdapterError, StorageError
from merge_adapter.staging.window import Window
from merge_adapter.verify.memory.places import Place, Places, span
from merge_adapter.verify.outputs.asking import socket_address

BLOCK = 64 << 10
"""Bytes that come and go together."""
_PAGE = 4096
_PUNCH_HOLE, _KEEP_SIZE = 2, 1
"""Modes of fallocate(2)."""


class Resident:
    """What is here of some windows: at most `limit` bytes, the longest unused goes first. Thread-safe."""

    def __init__(self, windows: Mapping[Path, Window], limit: int) -> None:
        self._windows = {folder.resolve(): window for folder, window in windows.items()}
        self._limit = limit
        self._blocks: OrderedDict[tuple[Path, str, int], None] = OrderedDict()
        self._lock = Lock()
        self.bytes_fetched = 0

    @property
    def folders(self) -> tuple[Path, ...]:
        return tuple(self._windows)

    def need(self, folder: Path, place: Place) -> None:
        """Return when these bytes are here. Raises StorageError when they alone are more than the limit."""
        first, last = place.offset // BLOCK, (place.offset + place.bytes - 1) // BLOCK
        wanted = [(folder, place.file, at) for at in range(first, last + 1)]
        with self._lock:
            for key in wanted:
                if key in self._blocks:
                    self._blocks.move_to_end(key)
            missing = [key for key in wanted if key not in self._blocks]
            if len(wanted) * BLOCK > self._limit:
                raise StorageError(
                    f"one tensor of {place.file} takes {place.bytes:,} bytes, more than the {self._limit:,} left"
                )
            while (len(self._blocks) + len(missing)) * BLOCK > self._limit:
                self._evict()
            for start, stop in _runs([at for _, _, at in missing]):
                self._fetch(folder, place.file, start, stop)

    def clear(self) -> None:
        """Let everything go."""
        with self._lock:
            while self._blocks:
                self._evict()

    def _fetch(self, folder: Path, file: str, start: int, stop: int) -> None:
        """Blocks [start, stop)."""
        window = self._windows[folder]
        begin, end = window.data_range(file, start * BLOCK, stop * BLOCK)
        window.fetch_range(file, begin, end)
        self.bytes_fetched += end - begin
        for at in range(start, stop):
            self._blocks[folder, file, at] = None

    def _evict(self) -> None:
        (folder, file, at), _ = self._blocks.popitem(last=False)
        begin, end = self._windows[folder].data_range(file, at * BLOCK, (at + 1) * BLOCK)
        punch(folder / file, -(-begin // _PAGE) * _PAGE, -(-end // _PAGE) * _PAGE)


class HerePager:
    """A `verify.mapped.Pager`. Does nothing until it is given something to bring."""

    def __init__(self) -> None:
        self._resident: Resident | None = None
        self._known: dict[tuple[int, int], tuple[Path, Place, UntypedStorage]] = {}
        """By address and length; the storage is held, so that no other file is ever mapped at that address."""

    @contextmanager
    def bringing(self, resident: Resident) -> Iterator[None]:
        """While the context lasts, weights are in `resident`'s windows."""
        self._resident = resident
        try:
            yield
        finally:
            self._resident = None
            self._known.clear()
            resident.clear()

    def need(self, tensor: Tensor) -> None:
        if self._resident is None:
            return
        found = self._find(self._resident, tensor)
        if found is not None:
            self._resident.need(*found)

    @contextmanager
    def served(self, folder: Path, address: Path) -> Iterator[None]:
        """Bring what another process, which has `folder` open, asks for at the Unix socket `address`."""
        if self._resident is None:
            yield
            return
        with socket.socket(socket.AF_UNIX) as listening:
            with socket_address(address) as short:
                listening.bind(short)
            listening.listen(1)
            thread = Thread(
                target=_serve, args=(listening, self._resident, folder.resolve()), name="pager", daemon=True
            )
            thread.start()
            try:
                yield
            finally:
                with suppress(OSError):
                    listening.shutdown(socket.SHUT_RDWR)
                thread.join()

    def _find(self, resident: Resident, tensor: Tensor) -> tuple[Path, Place] | None:
        if tensor.device.type != "cpu" or not tensor.numel():
            return None
        key = (tensor.data_ptr(), span(tensor))
        if key not in self._known:
            for folder in resident.folders:
                place = Places(folder).find(tensor)
                if place is not None:
                    self._known[key] = (folder, place, tensor.untyped_storage())
                    break
        return self._known[key][:2] if key in self._known else None


def _serve(listening: socket.socket, resident: Resident, folder: Path) -> None:
    """Answer one client until it hangs up: a line of JSON in, a line out."""
    with suppress(OSError), listening.accept()[0] as client, client.makefile("rwb") as lines:
        for line in lines:
            asked = json.loads(line)
            answer: dict[str, str] = {}
            try:
                resident.need(folder, Place(asked["file"], asked["offset"], asked["bytes"]))
            except MergeAdapterError as error:
                answer["error"] = error.message
            lines.write(json.dumps(answer).encode() + b"\n")
            lines.flush()


def punch(path: Path, start: int, stop: int) -> None:
    """Give the space of bytes [start, stop) of a file back; they read as zeros. Raises StorageError."""
    if stop <= start:
        return
    descriptor = os.open(path, os.O_RDWR)
    try:
        failed = _fallocate()(descriptor, _PUNCH_HOLE | _KEEP_SIZE, start, stop - start)
        if failed:
            reason = os.strerror(ctypes.get_errno())
            raise StorageError(
                f"the file system of {path.parent} cannot free a part of a file: {reason}",
                hint="Set TMPDIR to a folder on ext4, xfs, btrfs or tmpfs.",
            )
    finally:
        os.close(descriptor)


@cache
def _fallocate() -> Any:
    call = ctypes.CDLL(None, use_errno=True).fallocate64
    call.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    return call


def _runs(numbers: list[int]) -> Iterator[tuple[int, int]]:
    """Unbroken runs [start, stop) of ascending numbers."""
    at = 0
    while at < len(numbers):
        end = at + 1
        while end < len(numbers) and numbers[end] == numbers[end - 1] + 1:
            end += 1
        yield numbers[at], numbers[end - 1] + 1
        at = end
