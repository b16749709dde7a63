"""Files of sentence-transformers: the modules behind the transformer, and how texts enter it.

`modules.json` lists the modules of a SentenceTransformer or CrossEncoder with their folders. A file is the
adapter's where it carries it, else the base's: training a head such as a Dense layer beside an adapter
saves that head in the adapter's folder.
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Any

from merge_adapter.checkpoint.sentence import MODULES
from merge_adapter.errors import MalformedError, PolicyError
from merge_adapter.packaging.reading import read_json
from merge_adapter.packaging.writing import Writer, safe_path
from merge_adapter.types import MergeSettings, Repository, Resolved

_ROOT_FILES = re.compile(
    r"config_sentence_transformers\.json|sentence_[a-z]+_config\.json|" + re.escape(MODULES)
)
_MODULE_SUFFIXES = frozenset((".json", ".safetensors", ".txt", ".model", ".jinja"))
_PICKLE = "pytorch_model.bin"
_WEIGHTS = "model.safetensors"


def is_sentence_transformer(sources: Resolved) -> bool:
    """Whether either repository lists modules of sentence-transformers."""
    return _modules_repository(sources) is not None


def write_sentence_transformer(sources: Resolved, writer: Writer, settings: MergeSettings) -> None:
    """The modules' list, configs and weights; nothing for a repository that is no SentenceTransformer.

    Raises PolicyError for modules that are code of the repository when it is not trusted.
    """
    listed = _modules_repository(sources)
    folders = _module_folders(listed, settings) if listed is not None else []
    both = ((sources.adapter.repository, "adapter"), (sources.base.repository, "base"))
    for repository, source in both:
        for path in sorted(repository.files):
            if _ROOT_FILES.fullmatch(path) and (listed is not None or path != MODULES):
                writer.copy(repository, path, source=source)
    for folder in folders:
        for repository, source in both:
            _copy_module(repository, folder, writer, source=source)


def _modules_repository(sources: Resolved) -> Repository | None:
    for repository in (sources.adapter.repository, sources.base.repository):
        if MODULES in repository.files:
            return repository
    return None


def _module_folders(repository: Repository, settings: MergeSettings) -> list[str]:
    """The folders modules.json names, without that of the transformer at the root."""
    listed = read_json(repository, MODULES)
    place = f"{MODULES} of {repository.origin}"
    if not isinstance(listed, list):
        raise MalformedError(f"{place} holds a {type(listed).__name__}, expected a list")
    folders = []
    for module in listed:
        path: Any = module.get("path") if isinstance(module, dict) else None
        if not isinstance(path, str):
            raise MalformedError(f"{place} lists a module without a path", hint="Save the model again.")
        kind = str(module.get("type", ""))
        if kind and not kind.startswith("sentence_transformers.") and not settings.trust_remote_code:
            raise PolicyError(
                f"{place} lists the module {kind!r}, which is Python code of that repository",
                hint="Read that code; if you trust it, add --trust-remote-code.",
            )
        if path.strip("/"):
            folders.append(safe_path(path.rstrip("/"), of=place))
    return folders


def _copy_module(repository: Repository, folder: str, writer: Writer, *, source: str) -> None:
    """Copy one module's files; weights that come pickled are written as safetensors."""
    inside = [path for path in sorted(repository.files) if path.startswith(f"{folder}/")]
    for path in inside:
        if PurePosixPath(path).suffix in _MODULE_SUFFIXES and "adapter_" not in PurePosixPath(path).name:
            writer.copy(repository, path, source=source)
    pickled = f"{folder}/{_PICKLE}"
    if pickled in inside and not writer.has(f"{folder}/{_WEIGHTS}"):
        writer.write(f"{folder}/{_WEIGHTS}", _as_safetensors(repository, pickled))
        writer.note(
            f"{pickled} of the {source} was a pickle; its tensors were written to {_WEIGHTS} beside it."
        )


def _as_safetensors(repository: Repository, path: str) -> bytes:
    """The tensors of a pickled state dict, read with weights_only: no code in it runs."""
    import pickle

    import torch
    from safetensors.torch import save

    try:
        state = torch.load(repository.local(path), map_location="cpu", weights_only=True)
    except (
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
    ) as error:
        raise MalformedError(
            f"{path} of {repository.origin} is not a plain state dict, and nothing else is unpickled: {error}",
            hint="Save the module again with safetensors (sentence-transformers does since 3.0).",
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise MalformedError(f"{path} of {repository.origin} holds something else than named tensors")
    written: bytes = save({name: value.contiguous().clone() for name, value in state.items()})
    return written
