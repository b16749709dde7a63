"""The model an adapter was trained on, built from its config alone: every name and shape, no weights."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from merge_adapter.methods.task import trained_class

TASKS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
"""PEFT's task types and the auto classes that PEFT's own AutoPeftModel classes load for them."""

_FUSED_SINCE = re.compile(r"\.experts\.\d+\.|\.block_sparse_moe\.|\.mlp\.gate$")
"""Modules of mixture-of-experts models in transformers 4 that are parameters of one module since 5."""


@dataclass(frozen=True)
class Architecture:
    """A model on the meta device."""

    model: Any
    """A PreTrainedModel; all parameters and buffers are meta tensors, in evaluation mode."""
    class_name: str


@dataclass(frozen=True)
class UnknownArchitecture:
    """No class of transformers has the modules that the adapter names."""

    reason: str
    absent: tuple[str, ...] = ()
    """The modules that the closest class lacks; () when no class could be built at all."""


def build(
    folder: Path,
    adapter_config: Mapping[str, Any],
    modules: Collection[str],
    *,
    trust_remote_code: bool,
    config_changes: Mapping[str, Any] | None = None,
) -> Architecture | UnknownArchitecture:
    """Build the class whose modules include every one of `modules`.

    `folder` holds the base's config.json, and its code where it has some. `modules` are paths as the adapter
    names them, without PEFT's `base_model.model.`. `config_changes` are attributes to set before building
    (`num_labels`, for a head which the base lacks). Candidates are tried in this order: the class recorded in
    the adapter (`auto_mapping`), the auto class of its `task_type`, the base's own `architectures`, AutoModel.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, OSError, ImportError) as error:
        return UnknownArchitecture(f"transformers cannot read the base's config.json: {_first_line(error)}")
    for name, value in (config_changes or {}).items():
        setattr(config, name, value)
    tried: list[str] = []
    fewest: list[str] = []
    for factory in _candidates(transformers, config, adapter_config, trust_remote_code=trust_remote_code):
        try:
            model = _on_meta(factory, config, trust_remote_code=trust_remote_code)
        except Exception as error:  # noqa: BLE001 - any class may refuse any config; the next may accept
            tried.append(f"{factory.__name__}: {_first_line(error)}")
            continue
        present = {name for name, _ in model.named_modules()}
        absent = sorted(name for name in set(modules) - present if not _FUSED_SINCE.search(name))
        if not absent:
            return Architecture(model, type(model).__name__)
        fewest = min(fewest or absent, absent, key=len)
        tried.append(
            f"{type(model).__name__} has no module {absent[0]} ({len(absent)} of {len(modules)} absent)"
        )
    fitting = [reason for reason in dict.fromkeys(tried) if "Unrecognized configuration class" not in reason]
    reason = "no class fits the adapter: " + "; ".join(fitting or tried or ["none to try"])
    return UnknownArchitecture(reason, tuple(fewest))


def _candidates(
    transformers: Any, config: Any, adapter: Mapping[str, Any], *, trust_remote_code: bool
) -> Iterator[Any]:
    """Classes to try, each once."""
    names: list[str] = []
    if recorded := trained_class(adapter):
        names.append(recorded)
    if (task := TASKS.get(str(adapter.get("task_type")))) is not None:
        names.append(task)
    names.extend(str(name) for name in getattr(config, "architectures", None) or ())
    if "auto_map" in config.to_dict() and trust_remote_code:
        names.extend(config.to_dict()["auto_map"])
    names.extend(("AutoModelForImageTextToText", "AutoModelForMaskedLM", "AutoModel"))
    for name in dict.fromkeys(names):
        factory = getattr(transformers, name, None)
        if isinstance(factory, type) and (
            hasattr(factory, "from_config") or hasattr(factory, "_from_config")
        ):
            yield factory


def _on_meta(factory: Any, config: Any, *, trust_remote_code: bool) -> Any:
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter(
            "ignore"
        )  # constructors warn about choices that only matter for running the model
        if factory.__name__.startswith("AutoModel"):
            model = factory.from_config(config, trust_remote_code=trust_remote_code, dtype=torch.float32)
        else:
            model = factory._from_config(config, dtype=torch.float32)
    return model.eval()


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
