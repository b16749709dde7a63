"""Config fields that change what the model computes: the base's, unless the adapter had to change them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from merge_adapter.verify.findings import Finding, fault, warning

_INERT = frozenset(
    {
        "_name_or_path", "transformers_version", "torch_dtype", "dtype", "architectures", "auto_map", "use_cache",
        "id2label", "label2id", "num_labels", "problem_type", "_attn_implementation", "attn_implementation",
        "output_attentions", "output_hidden_states", "return_dict", "finetuning_task", "task_specific_params",
        "gradient_checkpointing", "torchscript", "pruned_heads", "tie_word_embeddings", "vocab_size",
        "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id", "unsloth_version",
        "unsloth_fixed", "attention_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob", "resid_pdrop",
        "embd_pdrop", "attn_pdrop", "initializer_range", "initializer_factor", "_commit_hash", "model_max_length",
    }
)  # fmt: skip
"""Fields that leave a forward pass on given ids as it is, or that are judged by their own check below."""


def judge_configs(
    merged: Mapping[str, Any],
    base: Mapping[str, Any],
    *,
    merged_config: Any,
    base_config: Any,
    labels: int | None,
) -> Iterator[Finding]:
    """`merged` and `base` are the raw files; the two objects are what transformers made of them, defaults filled in."""
    left, right = _flat(merged_config.to_dict()), _flat(base_config.to_dict())
    for key in sorted(set(left) | set(right)):
        if _leaf(key) in _INERT:
            continue
        if left.get(key) != right.get(key):
            text = f"is {_short(left.get(key))}, the base has {_short(right.get(key))}"
            yield fault("config", key, text)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if key in merged and key in base and merged[key] != base[key]:
            yield warning("config", key, f"is {_short(merged[key])}, the base has {_short(base[key])}")
    if merged.get("architectures") != base.get("architectures") and labels is None:
        yield warning(
            "config",
            "architectures",
            f"is {merged.get('architectures')}, the base has {base.get('architectures')}",
        )
    if "quantization_config" in merged:
        yield fault("config", "quantization_config", "is left in the config, the weights are plain")
    number = getattr(merged_config, "num_labels", None)
    if labels is not None and number != labels:
        yield fault("config", "num_labels", f"is {number}, the adapter's head has {labels}")


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and key not in ("id2label", "label2id"):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _leaf(key: str) -> str:
    return key.rpartition(".")[2]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"
