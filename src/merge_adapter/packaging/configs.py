"""config.json and generation_config.json of the merged model."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Mapping
from typing import Any

from merge_adapter.types import BaseModel, DType, MergeSettings, QuantizedBase

_DTYPE_KEYS = ("dtype", "torch_dtype")
"""Of transformers 5 and of its predecessors."""
_MACHINE_PATH = re.compile(r"[/~.\\]|[A-Za-z]:[\\/]")
"""How a path of somebody's machine begins; a Hub id begins with a letter or digit."""
_PLACE_KEYS = ("_name_or_path", "name_or_path", "tokenizer_file", "special_tokens_map_file")
"""Keys under which libraries store where a thing was loaded from. None of them is needed to load it."""
_TOKEN_KEYS = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "decoder_start_token_id",
    "transformers_version",
)
"""What a generation config cannot do without."""


def merged_config(base: BaseModel, changes: Mapping[str, Any], settings: MergeSettings) -> dict[str, Any]:
    """The base's config.json with the plan's changes, the dtype of the weights, and no machine's paths.

    A change whose value is None removes its key. Equal to the base's own when there is nothing to change.
    """
    config: dict[str, Any] = copy.deepcopy(dict(base.config))
    for key, value in changes.items():
        if value is None:
            config.pop(key, None)
        else:
            config[key] = value
    if settings.quantized_base is QuantizedBase.DEQUANTIZE:
        config.pop("quantization_config", None)
        for part in _parts(config):
            part.pop("quantization_config", None)
    if settings.dtype is not DType.AUTO:
        _set_dtype(config, settings.dtype)
    return without_places(config)


def without_places(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config without keys that tell a path on the machine of whoever saved it."""
    return {
        key: value
        for key, value in config.items()
        if not (key in _PLACE_KEYS and isinstance(value, str) and _is_machine_path(value))
    }


def _is_machine_path(value: str) -> bool:
    return bool(_MACHINE_PATH.match(value)) or value.count("/") > 1 or "\\" in value


def _set_dtype(config: dict[str, Any], dtype: DType) -> None:
    """State the dtype under the key the config uses, in its sub-configs too where they state one."""
    used = [key for key in _DTYPE_KEYS if key in config] or ["dtype"]
    for key in used:
        config[key] = dtype.value
    for part in _parts(config):
        for key in _DTYPE_KEYS:
            if part.get(key) is not None:
                part[key] = dtype.value


def _parts(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The configs of a composite model's parts: text, vision, audio, encoder, decoder and the like."""
    return [
        value
        for key, value in config.items()
        if isinstance(value, dict) and (key.endswith("_config") or key in ("encoder", "decoder", "generator"))
    ]


def repaired_generation_config(config: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The generation config as transformers accepts it, and the names of the settings dropped for that.

    Transformers refuses to save, and so refuses users of the merged model, a config with settings that
    contradict each other, for example a temperature beside `do_sample: false`. What is dropped had no effect
    on generation: sampling is not switched on to make room for it. A config that is still refused keeps
    its token ids only.
    """
    kept = dict(config)
    dropped: list[str] = []
    while refused := _refused_settings(kept):
        known = [name for name in refused if name in kept]
        if not known:
            dropped += [name for name in kept if name not in _TOKEN_KEYS]
            return {name: value for name, value in kept.items() if name in _TOKEN_KEYS}, tuple(dropped)
        for name in known:
            del kept[name]
        dropped += known
    return kept, tuple(dropped)


def _refused_settings(config: Mapping[str, Any]) -> list[str]:
    """Names of the settings that transformers' strict validation complains of; empty when it accepts all."""
    from transformers import GenerationConfig
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            GenerationConfig.from_dict(dict(config)).validate(strict=True)
    except (ValueError, TypeError, AttributeError) as error:
        listed = re.findall(r"^- `(\w+)`:", str(error), flags=re.MULTILINE)
        return listed or re.findall(r"`(\w+)`", str(error))[:1] or [str(error)]
    finally:
        transformers_logging.set_verbosity(verbosity)
    return []
