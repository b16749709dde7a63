"""Resolve: from an adapter reference to every source of the merge, each pinned to a commit.

Reads configs only. References come from a command line, a workflow or an `adapter_config.json` on the Hub;
the last is untrusted, so a base named there must be a Hub id, unless the adapter is itself a local folder.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from merge_adapter.checkpoint.folder import Folder, folder_at
from merge_adapter.checkpoint.lifted import lifted
from merge_adapter.checkpoint.sentence import (
    MODULES,
    is_transformer_alone,
    listed_modules,
    trained_task,
    transformer_folder,
)
from merge_adapter.errors import (
    BaseModelError,
    InputError,
    MalformedError,
    MethodError,
    NotFoundError,
    PolicyError,
)
from merge_adapter.methods.combinations.low_rank import check_combination
from merge_adapter.methods.refuse import check_method
from merge_adapter.originals import settle_base
from merge_adapter.several import check_adapters, compare_revisions, compare_tokenizers
from merge_adapter.types import (
    Adapter,
    BaseModel,
    Combination,
    Origin,
    QuantizedBase,
    Repository,
    Resolved,
    SoftPrompt,
)

if TYPE_CHECKING:
    from merge_adapter.hub import Hub

ADAPTER_CONFIG = "adapter_config.json"
MODEL_CONFIG = "config.json"
_CONFIG_LIMIT = 4 << 20
"""Bytes of JSON read at most from a config: ten times the largest seen on the Hub."""
_NAME = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
_REPO_ID = re.compile(rf"(?:{_NAME}/)?{_NAME}")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,199}")
_VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
    "tekken.json",
)
"""Files any one of which, beside tokenizer_config.json, makes a tokenizer whole."""


@dataclass(frozen=True)
class Reference:
    """A folder, or a repository of the Hub at a revision."""

    place: Path | str
    """A Path for a folder, a repo_id otherwise."""
    revision: str | None = None


@dataclass(frozen=True)
class SourceRequest:
    """What the user named."""

    adapters: tuple[str, ...]
    """Folders or Hub ids, `owner/name` or `owner/name@revision`, each with `:subfolder` or without; at least one."""
    weights: tuple[float, ...] = ()
    """One per adapter; all 1.0 when empty."""
    base_model: str | None = None
    """Overrides the base that the adapter's config names."""
    base_revision: str | None = None
    subfolder: str = ""
    """Where in its repository the first adapter lies, unless its reference says so."""
    combination: Combination = field(default_factory=Combination)
    """How several adapters become one update."""
    soft_prompt: SoftPrompt = SoftPrompt.REFUSE
    """What becomes of prompt tuning and P-tuning."""
    local_paths: bool = True
    """Whether references may be folders of this machine; False where strangers write them."""


def resolve(
    request: SourceRequest, *, hub: Hub, quantized_base: QuantizedBase = QuantizedBase.REFUSE
) -> Resolved:
    """Find adapter, base and tokenizer and pin each to a commit.

    A base stored quantised is taken as `quantized_base` says.
    Raises NotFoundError for what does not exist, MalformedError for an unreadable config, PolicyError for a
    base on this machine named by a config on the Hub or a gate without access, HubError when the Hub
    fails, MethodError when the method has no merge, BaseModelError when the base is itself an adapter, or stored
    quantised where that was not settled.
    """
    if not request.adapters:
        raise InputError(
            "no adapter was named", hint="Give a folder or a Hub id: merge-adapter merge OWNER/NAME"
        )
    weights = request.weights or (1.0,) * len(request.adapters)
    if len(weights) != len(request.adapters):
        raise InputError(
            f"{len(request.adapters)} adapters but {len(weights)} weights were given",
            hint="Give --weight once for each adapter, in their order, that of ADAPTER first; or not at all.",
        )
    check_combination(request.combination, len(weights))
    notes: list[str] = []
    adapters = tuple(
        _open_adapter(
            reference, weight, request if not number else replace(request, subfolder=""), hub, notes
        )
        for number, (reference, weight) in enumerate(zip(request.adapters, weights, strict=True))
    )
    check_adapters(adapters)
    for adapter in adapters:
        check_method(
            adapter.config, soft_prompt=request.soft_prompt
        )  # said before a base is looked for, which may be gated or gone
    base = settle_base(
        _open_base(adapters, request, hub, notes),
        quantized_base,
        lambda repo_id: _base_of(hub.open(repo_id), notes),
        notes,
    )
    tokenizer = _choose_tokenizer(adapters[0].repository, base.repository, notes)
    if request.base_revision is None:
        notes.extend(compare_revisions(adapters))
    notes.extend(compare_tokenizers(adapters, tokenizer))
    return Resolved(
        adapters=adapters,
        base=base,
        tokenizer=tokenizer,
        notes=tuple(notes),
        combination=request.combination,
    )


