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
from merge_adapter.verify.files import local_layout
from merge_adapter.verify.findings import Finding, fault
from merge_adapter.verify.storage import Checkpoint

MODULES = "modules.json"

Tail = Callable[[Tensor, Tensor], Tensor]
"""(hidden states (documents, length, width), mask (documents, length)) -> embeddings (documents, width)."""


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
    "config_sentence_transformers.json": {
        "prompts": {},
        "default_prompt_name": None,
        "similarity_fn_name": "cosine",
    },
    "sentence_bert_config.json": {"max_seq_length": _EITHER, "do_lower_case": _EITHER},
}
"""What changes embeddings or how they are compared, with what its absence means."""


def judge_modules(merged: Path, sources: Resolved) -> Iterator[Finding]:
    """What sentence-transformers reads beside the weights and the pooling, which the embeddings themselves show."""
    source = source_of(sources)
    if source is None:
        return
    if not (merged / MODULES).is_file():
        text = "is missing: sentence-transformers would pool in another way than adapter and base do"
        yield fault("files", MODULES, text)
    for name, fields in _FIELDS.items():
        left, right = _object(merged, name), _stated(source, name)
        for field, default in fields.items():
            got, wanted = (_told(found.get(field, default)) for found in (left, right))
            if got != wanted and (default is not _EITHER or (field in left and field in right)):
                yield fault("config", name, f"{field} is {got!r}, adapter and base have {wanted!r}")


def _told(value: Any) -> Any:
    """A prompt that is empty is none."""
    return {key: one for key, one in value.items() if one} if isinstance(value, dict) else value


def _stated(repository: Repository, name: str) -> dict[str, Any]:
    return _parsed(repository.read(name)) if name in repository.files else {}


def _object(folder: Path, name: str) -> dict[str, Any]:
    return _parsed((folder / name).read_bytes()) if (folder / name).is_file() else {}


def _parsed(content: bytes) -> dict[str, Any]:
    """Fields that have a value; none of a file that cannot be read."""
    try:
        document = json.loads(content)
    except ValueError:
        return {}
    if not isinstance(document, dict):
        return {}
    return {key: value for key, value in document.items() if value is not None}


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
        embedding = features["sentence_embedding"]
        assert isinstance(embedding, Tensor)
        return embedding

    return run


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
    """The model in `folder` as its users load it: `SentenceTransformer(folder)`, in a dtype that loses nothing."""
    from sentence_transformers import SentenceTransformer

    with Checkpoint(folder, local_layout(folder).files) as held:
        dtype = held.widest_float
    model = SentenceTransformer(
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
    embedding = features["sentence_embedding"]
    assert isinstance(embedding, Tensor)
    return embedding.float().cpu()
