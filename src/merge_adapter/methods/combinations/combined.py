"""What any several adapters have in common that are shown to the rest of the merge as one."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Self

from merge_adapter.methods.adapter_file import AdapterFile
from merge_adapter.methods.change import Weights
from merge_adapter.types import Adapter

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Together:
    """Several adapters as one. What makes them one adds `specs`, `memory_bytes` and `open`."""

    adapter: Adapter
    """Of weight 1, its config that of PEFT's weighted adapter."""
    files: tuple[AdapterFile, ...]

    @property
    def bytes(self) -> int:
        """Of all the adapters."""
        return sum(file.bytes for file in self.files)

    @property
    def tensors(self) -> int:
        """Of all the adapters."""
        return sum(file.tensors for file in self.files)

    @property
    def notes(self) -> tuple[str, ...]:
        """Of all the adapters."""
        return tuple(note for file in self.files for note in file.notes)


class OpenedTogether(Weights):
    """Tensors that are computed from those of several opened adapters, as they are read."""

    def __init__(self, files: Sequence[AdapterFile]) -> None:
        self._stack = ExitStack()
        self._stored = [self._stack.enter_context(file.open()) for file in files]

    @property
    def bytes_read(self) -> int:
        """Bytes of the adapters' tensor data read so far."""
        return sum(stored.bytes_read for stored in self._stored)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        return self.read(name)[start:stop]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
