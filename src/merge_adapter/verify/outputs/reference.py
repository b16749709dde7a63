"""The arms that run in this process, on the same documents, in rounds:

    R   base + adapter through PEFT, unmerged: the truth
    B   the base alone: how much the adapter matters
    O   the oracle rounded once to the stored dtype: what rounding costs at best
    O+  the oracle with every weight off at random by as much as the weights part permits: what it may cost

Two loads of the base serve all four; weights are fp32 a few rows at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from merge_adapter.types import Progress
from merge_adapter.verify.memory.lazy import widen
from merge_adapter.verify.memory.products import fast_products
from merge_adapter.verify.models.unheard import watch
from merge_adapter.verify.outputs.answers import answer, greedy
from merge_adapter.verify.outputs.distances import distances
from merge_adapter.verify.outputs.placed import (
    Known,
    Rounding,
    dithered,
    dropped,
    mutated,
    once_rounded,
    place_oracle,
)
from merge_adapter.verify.outputs.reading import Reader, Reading, Written
from merge_adapter.verify.outputs.rounds import is_shown
from merge_adapter.verify.outputs.sentences import Tail
from merge_adapter.verify.outputs.statistics import bounds
from merge_adapter.verify.probes.batch import Batch
from merge_adapter.verify.weights.expectations import Expectations
from merge_adapter.verify.weights.mutants import DROPPED, Outcome


@dataclass(frozen=True)
class Setting:
    """What all arms have in common."""

    kind: str
    storage: Mapping[str, torch.dtype]
    """In which the merged model holds each tensor that must change."""
    device: torch.device
    confidence: float
    seed: int
    place: Path
    """A folder for answers that are too large to stay in memory."""
    tail: Tail | None = None


class ReferenceArms:
    """R and B on PEFT's `adapted`; O and O+ on `plain`, a second load of the base. Both are changed in place.

    `known`: what the weights part has found O to be.
    """

    def __init__(
        self,
        adapted: Any,
        plain: nn.Module,
        expected: Expectations,
        known: Mapping[str, Known],
        setting: Setting,
    ) -> None:
        self._adapted = adapted
        self._plain = plain
        self._expected = expected
        self._known = known
        self._setting = setting
        self._placed: Rounding | None = None
        self._dithered = dithered(setting.seed)
        widen(adapted, setting.device)
        self.unheard = watch(adapted)
        """Adapted modules that R has gone around so far."""

    def read(
        self, batch: Batch, rounds: Sequence[int], *, kept: int, with_ceiling: bool, progress: Progress
    ) -> Reading:
        """Read documents until the effect is shown, or all of them. `rounds`: how many after each, ascending.

        The answers to the first `kept` documents stay at hand for comparison with the merged model's.
        """
        setting = self._setting
        reader = Reader(setting.kind, batch, kept=kept, place=setting.place)
        length = int(batch.ids.shape[1])
        arms = 4 if with_ceiling else 3
        with (
            fast_products(setting.device),
            progress.task("Running the reference", arms * rounds[-1] * max(1, length), unit="tokens") as task,
        ):
            for start, stop in zip((0, *rounds), rounds, strict=False):
                for piece in batch.part(start, stop).parts():
                    reader.add(piece, *self._asked(piece, with_ceiling=with_ceiling))
                    task.advance(arms * int(piece.ids.numel()))
                shown = is_shown(
                    reader.so_far("effect"),
                    reader.so_far("noise"),
                    confidence=setting.confidence,
                    seed=setting.seed,
                )
                if shown:
                    break
        return reader.reading()

    def _asked(self, piece: Batch, *, with_ceiling: bool) -> list[Tensor]:
        """The answers of R, B, O and, where asked for, O+ to one pass."""
        found = [self._ask(self._adapted, piece)]
        with self._adapted.disable_adapter():
            found.append(self._ask(self._adapted, piece))
        found.append(self._ask_placed(piece, once_rounded))
        if with_ceiling:
            found.append(self._ask_placed(piece, self._dithered))
        return found

    def _ask(self, model: Any, piece: Batch) -> Tensor:
        setting = self._setting
        return answer(model, setting.kind, piece, setting.device, setting.tail)

    def _ask_placed(self, piece: Batch, how: Rounding) -> Tensor:
        """The answers of the oracle put through `how`."""
        setting = self._setting
        if self._placed is not how:
            known = self._known if how is once_rounded else {}
            place_oracle(self._plain, self._expected, setting.storage, setting.device, how, known)
            self._placed = how
        return self._ask(self._plain, piece)

    def write(self, prompts: Batch, length: int, progress: Progress) -> Written:
        """Greedy text of R."""
        setting = self._setting
        with fast_products(setting.device), progress.task("Writing text", None):
            text, gaps = greedy(self._adapted, prompts, length, setting.device, setting.kind)
        return Written(prompts, text, gaps)

    def inject(self, reading: Reading, outcomes: list[Outcome], progress: Progress) -> list[Outcome]:
        """Make each fault in the whole model and ask whether the outputs part's rule would fail it.

        `reading` has kept all its answers. Returns the outcomes with that answer, and one more: a block of layers left
        unmerged.
        """
        setting = self._setting
        noise = reading.ceiling if reading.ceiling is not None else reading.noise
        bounded = partial(bounds, confidence=setting.confidence, seed=setting.seed)
        limit = bounded(noise["mean"])[1]
        whole = Outcome(DROPPED)
        faults = [
            *((one, mutated(setting.seed, one.mutant)) for one in outcomes if one.mutant is not None),
            (whole, dropped(self._expected)),
        ]
        with (
            fast_products(setting.device),
            progress.task("Injecting faults into outputs", len(faults), unit="faults") as task,
        ):
            for outcome, how in faults:
                # what is not a number is not within anything
                outcome.outputs = not bounded(self._distances(reading, how))[0] <= limit
                task.advance(1)
        return [*outcomes, whole]

    def _distances(self, reading: Reading, how: Rounding) -> Tensor:
        """The mean distance of each document from R with every update put through `how`."""
        found = []
        truth = iter(reading.reference)
        for piece in reading.batch.parts():
            made = self._ask_placed(piece, how)
            right = torch.cat([next(truth) for _ in range(len(piece))])
            found.append(distances(self._setting.kind, right, made, piece.mask)["mean"])
        return torch.cat(found)
