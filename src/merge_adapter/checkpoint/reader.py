"""Reading tensors, whole or by rows, straight from the files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cached_property
from threading import Lock
from types import TracebackType
from typing import Self

import torch

from merge_adapter.checkpoint.dtypes import torch_dtype
from merge_adapter.checkpoint.layout import Layout, WeightFile
from merge_adapter.checkpoint.pickled import load_pickled
from merge_adapter.errors import MalformedError
from merge_adapter.methods.change import TensorSpec, Weights
from merge_adapter.types import Repository


class StoredWeights(Weights):
    """The tensors of a repository's weight files.

    Safetensors data is read with `pread` into fresh memory, never mapped: resident memory stays that of
    what the caller holds. `rename` maps names shown here to names in the files.
    """

    def __init__(
        self, repository: Repository, layout: Layout, *, rename: Mapping[str, str] | None = None
    ) -> None:
        self._repository = repository
        self.layout = layout
        self._rename = rename
        self._descriptors: dict[str, int] = {}
        self._pickled: dict[str, dict[str, torch.Tensor]] = {}
        self._lock = Lock()
        self._counter = ReadCounter()

    @cached_property
    def specs(self) -> Mapping[str, TensorSpec]:
        stored = self.layout.specs
        if self._rename is None:
            return stored
        return {
            name: TensorSpec(name, stored[source].dtype, stored[source].shape)
            for name, source in self._rename.items()
        }

    @cached_property
    def _offsets(self) -> Mapping[str, int]:
        return {t.spec.name: t.offset for file in self.layout.files for t in file.header.tensors}

    @property
    def bytes_read(self) -> int:
        """Bytes of tensor data read so far."""
        return self._counter.total

    def read(self, name: str) -> torch.Tensor:
        shape = self.specs[name].shape
        if not shape:
            return self._read(name, 0, 1).view(())
        return self._read(name, 0, shape[0])

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self._read(name, start, stop)

    def close(self) -> None:
        """Close every file."""
        with self._lock:
            for descriptor in self._descriptors.values():
                os.close(descriptor)
            self._descriptors.clear()
            self._pickled.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read(self, name: str, start: int, stop: int) -> torch.Tensor:
        stored = self._rename[name] if self._rename is not None else name
        spec, file = self.layout.specs[stored], self.layout.home[stored]
        if file.pickled:
            tensor = self._load_pickled(file)[stored]
            rows = tensor.reshape(1) if not spec.shape else tensor[start:stop]
            self._counter.add(rows.nbytes)
            return rows.clone(memory_format=torch.contiguous_format)
        columns = spec.shape[1:]
        rows = torch.empty((stop - start, *columns), dtype=torch_dtype(spec.dtype))
        offset = self._offsets[stored] + (rows.nbytes // max(stop - start, 1)) * start
        if rows.nbytes:
            read_exactly(self._descriptor(file), offset, buffer_of(rows), file.path)
        self._counter.add(rows.nbytes)
        return rows

    def _descriptor(self, file: WeightFile) -> int:
        with self._lock:
            if file.path in self._descriptors:
                return self._descriptors[file.path]
        place = self._repository.local(
            file.path
        )  # perhaps a download, while others go on with files that are here
        with self._lock:
            if file.path not in self._descriptors:
                self._descriptors[file.path] = os.open(place, os.O_RDONLY)
            return self._descriptors[file.path]

    def _load_pickled(self, file: WeightFile) -> dict[str, torch.Tensor]:
        with self._lock:
            if file.path not in self._pickled:
                self._pickled[file.path] = load_pickled(self._repository.local(file.path), file.path)
            return self._pickled[file.path]


class ReadCounter:
    """A sum that threads may add to."""

    def __init__(self) -> None:
        self._lock = Lock()
        self.total = 0

    def add(self, amount: int) -> None:
        with self._lock:
            self.total += amount


def buffer_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, shared."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data.cast("B")


def read_exactly(descriptor: int, offset: int, buffer: memoryview, path: str) -> None:
    """Fill `buffer` from `offset`. Raises MalformedError when the file ends before that."""
    done = 0
    while done < len(buffer):
        count = os.preadv(descriptor, [buffer[done:]], offset + done)
        if count == 0:
            raise MalformedError(
                f"{path}: expected {len(buffer)} bytes at byte {offset}, got {done}; it was cut while being read.",
                hint="Download the file again and leave it alone while the merge runs.",
            )
        done += count
