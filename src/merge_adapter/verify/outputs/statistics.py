"""Means with confidence bounds over documents, quantiles and histograms."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

RESAMPLES = 2000


@dataclass(frozen=True)
class Measure:
    """One distance over all documents."""

    mean: float
    lower: float
    upper: float
    """One-sided bootstrap bounds of the mean over documents."""
    p99: float
    p999: float
    largest: float
    agreement: float
    """Mean share of equal first choices (for embeddings: mean cosine similarity)."""

    def as_json(self) -> dict[str, float]:
        """For the report."""
        return {key: float(f"{value:.6g}") for key, value in vars(self).items()}


def measure(per_document: Tensor, each: Tensor, agree: Tensor, *, confidence: float, seed: int) -> Measure:
    """Summarise one arm. Deterministic for a seed."""
    lower, upper = bounds(per_document, confidence=confidence, seed=seed)
    values = each.double()
    return Measure(
        float(per_document.double().mean()),
        lower,
        upper,
        float(torch.quantile(values, 0.99)),
        float(torch.quantile(values, 0.999)),
        float(values.max()),
        float(agree.double().mean()),
    )


def bounds(per_document: Tensor, *, confidence: float, seed: int) -> tuple[float, float]:
    """One-sided lower and upper bound of the mean by the bootstrap over documents."""
    values = per_document.double()
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(0, len(values), (RESAMPLES, len(values)), generator=generator)
    means = values[picks].mean(1)
    return float(torch.quantile(means, 1 - confidence)), float(torch.quantile(means, confidence))


def histogram(samples: dict[str, Tensor], *, bins: int = 40) -> dict[str, Any]:
    """Counts of log10 of each sample over common bins; values of 0 fall into the first."""
    logs = {name: each.double().clamp(min=1e-18).log10() for name, each in samples.items() if each.numel()}
    if not logs:
        return {}
    low = math.floor(min(float(values.min()) for values in logs.values()))
    high = max(low + 1, math.ceil(max(float(values.max()) for values in logs.values())))
    counts = {
        name: torch.histc(values.float(), bins, low, high).int().tolist() for name, values in logs.items()
    }
    return {"log10_low": low, "log10_high": high, "counts": counts}
