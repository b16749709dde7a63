"""Tokenizer and chat template of the merged repository against those the adapter was trained with.

`survey` writes down everything a tokenizer does to the probes; the merged one is surveyed in its own process, the
expected one here, and two surveys are compared field by field.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from merge_adapter.packaging.tokenizer import template_beside
from merge_adapter.types import Resolved
from merge_adapter.verify.findings import Finding, fault, undecided, warning

_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")


def survey(
    folder: Path, texts: Sequence[str], conversations: Sequence[Any], *, trust: bool
) -> dict[str, Any]:
    """What the tokenizer in `folder` does to the probes; `{"error": …}` when it cannot be used. JSON-ready."""
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust, local_files_only=True
        )
        return _survey(tokenizer, texts, conversations)
    except Exception as error:  # noqa: BLE001 - tokenizers fail in every way there is; all of them mean "not there"
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}


def _survey(tokenizer: Any, texts: Sequence[str], conversations: Sequence[Any]) -> dict[str, Any]:
    encoded = [list(map(int, tokenizer(text)["input_ids"])) for text in texts]
    return {
        "size": len(tokenizer),
        "vocabulary": {str(token): int(number) for token, number in tokenizer.get_vocab().items()},
        "special": {name: _text(getattr(tokenizer, name, None)) for name in _SPECIAL},
        "special_ids": sorted(map(int, tokenizer.all_special_ids)),
        "max_length": _length(tokenizer.model_max_length),
        "padding_side": tokenizer.padding_side,
        "encoded": encoded,
        "decoded": [tokenizer.decode(ids) for ids in encoded],
        "template": bool(getattr(tokenizer, "chat_template", None)),
        "rendered": [_render(tokenizer, turns) for turns in conversations],
    }


def _text(token: Any) -> str | None:
    return None if token is None else str(token)


def _length(value: Any) -> int | None:
    # transformers writes "none" as an integer of thirty digits
    return int(value) if isinstance(value, int | float) and value < 1e12 else None


def _render(tokenizer: Any, turns: Any) -> str | None:
    """The conversation as the template renders it, the error's kind when it refuses; None without a template."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # noqa: BLE001 - templates are code, and raise what they like
        return f"<{type(error).__name__}>"


def judge_tokenizer(
    merged: Mapping[str, Any], expected: Mapping[str, Any], *, embeddings: int | None
) -> Iterable[Finding]:
    """Two surveys side by side; `embeddings` is the merged model's number of input embeddings."""
    part = "tokenizer"
    if "error" in expected:
        said = (
            f"the tokenizer of adapter or base cannot be used, so nothing was compared: {expected['error']}"
        )
        yield undecided(part, "", f"{said}; mend its files, or install what it needs")
        return
    if "error" in merged or not merged:
        text = merged.get("error", "it was not surveyed")
        yield fault(part, "", f"the merged repository's tokenizer cannot be used: {text}")
        return
    pairs = list(zip(merged["encoded"], expected["encoded"], strict=True))
    differing = sum(left != right for left, right in pairs)
    if differing:
        yield fault(part, "", f"encodes {differing} of {len(pairs)} probes differently")
    elif merged["decoded"] != expected["decoded"]:
        yield fault(part, "", "decodes the probes differently")
    for name in _SPECIAL:
        if merged["special"][name] != expected["special"][name]:
            text = f"is {merged['special'][name]!r}, expected {expected['special'][name]!r}"
            yield fault(part, name, text)
    if merged["size"] != expected["size"]:
        yield fault(part, "", f"has {merged['size']:,} tokens, expected {expected['size']:,}")
    yield from _vocabulary(merged["vocabulary"], expected["vocabulary"])
    yield from _template(merged, expected)
    highest = max((max(ids) for ids in merged["encoded"] if ids), default=0)
    if embeddings is not None and highest >= embeddings:
        yield fault(part, "", f"gives token id {highest:,}, the model has {embeddings:,} embeddings")
    elif embeddings is not None and merged["size"] > embeddings:
        yield warning(part, "", f"names {merged['size']:,} tokens, the model has {embeddings:,} embeddings")
    if merged["special_ids"] != expected["special_ids"]:
        text = f"are the ids {_some(merged['special_ids'])}, expected {_some(expected['special_ids'])}"
        yield warning(part, "special tokens", text)
    for name in ("max_length", "padding_side"):
        if merged[name] != expected[name]:
            yield warning(part, name, f"is {merged[name]!r}, expected {expected[name]!r}")


def _vocabulary(merged: Mapping[str, int], expected: Mapping[str, int]) -> Iterable[Finding]:
    """Every token, those that no probe holds too."""
    moved = [token for token in expected if merged.get(token) != expected[token]]
    if moved:
        token = min(moved, key=lambda one: expected[one])
        text = f"{token!r} has the id {merged.get(token)}, expected {expected[token]} ({len(moved):,} such)"
        yield fault("tokenizer", "vocabulary", text)


def _some(ids: Sequence[int]) -> str:
    shown = ", ".join(map(str, ids[:8]))
    return f"{shown}, … ({len(ids)})" if len(ids) > 8 else shown or "none"


def _template(merged: Mapping[str, Any], expected: Mapping[str, Any]) -> Iterable[Finding]:
    if merged["template"] != expected["template"]:
        text = "is missing" if expected["template"] else "is there though adapter and base have none"
        yield fault("tokenizer", "chat template", text)
        return
    differing = sum(
        left != right for left, right in zip(merged["rendered"], expected["rendered"], strict=True)
    )
    if differing:
        text = f"renders {differing} of {len(expected['rendered'])} conversations differently"
        yield fault("tokenizer", "chat template", text)


def tokenizer_folder(sources: Resolved, stack: ExitStack) -> Path | None:
    """A local folder with the tokenizer the merged model must have; None when there is none.

    AutoTokenizer asks a model's config which class to use when the tokenizer's own files do not say: an adapter's files
    are joined with the base's config for that, in a folder that lives as long as `stack`. A chat template that only
    the other repository has is joined too.
    """
    repository = sources.tokenizer
    if repository is None:
        return None
    names = [name for name in repository.files if _is_tokenizer_file(name)]
    place = repository.folder(names)
    template = template_beside(sources)
    if (place / "config.json").exists() and not template:
        return place
    joined = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="merge-adapter-tokenizer-")))
    for name, content in [*((name, (place / name).read_bytes()) for name in names), *template.items()]:
        (joined / name).parent.mkdir(parents=True, exist_ok=True)
        (joined / name).write_bytes(content)
    (joined / "config.json").write_bytes(sources.base.repository.read("config.json"))
    return joined


def _is_tokenizer_file(name: str) -> bool:
    heavy = (
        ".safetensors",
        ".bin",
        ".pt",
        ".pth",
        ".h5",
        ".msgpack",
        ".onnx",
        ".gguf",
        ".md",
        ".png",
        ".jpg",
    )
    return "/" not in name and not name.startswith((".", "adapter_")) and not name.endswith(heavy)


def load_tokenizer(folder: Path | None, texts: Iterable[str] = (), *, trust: bool) -> Any:
    """The tokenizer in `folder`; None when there is none, or when it cannot be loaded or read `texts`, which the survey
    reports."""
    if folder is None:
        return None
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust, local_files_only=True
        )
        for text in texts:
            tokenizer(text)
    except Exception:  # noqa: BLE001 - tokenizers fail in every way there is
        return None
    return tokenizer
