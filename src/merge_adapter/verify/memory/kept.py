"""Answers kept until the merged model has given its own: small ones in memory, large ones mapped from files."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from merge_adapter.errors import StorageError
from merge_adapter.sizes import human_bytes

if TYPE_CHECKING:
    from torch import Tensor

SMALL = 1 << 20
"""Bytes of a piece that stay in memory."""

SPARE = 1 << 26
"""Bytes left free on the disk."""


@dataclass(frozen=True)
class Answers:
    """One arm's answers, documents in their order."""

    pieces: tuple[Tensor, ...]
    """(documents, ...) each, of one shape but for the first dimension."""

    def __len__(self) -> int:
        return sum(len(piece) for piece in self.pieces)

    def __iter__(self) -> Iterator[Tensor]:
        """Each document's answers, a first dimension of 1 before them."""
        for piece in self.pieces:
            yield from piece.unsqueeze(1)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one document's answers."""
        return tuple(self.pieces[0].shape[1:])

    def whole(self) -> Tensor:
        """All of them in memory: for kinds that give a few numbers to a document."""
        import torch

        return torch.cat(self.pieces)


def check_room(place: Path, size: int) -> None:
    """Raise StorageError when `size` bytes do not fit into the folder `place`."""
    free = shutil.disk_usage(place).free
    if size + SPARE > free:
        raise StorageError(
            f"the models' answers take {human_bytes(size)}, and {human_bytes(SPARE)} are left free beside them; "
            f"{place} has {human_bytes(free)} free",
            hint="Free them there, let TMPDIR name a folder on a larger disk, or ask less with --probe-tokens.",
        )


def keep(answers: Tensor, place: Path, name: str) -> Tensor:
    """The same answers, mapped from a file in `place` when they are large. Raises StorageError for a full disk."""
    from safetensors.torch import load_file, save_file
    from torch import Tensor

    if answers.nbytes < SMALL:
        return answers
    check_room(place, answers.nbytes)
    path = place / f"{name}.safetensors"
    save_file({"answers": answers.contiguous()}, path)
    held = load_file(path)["answers"]
    assert isinstance(held, Tensor)
    return held
