"""How strongly each module is adapted, read from the raw adapter config: r, alpha, rsLoRA and their patterns.

PEFT's rule for patterns (its documentation of `rank_pattern`): a key is a regular expression that must match the
module's path whole, or its end after a dot; the first key that matches wins.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Recipe:
    """The numbers of one module."""

    rank: int
    alpha: float
    rslora: bool
    dora: bool

    @property
    def scale(self) -> float:
        """What B A is multiplied with."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def recipe(config: Mapping[str, Any], path: str) -> Recipe:
    """The numbers for the module at `path` (without PEFT's prefix)."""
    rank = _matching(config.get("rank_pattern"), path, config.get("r", 8))
    alpha = _matching(config.get("alpha_pattern"), path, config.get("lora_alpha", 8))
    return Recipe(int(rank), float(alpha), bool(config.get("use_rslora")), bool(config.get("use_dora")))


def _matching(patterns: Any, path: str, default: Any) -> Any:
    if isinstance(patterns, Mapping):
        for pattern, value in patterns.items():
            # an adapter's own text used as an expression: PEFT itself does the same when it loads it
            if re.fullmatch(rf"(.*\.)?({pattern})", path):
                return value
    return default
