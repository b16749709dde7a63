"""Which tensors may come out of training with another number of rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from merge_adapter.methods.change import Context, TensorSpec

LABELLED = ("SEQ_CLS", "TOKEN_CLS")
"""Task types whose head has one row per label."""
LABEL_HEADS = ("score.weight", "classifier.weight", "classifier.out_proj.weight")
"""How the names of those heads end."""


def may_resize(context: Context, parameter: str, stored: TensorSpec) -> bool:
    """Whether a trained tensor may have other rows than the base's: one per token, or one per label."""
    if stored.shape and stored.shape[0] in vocabularies(context.sources.base.config):
        return True
    head = context.config.get("task_type") in LABELLED and len(stored.shape) in (1, 2)
    return head and parameter.replace(".bias", ".weight").endswith(LABEL_HEADS)


def vocabularies(config: Mapping[str, Any]) -> set[int]:
    """Every `vocab_size` in a config.json."""
    nested = [value for value in config.values() if isinstance(value, Mapping)]
    return {one["vocab_size"] for one in (config, *nested) if isinstance(one.get("vocab_size"), int)}
