"""Signs that an adapter was not trained on the base it is judged with. Signs only: warnings, never faults."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from torch import Tensor

from merge_adapter.types import Adapter, Resolved
from merge_adapter.verify.findings import Finding, warning


def judge_provenance(sources: Resolved) -> Iterator[Finding]:
    """What the adapters' configs record of their base, against the base in hand."""
    for adapter in sources.adapters:
        yield from _recorded(adapter, sources)


def _recorded(adapter: Adapter, sources: Resolved) -> Iterator[Finding]:
    origin = sources.base.repository.origin
    named = adapter.config.get("base_model_name_or_path")
    if (
        isinstance(named, str)
        and origin.repo_id
        and re.fullmatch(r"[\w.-]+/[\w.-]+", named)
        and named != origin.repo_id
    ):
        text = f"the adapter names {named} as its base, it was judged on {origin.repo_id}"
        yield warning("adapter", "base model", text)
    revision = adapter.config.get("revision")
    if (
        isinstance(revision, str)
        and re.fullmatch(r"[0-9a-f]{40}", revision)
        and origin.revision not in (None, revision)
    ):
        text = f"the adapter was trained on revision {revision[:12]}, it was judged on {str(origin.revision)[:12]}"
        yield warning("adapter", "base model", text)


def likelihood(logits: Tensor, ids: Tensor, mask: Tensor) -> float:
    """Mean negative log-likelihood of each next token, nats. `logits` (documents, length, vocabulary)."""
    total, count = 0.0, 0
    for row, tokens, real in zip(logits, ids, mask, strict=True):
        length = int(real.sum())
        if length > 1:
            scores = row[: length - 1].double().log_softmax(-1)
            total -= float(scores.gather(1, tokens[1:length, None]).sum())
            count += length - 1
    return total / count if count else math.nan


def judge_likelihood(reference: float, base: float, vocabulary: int) -> Iterator[Finding]:
    """An adapter on a foreign base tends to write noise: worse than guessing, where the base alone is not."""
    if base < math.log(vocabulary) < reference:
        text = (
            f"base + adapter predicts the probes worse than chance ({reference:.2f} nats per token, chance is "
            f"{math.log(vocabulary):.2f}), the base alone does not ({base:.2f}): was the adapter trained on this base?"
        )
        yield warning("adapter", "base model", text)
