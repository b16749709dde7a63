"""Config fields that change what the model computes: the base's, unless the adapter had to change them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from merge_adapter.types import DType
from merge_adapter.verify.findings import Finding, fault, warning
from merge_adapter.verify.rounding import is_narrower

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
    merged_model: Any,
    base_model: Any,
    labels: int | None,
    asked: DType,
) -> Iterator[Finding]:
    """`merged` and `base` are the raw files, the two models what transformers made of them, defaults filled in.

    `labels`: how many the adapter's own head has. `asked`: the dtype of the merge.
    """
    merged_config, base_config = merged_model.config, base_model.config
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
    yield from _labels(merged_config, base_config)
    yield from _dtype(merged, base, merged_model, asked)


def _labels(merged: Any, base: Any) -> Iterator[Finding]:
    """Names of labels in other places make a right classifier say wrong things; other names may be meant."""
    left, right = getattr(merged, "id2label", None), getattr(base, "id2label", None)
    if not left or not right or left == right or left.keys() != right.keys():
        return
    number = min(key for key in left if left[key] != right[key])
    text = f"{number} is {_short(left[number])}, the base has {_short(right[number])}"
    if sorted(map(str, left.values())) == sorted(map(str, right.values())):
        yield fault("config", "id2label", f"the labels have changed places: {text}")
    else:
        yield warning("config", "id2label", text)


def _dtype(
    merged: Mapping[str, Any], base: Mapping[str, Any], model: nn.Module, asked: DType
) -> Iterator[Finding]:
    """transformers loads in the dtype that the config states; one that the files exceed takes digits from them.

    Not where the base itself is such a model.
    """
    stated = _stated(merged)
    stored = {value.dtype for value in model.parameters() if value.is_floating_point()}
    if stated is None or not all(is_narrower(stated, dtype) for dtype in stored):
        return
    if asked is not DType.AUTO or stated != _stated(base):
        held = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in stored))
        spelled = str(stated).removeprefix("torch.")
        yield fault(
            "config", "dtype", f"is {spelled}, the files hold {held}: loading would round every weight again"
        )


def _stated(config: Mapping[str, Any]) -> torch.dtype | None:
    name = config.get("dtype") or config.get("torch_dtype")
    found = getattr(torch, name.removeprefix("torch."), None) if isinstance(name, str) else None
    return found if isinstance(found, torch.dtype) and found.is_floating_point else None


_GENERATED = (
    "bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "forced_bos_token_id",
    "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens",
)  # fmt: skip
"""What decides where text begins and ends; how it is drawn is a matter of taste."""


def judge_generation(merged: Any, base: Any) -> Iterator[Finding]:
    """What `generate` does by default: generation_config.json, or what the config has in its place."""
    left, right = getattr(merged, "generation_config", None), getattr(base, "generation_config", None)
    if left is None or right is None:
        return
    for key in _GENERATED:
        one, other = getattr(left, key, None), getattr(right, key, None)
        if one != other:
            yield warning("config", f"generation, {key}", f"is {_short(one)}, the base has {_short(other)}")


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
