"""A pager for a process that may not reach the network: it asks the one that started it."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Self

from torch import Tensor, UntypedStorage

from merge_adapter.errors import StorageError
from merge_adapter.verify.memory.places import Place, Places, span


@contextmanager
def socket_address(address: Path) -> Iterator[str]:
    """A short name for a Unix socket: the system takes about a hundred bytes, and folders for temporary files may be
    deeper than that."""
    folder = os.open(address.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{address.name}"
    finally:
        os.close(folder)


class AskingPager:
    """Asks at a Unix socket for the weights of `folder`, a tensor at a time."""

    def __init__(self, address: Path, folder: Path) -> None:
        self._folder = folder
        self._known: dict[tuple[int, int], tuple[Place, UntypedStorage]] = {}
        """By address and length; the storage is held, so that no other file is ever mapped at that address."""
        self._socket = socket.socket(socket.AF_UNIX)
        with socket_address(address) as short:
            self._socket.connect(short)
        self._lines = self._socket.makefile("rwb")

    def need(self, tensor: Tensor) -> None:
        if tensor.device.type != "cpu" or not tensor.numel():
            return
        key = (tensor.data_ptr(), span(tensor))
        if key not in self._known:
            found = Places(self._folder).find(tensor)
            if found is None:
                return
            self._known[key] = (found, tensor.untyped_storage())
        place, _ = self._known[key]
        asked = {"file": place.file, "offset": place.offset, "bytes": place.bytes}
        self._lines.write(json.dumps(asked).encode() + b"\n")
        self._lines.flush()
        answer = json.loads(self._lines.readline() or b'{"error": "the process that brings weights is gone"}')
        if "error" in answer:
            raise StorageError(answer["error"])

    def served(self, folder: Path, address: Path) -> AbstractContextManager[None]:  # noqa: ARG002 - none to serve
        return nullcontext()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lines.close()
        self._socket.close()