def parse_reference(text: str, *, what: str) -> Reference:
    """`owner/name`, `owner/name@revision` or a folder. An existing folder wins over a Hub id of that name.

    Raises NotFoundError for a path that is no folder, InputError for text that is neither path nor id.
    """
    folder = folder_at(text)
    if folder is not None:
        return Reference(folder)
    if text.startswith((".", "/", "~")) or "\\" in text:
        raise NotFoundError(
            f"the {what} folder {text} does not exist, or is no folder",
            hint="Give the folder that holds its config file.",
        )
    repo_id, at, revision = text.partition("@")
    if not _REPO_ID.fullmatch(repo_id) or ".." in repo_id or (at and not _valid_revision(revision)):
        raise InputError(
            f"{text!r} is neither a folder nor a Hub id",
            hint=f"Name the {what} as owner/name, owner/name@revision, or the path of a folder.",
        )
    return Reference(repo_id, revision or None)


def open_reference(
    text: str, *, what: str, hub: Hub, subfolder: str = "", revision: str | None = None
) -> Repository:
    """The files behind `text`, pinned. `revision` is used where `text` carries none."""
    reference = parse_reference(text, what=what)
    subfolder = _clean_subfolder(subfolder)
    if isinstance(reference.place, Path):
        return Folder(reference.place, subfolder)
    return hub.open(reference.place, revision=reference.revision or revision, subfolder=subfolder)


def read_json(repository: Repository, path: str) -> Mapping[str, Any]:
    """A JSON object from `repository`; MalformedError when it is anything else."""
    size = repository.files.get(path)
    if size is not None and size > _CONFIG_LIMIT:
        raise MalformedError(
            f"{path} of {repository.origin} has {size} bytes; a config of at most {_CONFIG_LIMIT} is read"
        )
    try:
        parsed = json.loads(repository.read(path))
    except (ValueError, RecursionError) as error:
        raise MalformedError(
            f"{path} of {repository.origin} is not readable JSON: {error}",
            hint="Upload the file again, or fix it and retry.",
        ) from error
    if not isinstance(parsed, dict):
        raise MalformedError(
            f"{path} of {repository.origin} holds a {type(parsed).__name__}, expected an object"
        )
    return parsed


def _valid_revision(revision: str) -> bool:
    return bool(_REVISION.fullmatch(revision)) and ".." not in revision


def _clean_subfolder(subfolder: str) -> str:
    clean = subfolder.strip("/")
    if clean and any(part in ("", ".", "..") for part in clean.split("/")):
        raise InputError(f"the subfolder {subfolder!r} is not a path inside the repository")
    return clean


def split_subfolder(text: str) -> tuple[str, str]:
    """`REFERENCE:SUBFOLDER` in its two parts, the second "" when there is none. An existing folder is no such pair."""
    reference, colon, subfolder = text.rpartition(":")
    if not colon or not reference or folder_at(text) is not None:
        return text, ""
    if not subfolder.strip("/"):
        raise InputError(
            f"{text!r} names no subfolder after its colon",
            hint=f"Write {reference}:SUBFOLDER, or {reference}",
        )
    return reference, subfolder


