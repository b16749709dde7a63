"""How many documents the arms read: as many as the bounds need, and not more.

Whether an adapter does more than rounding shows at the first few documents of most models, and takes many of some. So
the documents are read in up to three rounds. After each, the part asks whether that is shown already, at a level that
allows for having asked three times: by the bootstrap's bounds, and by counting documents, which supposes nothing of how
the distances are spread. Only "shown" ends the reading early; "not shown" is said after the last document.
"""

from __future__ import annotations

import math

from torch import Tensor

from merge_adapter.verify.outputs.statistics import bounds

LOOKS = 3
"""Rounds at most; the error allowed is divided among them (Bonferroni)."""


def first_round(confidence: float) -> int:
    """The fewest documents that can show an effect: one with none is above the noise in each by chance 2^-n."""
    return max(2, math.ceil(math.log2(LOOKS / (1 - confidence))))


def rounds(documents: int, confidence: float) -> tuple[int, ...]:
    """How many documents have been read after each round, ascending; the last is all of them."""
    first = first_round(confidence)
    return (*(count for count in (first, 2 * first) if count < documents), documents)


def is_shown(effect: Tensor, noise: Tensor, *, confidence: float, seed: int) -> bool:
    """Whether the effect is above the noise, distances per document, at the level of one of several looks."""
    level = 1 - (1 - confidence) / LOOKS
    count, above = len(effect), int((effect > noise).sum())
    # how often a fair coin falls so at least
    chance = sum(math.comb(count, k) for k in range(above, count + 1)) / 2**count
    if chance > 1 - level:
        return False
    lower = bounds(effect, confidence=level, seed=seed)[0]
    return lower > bounds(noise, confidence=level, seed=seed)[1]
