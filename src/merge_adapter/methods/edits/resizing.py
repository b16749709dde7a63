"""Which tensors may come out of training with another number of rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from merge_adapter.methods.change import Context, Kind, ModuleChange, TensorSpec, Weights
from merge_adapter.methods.task import is_labelled

if TYPE_CHECKING:
    from torch import Tensor

_LABEL_HEADS = (
    "score.weight", "score.out_proj.weight", "classifier.weight", "classifier.out_proj.weight",
    "classifier.linear_out.weight", "classifier.linear.weight", "classifier.1.weight", "classifier.dense.weight",
    "classifier_distill.linear.weight", "cls_classifier.weight", "distillation_classifier.weight",
    "classification_head.out_proj.weight", "sequence_summary.summary.weight", "logits_proj.weight", "fc.weight",
    "head.weight", "dist_head.weight", "perceiver.decoder.decoder.final_layer.weight",
    "decode_head.classifier.weight", "auxiliary_head.classifier.weight", "decoder.head.weight", "head.head.4.weight",
    "auxiliary_head.head.4.weight", "segmentation_head.classifier.convolution.weight",
)  # fmt: skip
"""The weights with one row per label in the classes of transformers; a test asks all of them."""
_BEFORE_THE_LAST = ("classifier.dense.weight", "sequence_summary.summary.weight")
"""Those of them that are hidden layers in other classes: where another is there as well."""


def may_resize(context: Context, parameter: str, stored: TensorSpec) -> bool:
    """Whether a trained tensor may have other rows than the base's: one per token, or one per label."""
    if stored.shape and stored.shape[0] in vocabularies(context.sources.base.config):
        return True
    weight = parameter.removesuffix(".bias") + ".weight" if parameter.endswith(".bias") else parameter
    return is_labelled(context.config) and weight in label_heads(context.tensors)


def label_heads(tensors: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """The weights with one row per label that an adapter holds whole: parameter of the model -> tensor."""
    held = {
        name.replace(".modules_to_save.", ".").removeprefix("base_model.model."): spec
        for name, spec in tensors.items()
        if len(spec.shape) > 1
    }
    found = {head: held[head] for head in _LABEL_HEADS if head in held}
    last = {head: spec for head, spec in found.items() if head not in _BEFORE_THE_LAST}
    return last or found


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
