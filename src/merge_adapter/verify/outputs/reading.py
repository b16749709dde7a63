"""What the arms of this process answered, reduced pass by pass: the logits of all of them would fill the memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from merge_adapter.verify.memory.kept import Answers, keep
from merge_adapter.verify.outputs.answers import CLASSES
from merge_adapter.verify.outputs.distances import distances
from merge_adapter.verify.probes.batch import Batch
from merge_adapter.verify.repository.provenance import likelihood

Distances = Mapping[str, Tensor]
"""As `distances` gives them, documents in their order."""


@dataclass(frozen=True)
class Written:
    """Greedy text."""

    prompts: Batch
    text: Tensor
    """R's continuations, (prompts, length) token ids."""
    gaps: Tensor
    """The difference of R's first and second logit at each place."""
    base: Tensor | None = None
    """The base's own continuations, where they are asked for: each token costs as much as one of R's."""


@dataclass(frozen=True)
class Reading:
    """Distances of B, O and O+ from R over all documents read, and the answers to those that M reads too."""

    batch: Batch
    """The documents read."""
    noise: Distances
    effect: Distances
    ceiling: Distances | None
    """None where O+ was not needed."""
    reference: Answers
    base: Answers
    oracle: Answers
    largest_change: float
    """Of any number in an answer, from R to O."""
    flips: int
    """Classifiers: documents to which B gives another label than R."""
    nats: tuple[float, float] | None
    """Nats per token of R and of B; None for kinds that do not predict the next token."""


class Reader:
    """Collects passes; `kept` documents from the first on stay whole, in memory or in files in `place`."""

    def __init__(self, kind: str, batch: Batch, *, kept: int, place: Path) -> None:
        self._kind = kind
        self._batch = batch
        self._kept = kept
        self._place = place
        self._found: dict[str, list[Distances]] = {"noise": [], "effect": [], "ceiling": []}
        self._answers: dict[str, list[Tensor]] = {"reference": [], "base": [], "oracle": []}
        self._change = 0.0
        self._flips = 0
        self._nats = [0.0, 0.0]
        self._predicted = 0
        self.documents = 0
        """Read so far."""

    def add(
        self, piece: Batch, reference: Tensor, base: Tensor, oracle: Tensor, ceiling: Tensor | None = None
    ) -> None:
        """One pass: the answers of all arms to the documents after those added before."""
        self._found["effect"].append(distances(self._kind, reference, base, piece.mask))
        self._found["noise"].append(distances(self._kind, reference, oracle, piece.mask))
        if ceiling is not None:
            self._found["ceiling"].append(distances(self._kind, reference, ceiling, piece.mask))
        self._change = max(self._change, float((oracle - reference).abs().max()))
        if self._kind in CLASSES:
            self._flips += int((base.argmax(-1) != reference.argmax(-1)).sum())
        if self._kind == "causal-lm" and reference.ndim == 3 and reference.shape[:2] == piece.ids.shape:
            self._predict(piece, reference, base)
        wanted = self._kept - self.documents
        for name, answers in (("reference", reference), ("base", base), ("oracle", oracle)):
            if wanted > 0:
                held = answers[:wanted].contiguous()
                self._answers[name].append(keep(held, self._place, f"{name}-{self.documents}"))
        self.documents += len(piece)

    def _predict(self, piece: Batch, reference: Tensor, base: Tensor) -> None:
        count = int((piece.mask.sum(1) - 1).clamp(min=0).sum())
        if count:
            for at, answers in enumerate((reference, base)):
                self._nats[at] += count * likelihood(answers, piece.ids, piece.mask)
            self._predicted += count

    def so_far(self, name: str) -> Tensor:
        """Mean distances per document of `noise` or `effect`."""
        return torch.cat([found["mean"] for found in self._found[name]])

    def reading(self) -> Reading:
        """Everything collected."""
        nats = (self._nats[0] / self._predicted, self._nats[1] / self._predicted) if self._predicted else None
        return Reading(
            self._batch.part(0, self.documents),
            noise=joined(self._found["noise"]),
            effect=joined(self._found["effect"]),
            ceiling=joined(self._found["ceiling"]) if self._found["ceiling"] else None,
            reference=Answers(tuple(self._answers["reference"])),
            base=Answers(tuple(self._answers["base"])),
            oracle=Answers(tuple(self._answers["oracle"])),
            largest_change=self._change,
            flips=self._flips,
            nats=nats,
        )


def joined(found: list[Distances]) -> dict[str, Tensor]:
    """Distances of several passes as those of one."""
    return {key: torch.cat([one[key] for one in found]) for key in found[0]}


def read_whole(arms: Any, kind: str, batch: Batch) -> Reading:
    """The reading of arms whose answers are in memory as they are: see `outputs.Arms`."""
    reader = Reader(kind, batch, kept=len(batch), place=Path())
    for at in range(len(batch)):
        some = slice(at, at + 1)
        reader.add(batch.part(at, at + 1), arms.reference[some], arms.base[some], arms.oracle[some])
    return reader.reading()
