"""Tokenizer, chat template and generation config of a model with a soft prompt in its vocabulary.

The new tokens stand in front of everything: of what the post-processor makes of a text, beginning-of-text token
included, and of what the chat template renders. That is where PEFT puts the prompt.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from merge_adapter.errors import MethodError
from merge_adapter.methods.soft_prompt import TOKENIZER, VirtualTokens, virtual_tokens
from merge_adapter.packaging.configs import repaired_generation_config, without_places
from merge_adapter.packaging.reading import read_object
from merge_adapter.packaging.tokenizer import CONFIG, templates_of
from merge_adapter.packaging.writing import Writer
from merge_adapter.types import Resolved

GENERATION_CONFIG = "generation_config.json"
GENERIC = "TokenizersBackend"
"""The class that takes tokenizer.json as it is. Some model classes make their own post-processor when they load."""
_PROBES = ("Hello, world", "")
_KEEP = "Keep the adapter and load it with PEFT beside its base."


def write_soft_prompt(sources: Resolved, writer: Writer) -> None:
    """Write what has to change of tokenizer and generation config, before the rest is copied.

    Raises MethodError for a tokenizer that cannot be made to put tokens in front.
    """
    tokens = virtual_tokens(sources)
    repository = sources.tokenizer
    assert repository is not None  # virtual_tokens has refused
    before = read_object(repository, TOKENIZER)
    config_before = read_object(repository, CONFIG) if CONFIG in repository.files else {}
    expected = [[*tokens.ids, *ids] for ids in _encoded(before, config_before, sources) or ()]
    document = with_tokens(before, tokens)
    config = _that_holds(document, _config(config_before, tokens), expected, sources)
    writer.write(TOKENIZER, json.dumps(document, ensure_ascii=False, indent=2).encode())
    writer.write_json(CONFIG, config)
    for path, template in templates_of(sources).items():
        writer.write(path, tokens.text.encode() + template)
    _write_generation_config(sources, tokens, writer)


def with_tokens(document: Mapping[str, Any], tokens: VirtualTokens) -> dict[str, Any]:
    """tokenizer.json with the tokens, special, and in front of every text."""
    edited: dict[str, Any] = copy.deepcopy(dict(document))
    edited["added_tokens"] = [
        *(edited.get("added_tokens") or ()),
        *(
            {"id": number, "content": name, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": True}
            for number, name in zip(tokens.ids, tokens.names, strict=True)
        ),
    ]  # fmt: skip
    edited["post_processor"] = _in_front(edited.get("post_processor"), tokens)
    return edited


def _in_front(processor: Any, tokens: VirtualTokens) -> dict[str, Any]:
    """The post-processor with the tokens before all it puts there already."""
    kind = processor.get("type") if isinstance(processor, dict) else None
    if kind == "TemplateProcessing":
        return _template(processor, tokens)
    if kind == "Sequence":
        steps = list(processor.get("processors") or ())
        at = next((at for at, step in enumerate(steps) if step.get("type") == "TemplateProcessing"), None)
        if at is not None:
            steps[at] = _template(steps[at], tokens)
        else:
            steps.append(_template(_EMPTY, tokens))
        return {**processor, "processors": steps}
    if kind in (None, "ByteLevel"):
        steps = [processor] if kind else []
        return {"type": "Sequence", "processors": [*steps, _template(_EMPTY, tokens)]}
    raise MethodError(
        f"The tokenizer's post-processor {kind} has no place for tokens in front of a text.", hint=_KEEP
    )


_EMPTY: Mapping[str, Any] = {
    "type": "TemplateProcessing",
    "single": [{"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {},
}


def _template(processor: Mapping[str, Any], tokens: VirtualTokens) -> dict[str, Any]:
    front = [{"SpecialToken": {"id": name, "type_id": 0}} for name in tokens.names]
    special = {
        name: {"id": name, "ids": [number], "tokens": [name]}
        for number, name in zip(tokens.ids, tokens.names, strict=True)
    }
    return {
        **processor,
        "single": [*front, *processor.get("single", ())],
        "pair": [*front, *processor.get("pair", ())],
        "special_tokens": {**processor.get("special_tokens", {}), **special},
    }


def _config(config: Mapping[str, Any], tokens: VirtualTokens) -> dict[str, Any]:
    """tokenizer_config.json with the tokens where it lists such, without templates, which get files of their own."""
    edited = {key: value for key, value in without_places(config).items() if key != "chat_template"}
    listed = next(
        (key for key in ("extra_special_tokens", "additional_special_tokens") if key in edited), None
    )
    key = listed or "extra_special_tokens"
    if isinstance(edited.get(key, []), list):
        edited[key] = [*edited.get(key, ()), *tokens.names]
    decoder = edited.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
        new = zip(tokens.ids, tokens.names, strict=True)
        edited["added_tokens_decoder"] = {
            **decoder,
            **{str(n): {"content": name, **flags} for n, name in new},
        }
    return edited


def _that_holds(
    document: Mapping[str, Any], config: dict[str, Any], expected: list[list[int]], sources: Resolved
) -> dict[str, Any]:
    """The config under which transformers gives the `expected` ids: as it is, or with the generic class.

    Raises MethodError when neither does.
    """
    generic = {key: value for key, value in config.items() if key not in ("add_bos_token", "add_eos_token")}
    for candidate in (config, {**generic, "tokenizer_class": GENERIC}):
        if expected and _encoded(document, candidate, sources) == expected:
            return candidate
    raise MethodError(
        "The tokenizer did not put the new tokens in front of a text when transformers loaded it.", hint=_KEEP
    )


def _encoded(
    document: Mapping[str, Any], config: Mapping[str, Any], sources: Resolved
) -> list[list[int]] | None:
    """Ids of a few texts from these files, loaded as users load them; None where they cannot be loaded."""
    from transformers import AutoTokenizer

    with TemporaryDirectory(prefix="merge-adapter-tokenizer-") as name:
        contents = {TOKENIZER: document, CONFIG: config, "config.json": sources.base.config}
        for path, content in contents.items():
            (Path(name) / path).write_text(json.dumps(content), encoding="utf-8")
        try:
            loaded = AutoTokenizer.from_pretrained(name, local_files_only=True)
            return [list(map(int, loaded(text)["input_ids"])) for text in _PROBES]
        except Exception:  # noqa: BLE001 - tokenizers fail in every way there is; the caller decides what that means
            return None


def _write_generation_config(sources: Resolved, tokens: VirtualTokens, writer: Writer) -> None:
    """The adapter's or the base's, with the tokens suppressed."""
    config: dict[str, Any] = {}
    for repository in (sources.adapter.repository, sources.base.repository):
        if GENERATION_CONFIG in repository.files:
            config = dict(read_object(repository, GENERATION_CONFIG))
            break
    else:
        keys = ("bos_token_id", "eos_token_id", "pad_token_id")
        config = {key: value for key in keys if (value := sources.base.config.get(key)) is not None}
    repaired, _ = repaired_generation_config(without_places(config))
    suppressed = repaired.get("suppress_tokens")
    repaired["suppress_tokens"] = [*(suppressed if isinstance(suppressed, list) else ()), *tokens.ids]
    writer.write_json(GENERATION_CONFIG, repaired)
