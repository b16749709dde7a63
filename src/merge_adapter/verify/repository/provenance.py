"""Signs that an adapter was not trained on the base it is judged with. Signs only: warnings, never faults."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from merge_adapter.packaging.metadata import named_datasets, read_card
from merge_adapter.types import Adapter, Resolved
from merge_adapter.verify.findings import Finding, note, warning


def judge_provenance(sources: Resolved) -> Iterator[Finding]:
    """What the adapters' configs and cards record of their base, against the base in hand."""
    for adapter in sources.adapters:
        yield from _recorded(adapter, sources)
        yield from _carded(adapter, sources)


def _recorded(adapter: Adapter, sources: Resolved) -> Iterator[Finding]:
    origin = sources.base.repository.origin
    named = adapter.config.get("base_model_name_or_path")
    if origin.repo_id and _is_id(named) and named != origin.repo_id:
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


def _carded(adapter: Adapter, sources: Resolved) -> Iterator[Finding]:
    """The card counts where the config names no repository: trained from a local folder, for example."""
    base = sources.base.repository.origin.repo_id
    if not base or _is_id(adapter.config.get("base_model_name_or_path")):
        return
    named = read_card(adapter.repository).metadata.get("base_model")
    listed = [name for name in (named if isinstance(named, list) else [named]) if _is_id(name)]
    if listed and base not in listed:
        text = f"the adapter's card names {listed[0]} as its base, it was judged on {base}"
        yield warning("adapter", "base model", text)


def untried_domain(sources: Resolved) -> Iterator[Finding]:
    """The data sets that the adapters' cards name: they are not downloaded, and that is said."""
    named = named_datasets(sources)
    if named:
        text = f"the card names {', '.join(named[:3])} as training data, which is not downloaded"
        yield note("outputs", "probes", f"{text}: --probes FILE puts documents of that domain to the models")


def _is_id(value: Any) -> bool:
    """Bounded: what a card names stands in reports."""
    return isinstance(value, str) and re.fullmatch(r"[\w.-]{1,96}/[\w.-]{1,96}", value) is not None


def judge_effect(effects: Sequence[float]) -> Iterator[Finding]:
    """Updates larger than the weights they change: fine-tuning does not do that, a foreign scale or base may."""
    finite = sorted(effect for effect in effects if math.isfinite(effect))
    if finite and (median := finite[len(finite) // 2]) > 1:
        text = f"half of its updates are larger than the weights they change (median {median:.3g} times)"
        yield warning("adapter", "base model", f"{text}: was the adapter trained on this base?")


def judge_vocabularies(adapter: Mapping[str, Any], base: Mapping[str, Any]) -> Iterator[Finding]:
    """Two surveys of tokenizers: an adapter that comes with one which reads nothing as the base's does."""
    if "error" in adapter or "error" in base:
        return
    special = {*adapter["special_ids"], *base["special_ids"]}
    pairs = [
        tuple([token for token in ids if token not in special] for ids in pair)
        for pair in zip(adapter["encoded"], base["encoded"], strict=True)
    ]
    if pairs and all(left != right for left, right in pairs):
        text = "the adapter's tokenizer encodes every probe differently from the base's"
        yield warning("adapter", "base model", f"{text}: was the adapter trained on this base?")


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
    """An adapter on a foreign base tends to write noise: worse than guessing, and worse than the base by far.

    All in nats per token. A base that itself does no better than guessing on these texts, as small ones may, tells
    something only where base + adapter is twice as bad.
    """
    chance = math.log(vocabulary)
    if reference > chance and (base < chance or reference > 2 * base):
        text = (
            f"base + adapter predicts the probes worse than chance ({reference:.2f} nats per token, chance is "
            f"{chance:.2f}, the base alone has {base:.2f}): was the adapter trained on this base?"
        )
        yield warning("adapter", "base model", text)
