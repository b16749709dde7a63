"""Which tensors may come out of training with another number of rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from merge_adapter.methods.change import Context, Kind, ModuleChange, TensorSpec, Weights

if TYPE_CHECKING:
    from torch import Tensor

LABELLED = ("SEQ_CLS", "TOKEN_CLS")
"""Task types whose head has one row per label."""
LABEL_HEADS = (
    "score.weight", "classifier.weight", "classifier.out_proj.weight", "classification_head.out_proj.weight",
    "logits_proj.weight", "sequence_summary.summary.weight",
)  # fmt: skip
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


@dataclass(frozen=True)
class ResizedBias:
    """The frozen bias of every token's logit `[1, tokens]`, with zeros for new tokens, as transformers resizes it."""

    stored: TensorSpec
    resized: TensorSpec

    def run(self, base: Weights, adapter: Weights) -> Iterator[tuple[str, Tensor]]:  # noqa: ARG002
        before = base.read(self.stored.name).float()
        made = before.new_zeros(self.resized.shape)
        kept = min(before.shape[1], made.shape[1])
        made[:, :kept] = before[:, :kept]
        yield self.resized.name, made


def resize_bias(stored: TensorSpec, tokens: int) -> ModuleChange:
    """The change that gives a `final_logits_bias` as many columns as there are tokens."""
    resized = TensorSpec(stored.name, stored.dtype, (1, tokens))
    return ModuleChange(
        module=stored.name,
        reads=(stored.name,),
        writes=(resized,),
        consumes=(),
        kind=Kind.REPLACE,
        memory_bytes=4 * (stored.elements + tokens),
        arithmetic=ResizedBias(stored, resized),
    )
