"""Token ids that every arm reads: documents of one batch, padded to one length."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

BATCH_TOKENS = 1024
"""Tokens of one forward pass; bounds the memory of the activations and of the logits kept at once."""

BATCH_LOGITS = 1 << 26
"""Logits of one forward pass, 256 MB: vocabularies are large."""

BATCH_SAMPLES = 1 << 20
"""Pixels or samples of pictures and sounds of one forward pass."""


@dataclass(frozen=True)
class Batch:
    """Documents of one padded length."""

    ids: Tensor
    """(documents, length) int64."""
    mask: Tensor
    """(documents, length) int64, 1 where a token is real."""
    media: Mapping[str, Tensor] = field(default_factory=dict)
    """Pictures, sounds and what describes them: argument of the model -> (documents, k, ...), k entries a document."""
    cuts: tuple[int, ...] = ()
    """Documents at which a pass ends whatever its size, ascending: equal documents then go through equal passes."""
    classes: int = 1
    """Logits of one position."""

    def __len__(self) -> int:
        return int(self.ids.shape[0])

    def part(self, start: int, stop: int) -> Batch:
        """Documents [start, stop)."""
        media = {name: value[start:stop] for name, value in self.media.items()}
        cuts = tuple(cut - start for cut in self.cuts if start < cut < stop)
        return Batch(self.ids[start:stop], self.mask[start:stop], media, cuts, self.classes)

    def parts(self) -> Iterator[Batch]:
        """Pieces that are each run in one pass."""
        length = max(1, int(self.ids.shape[1]))
        samples = max((value[0].numel() for value in self.media.values()), default=0)
        most = (
            BATCH_TOKENS // length,
            BATCH_LOGITS // (length * self.classes),
            BATCH_SAMPLES // max(1, samples),
        )
        step = max(1, min(most))
        start = 0
        for stop in (*self.cuts, len(self)):
            for first in range(start, stop, step):
                yield self.part(first, min(first + step, stop))
            start = stop

    def arguments(self, device: torch.device) -> dict[str, Tensor]:
        """The media as the model takes them, all documents' entries in one dimension."""
        return {name: value.flatten(0, 1).to(device) for name, value in self.media.items()}
