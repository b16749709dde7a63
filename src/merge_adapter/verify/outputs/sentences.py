"""Embedding models as sentence-transformers runs them: what comes after the transformer belongs to the model too.

Optional: without sentence-transformers installed, and for repositories without its configs, embeddings are mean-pooled.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from merge_adapter.errors import MalformedError
from merge_adapter.types import Repository, Resolved
from merge_adapter.verify.findings import Finding, fault
from merge_adapter.verify.models.storage import Checkpoint, local_layout

MODULES = "modules.json"
CONFIG = "config_sentence_transformers.json"

Tail = Callable[[Tensor, Tensor], Tensor]
"""(hidden states (documents, length, width), mask (documents, length)) -> embeddings (documents, width).

Models with a vector for each token answer with all of them, one after another: (documents, length * width).
"""
_CLASSES = ("SentenceTransformer", "MultiVectorEncoder", "SparseEncoder")
"""Those of sentence-transformers that embed; the first for repositories that name none."""


def installed() -> bool:
    """Whether sentence-transformers can be used here."""
    return importlib.util.find_spec("sentence_transformers") is not None


def source_of(sources: Resolved) -> Repository | None:
    """The repository whose pooling the merged model must have: the adapter's when it carries one, else the base's."""
    for repository in (sources.adapter.repository, sources.base.repository):
        if MODULES in repository.files:
            return repository
    return None


_EITHER = object()
"""Of a field that newer versions keep elsewhere: it is compared where both files state it."""

_FIELDS: dict[str, dict[str, Any]] = {
    CONFIG: {"prompts": {}, "default_prompt_name": None, "similarity_fn_name": "cosine"},
    "sentence_bert_config.json": {"max_seq_length": _EITHER, "do_lower_case": _EITHER},
}
"""What changes embeddings or how they are compared, with what its absence means."""


def judge_modules(merged: Path, sources: Resolved, *, pooled: bool) -> Iterator[Finding]:
    """What sentence-transformers reads beside the weights and the pooling, which the embeddings themselves show.

    Each file is the adapter's where it carries it, else the base's. `pooled`: whether the model is asked to embed.
    """
    if pooled and source_of(sources) is not None and not (merged / MODULES).is_file():
        text = "is missing: sentence-transformers would pool in another way than adapter and base do"
        yield fault("files", MODULES, text)
    both = (sources.adapter.repository, sources.base.repository)
    for name, fields in _FIELDS.items():
        held = next((repository for repository in both if name in repository.files), None)
        own, expected = _stated(merged, name), _stated(held.folder([name]), name) if held is not None else {}
        for field, default in fields.items():
            got, wanted = (_told(found.get(field, default)) for found in (own, expected))
            if got != wanted and (default is not _EITHER or (field in own and field in expected)):
                yield fault("config", name, f"{field} is {got!r}, adapter and base have {wanted!r}")


def _told(value: Any) -> Any:
    """A prompt that is empty is none."""
    return {key: one for key, one in value.items() if one} if isinstance(value, dict) else value


def _stated(folder: Path, name: str) -> dict[str, Any]:
    """The fields of a config that have a value; none of a file that is not there or cannot be read."""
    try:
        document = json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    found = document if isinstance(document, dict) else {}
    return {key: value for key, value in found.items() if value is not None}


def tail_of(repository: Repository) -> Tail:
    """Everything that follows the transformer in `repository`, as sentence-transformers' own modules.

    Raises MalformedError for configs it cannot use.
    """
    folder = repository.folder([path for path in repository.files if path.endswith(".json") or "/" in path])
    try:
        entries = json.loads((folder / MODULES).read_text(encoding="utf-8"))
        modules = [_module(folder, entry) for entry in entries[1:]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise MalformedError(f"{MODULES} of {repository.origin} cannot be used: {error}") from error
    for module in modules:
        module.eval()

    def run(hidden: Tensor, mask: Tensor) -> Tensor:
        features: dict[str, Any] = {"token_embeddings": hidden, "attention_mask": mask}
        with torch.no_grad():
            for module in modules:
                features = module(features)
        return _embedding(features, mask)

    return run


def _embedding(features: dict[str, Any], mask: Tensor) -> Tensor:
    """What the last module gives: vectors of documents, or else those of their tokens, zeros where there is none.

    Raises MalformedError for modules that end in neither.
    """
    found = features.get("sentence_embedding")
    if isinstance(found, Tensor):
        return found
    tokens = features.get("token_embeddings")
    if not isinstance(tokens, Tensor):
        raise MalformedError(f"the modules that {MODULES} lists end in no embedding")
    return (tokens * mask.to(tokens)[..., None]).flatten(1)


def _module(folder: Path, entry: dict[str, str]) -> Any:
    place, _, name = entry["type"].rpartition(".")
    if not (place == "sentence_transformers" or place.startswith("sentence_transformers.")):
        raise ValueError(f"{entry['type']} is not a module of sentence-transformers")
    found = getattr(importlib.import_module(place), name)
    path = entry["path"]
    if Path(path).is_absolute() or ".." in Path(path).parts:
        raise ValueError(f"{path!r} is not a path inside the repository")
    return found.load(str(folder), subfolder=path, local_files_only=True)


def load_whole(folder: Path, *, trust: bool) -> Any:
    """The model in `folder` as its users load it, in a dtype that loses nothing.

    That is `SentenceTransformer(folder)`, or the class which its config names.
    """
    import sentence_transformers

    with Checkpoint(folder, local_layout(folder).files) as held:
        dtype = held.widest_float
    stated = _stated(folder, CONFIG).get("model_type")
    made = getattr(sentence_transformers, stated if stated in _CLASSES else _CLASSES[0])
    model = made(
        str(folder),
        device="cpu",
        trust_remote_code=trust,
        local_files_only=True,
        model_kwargs={"dtype": dtype},
    )
    return model.eval()


def embed_whole(model: Any, ids: Tensor, mask: Tensor, device: torch.device) -> Tensor:
    """Embeddings (documents, width) of token ids, through every module of `model`."""
    with torch.no_grad():
        features = model({"input_ids": ids.to(device), "attention_mask": mask.to(device)})
    return _embedding(features, mask).float().cpu()