def _open_adapter(text: str, weight: float, request: SourceRequest, hub: Hub, notes: list[str]) -> Adapter:
    text, subfolder = split_subfolder(text)
    if subfolder and request.subfolder and subfolder.strip("/") != request.subfolder.strip("/"):
        raise InputError(
            f"the adapter {text} is named with the subfolder {subfolder}, and --subfolder says {request.subfolder}",
            hint="Say it once.",
        )
    if not request.local_paths and isinstance(parse_reference(text, what="adapter").place, Path):
        raise PolicyError(f"the adapter {text} is a folder; only repositories of the Hub are accepted here")
    repository = open_reference(text, what="adapter", hub=hub, subfolder=subfolder or request.subfolder)
    if (whole := _sentence_transformer(text, repository, hub)) is not None:
        repository = whole
        notes.append(
            "The adapter is that of a sentence-transformers model, in the folder of its transformer."
        )
    elif ADAPTER_CONFIG not in repository.files:
        repository = _only_adapter_below(text, repository, hub, notes)
    config = read_json(repository, ADAPTER_CONFIG)
    method = config.get("peft_type")
    if not config.get("task_type") and not config.get("auto_mapping") and (task := trained_task(repository)):
        config = {**config, "task_type": task}
    return Adapter(
        repository=repository,
        config=config,
        method=method.upper() if isinstance(method, str) else "",
        weight=weight,
    )


def _sentence_transformer(text: str, repository: Repository, hub: Hub) -> Repository | None:
    """The whole of the model to whose one transformer, in a folder of its own, the adapter belongs; else None.

    `repository` may be that model, or that folder alone.
    """
    if not is_transformer_alone(repository):
        return lifted(repository, ADAPTER_CONFIG)
    above, _, folder = repository.origin.subfolder.rpartition("/")
    whole = open_reference(text, what="adapter", hub=hub, subfolder=above)
    return lifted(whole, ADAPTER_CONFIG) if transformer_folder(whole) == folder else None


def _only_adapter_below(text: str, repository: Repository, hub: Hub, notes: list[str]) -> Repository:
    """Descend into the one folder that holds an adapter; refuse to guess among several."""
    folders = sorted(
        path.removesuffix(f"/{ADAPTER_CONFIG}")
        for path in repository.files
        if path.endswith(f"/{ADAPTER_CONFIG}")
    )
    if not folders:
        kind = "a whole model" if MODEL_CONFIG in repository.files else "no adapter"
        raise NotFoundError(
            f"{repository.origin} holds {kind}: there is no {ADAPTER_CONFIG}",
            hint="Name the repository or folder that PEFT's save_pretrained wrote.",
        )
    of_modules = MODULES in repository.files and MODEL_CONFIG not in repository.files
    if of_modules and f"{folders[0]}/{MODULES}" not in repository.files:
        raise MethodError(
            f"{repository.origin} is a model of sentence-transformers in several parts, and the adapter in {folders[0]}"
            " belongs to one of them: the merged model would lack the others",
            hint=f"Merge that part alone, and put it back into its place: --subfolder {quote(folders[0])}",
        )
    if len(folders) > 1:
        shown = ", ".join(folders[:8]) + (", …" if len(folders) > 8 else "")
        raise InputError(
            f"{repository.origin} holds {len(folders)} adapters, none at its root: {shown}",
            hint=f"Choose one: --subfolder {quote(folders[-1])}, or {quote(f'{text}:{folders[-1]}')}",
        )
    origin = repository.origin
    subfolder = f"{origin.subfolder}/{folders[0]}".strip("/")
    notes.append(f"The adapter was found in the subfolder {folders[0]}.")
    if origin.folder is not None:
        return Folder(origin.folder, subfolder)
    return hub.open(origin.repo_id or text, revision=origin.revision, subfolder=subfolder)


