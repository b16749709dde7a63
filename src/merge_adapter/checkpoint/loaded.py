"""A base of which some tensors are those of the model that transformers loads, under its names in memory.

The rest is read from the files as always, in the base's own layout.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from threading import Lock
from types import TracebackType
from typing import TYPE_CHECKING, Self

from merge_adapter.checkpoint.base import BaseFiles, OpenWeights
from merge_adapter.checkpoint.header import Header, StoredTensor
from merge_adapter.checkpoint.layout import Layout
from merge_adapter.methods.change import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

Place = tuple[tuple[TensorSpec, ...], tuple[str, ...]]
"""Tensors of the loaded model, and those on disk whose place they take: that of the first of them."""


def with_loaded(
    files: BaseFiles, places: Collection[Place], load: Callable[[], Mapping[str, Tensor]]
) -> BaseFiles:
    """The same base, `places` filled from what `load` returns: every one of their tensors by name.

    `load` is called once, by the first read of one of them.
    """
    layout = _layout(files.layout, places)
    made = frozenset(spec.name for specs, _ in places for spec in specs)
    return replace(
        files,
        layout=layout,
        specs=layout.specs,
        open=lambda: LoadedWeights(files.open(), layout.specs, made, load),
    )


class LoadedWeights:
    """Tensors of the files, and some of the loaded model. Thread-safe as the files below are."""

    def __init__(
        self,
        stored: OpenWeights,
        specs: Mapping[str, TensorSpec],
        made: frozenset[str],
        load: Callable[[], Mapping[str, Tensor]],
    ) -> None:
        self._stored = stored
        self._specs = specs
        self._made = made
        self._load = load
        self._lock = Lock()
        self._values: Mapping[str, Tensor] | None = None

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        return self._specs

    @property
    def bytes_read(self) -> int:
        """Bytes of the files read so far, the loading of the model not counted."""
        return self._stored.bytes_read

    def read(self, name: str) -> Tensor:
        return self._value(name).clone() if name in self._made else self._stored.read(name)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        if name not in self._made:
            return self._stored.read_rows(name, start, stop)
        value = self._value(name)
        return (value[start:stop] if value.ndim else value.reshape(1)).clone()

    def _value(self, name: str) -> Tensor:
        with self._lock:
            if self._values is None:
                self._values = self._load()
            return self._values[name]

    def __enter__(self) -> Self:
        self._stored.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._values = None
        self._stored.__exit__(kind, error, trace)


def _layout(stored: Layout, places: Collection[Place]) -> Layout:
    """The files with each place's tensors where the first one that they come from was."""
    anchors = {sources[0]: specs for specs, sources in places}
    gone = {name for _, sources in places for name in sources}
    files = []
    for file in stored.files:
        if not any(spec.name in gone for spec in file.specs):
            files.append(file)
            continue
        tensors: list[StoredTensor] = []
        for entry in file.header.tensors:
            if entry.spec.name in anchors:
                tensors += [StoredTensor(spec, 0) for spec in anchors[entry.spec.name]]
            elif entry.spec.name not in gone:
                tensors.append(entry)
        files.append(replace(file, header=Header(tuple(tensors), file.header.metadata, 0), derived=True))
    return replace(stored, files=tuple(files))