def _open_base(
    adapters: tuple[Adapter, ...], request: SourceRequest, hub: Hub, notes: list[str]
) -> BaseModel:
    if request.base_model is not None:
        repository = open_reference(
            request.base_model, what="base model", hub=hub, revision=request.base_revision
        )
    else:
        repository = _base_from_configs(adapters, request, hub)
    base = _base_of(repository, notes)
    named = adapters[0].config.get("base_model_name_or_path")
    if request.base_model is not None and isinstance(named, str) and named and named != request.base_model:
        origin = repository.origin
        given = repr(origin.repo_id) if origin.repo_id else f"the folder {_folder_name(origin)!r}"
        notes.append(f"The adapter names {named!r} as its base; {given} was given instead.")
    return base


def _base_of(repository: Repository, notes: list[str]) -> BaseModel:
    if MODEL_CONFIG not in repository.files and (whole := lifted(repository, MODEL_CONFIG)) is not None:
        notes.append(
            "The base is laid out as old versions of sentence-transformers did, its transformer in a folder of its own;"
            " the merged model has it at the root, where newer ones and transformers look."
        )
        repository = whole
    if MODEL_CONFIG not in repository.files:
        if ADAPTER_CONFIG in repository.files:
            raise BaseModelError(
                f"the base model {repository.origin} is itself an adapter",
                hint="Merge that one first (merge-adapter merge BASE --output DIR), then: --base-model DIR",
            )
        if listed_modules(repository) and transformer_folder(repository) is None:
            raise BaseModelError(
                f"the base model {repository.origin} is a model of sentence-transformers, and {MODULES} names no single"
                " transformer of it",
                hint="Name the folder of the transformer that the adapter belongs to: --base-model DIR",
            )
        raise NotFoundError(
            f"the base model {repository.origin} has no {MODEL_CONFIG}",
            hint="Name a repository or folder that transformers can load: --base-model OWNER/NAME",
        )
    return BaseModel(repository=repository, config=read_json(repository, MODEL_CONFIG))


def _folder_name(origin: Origin) -> str:
    """The name alone: notes are published, and a path would tell whose machine it was."""
    return origin.folder.name if origin.folder is not None else ""


def _base_from_configs(adapters: tuple[Adapter, ...], request: SourceRequest, hub: Hub) -> Repository:
    adapter = adapters[0]
    named = {_named_base(one) for one in adapters}
    if len(named) > 1:
        raise InputError(
            f"the adapters were trained on different bases: {', '.join(sorted(named))}",
            hint="Give the one to merge into: --base-model OWNER/NAME",
        )
    text = named.pop()
    revision = request.base_revision
    recorded = adapter.config.get("revision")
    if revision is None and isinstance(recorded, str) and recorded:
        if not _valid_revision(recorded):
            raise MalformedError(
                f"the revision {recorded!r} in {ADAPTER_CONFIG} of {adapter.repository.origin} is not valid"
            )
        revision = recorded
    trusted = request.local_paths and adapter.repository.origin.folder is not None
    if trusted:
        return open_reference(text, what="base model", hub=hub, revision=revision)
    if not _REPO_ID.fullmatch(text) or ".." in text:
        raise PolicyError(
            f"{ADAPTER_CONFIG} of {adapter.repository.origin} names {text!r} as its base model, "
            "which is not a Hub id",
            hint="A path in a published config is never opened. Name the model: --base-model OWNER/NAME",
        )
    return hub.open(text, revision=revision)


def _named_base(adapter: Adapter) -> str:
    named = adapter.config.get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise InputError(
            f"{ADAPTER_CONFIG} of {adapter.repository.origin} does not say which base model it belongs to",
            hint="Give it: --base-model OWNER/NAME",
        )
    return named


def _choose_tokenizer(adapter: Repository, base: Repository, notes: list[str]) -> Repository | None:
    """The adapter's tokenizer when it is whole, else the base's, else none. Never a mixture."""
    if _has_tokenizer(adapter):
        return adapter
    if "tokenizer_config.json" in adapter.files:
        notes.append("The adapter carries an incomplete tokenizer (no vocabulary); the base model's is used.")
    return base if _has_tokenizer(base) else None


def _has_tokenizer(repository: Repository) -> bool:
    files = repository.files
    return "tokenizer.json" in files or (
        "tokenizer_config.json" in files and any(v in files for v in _VOCABULARIES)
    )
