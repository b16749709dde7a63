"""An adapter's file as PEFT can read it.

PEFT loads what it finds under the names that it writes itself, and leaves the rest of a file aside. Training loops,
wrappers and other tools leave other names. Here they are held against the modules of the base, part by part; the merge
has rules of its own for them, and a name that the two read differently fails the merge.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from merge_adapter.errors import AccountingError, NotFoundError
from merge_adapter.methods.lora.starts import changed_base, is_named
from merge_adapter.methods.refuse import SOFT_PROMPTS
from merge_adapter.types import Adapter, BaseModel, Repository
from merge_adapter.verify.findings import Finding, note
from merge_adapter.verify.models.storage import ADAPTER_PICKLED, ADAPTER_SAFETENSORS, Checkpoint

CONFIG = "adapter_config.json"
PREFIX = "base_model.model."
"""What PEFT puts before every module path in an adapter file."""

_WRAPPERS = frozenset({"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"})
"""Parts of a path that wrappers of the training loop add."""
_OWN = frozenset({"base_layer", "modules_to_save", "original_module", "token_adapter"})
"""Parts of a path that are PEFT's, beside those that the method's prefix marks."""
_SAVED = ".modules_to_save."
_TOKENS = ".token_adapter.trainable_tokens_delta"
_LEAVES = frozenset({"weight", "bias"})
_FACTORS = frozenset({"lora_A", "lora_B"})
"""LoRA's modules, whose tensors have a leaf."""
_LORA = _FACTORS | {"lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"}
_PEFT_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""Modules that PEFT trains and saves with every adapter of a task, whatever its config says."""
_TRAINING_ONLY = re.compile(r"(?:loftq|eva|corda|lora_ga|megatron)_config|megatron_core|runtime_config")
"""Keys that say how training began or ran. PEFT acts on some while it loads: it imports what `megatron_core` names."""


@dataclass(frozen=True)
class AdapterFile:
    """The tensors of an adapter file under the names that PEFT gives them."""

    adapter: Adapter
    tensors: Mapping[str, Tensor]
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Name -> the file's own, where it is another."""

    def module(self, path: str, leaf: str) -> Tensor | None:
        """The tensor the file stores as `base_model.model.PATH.LEAF`; None when there is none."""
        return self.tensors.get(f"{PREFIX}{path}.{leaf}")

    def under(self, names: Mapping[str, str]) -> AdapterFile:
        """The same tensors, each `names[its name]`. Raises AccountingError for two of one name."""
        if len(set(names.values())) != len(names):
            twice = next(name for name in names.values() if list(names.values()).count(name) > 1)
            same = tuple(name for name, new in names.items() if new == twice)
            raise AccountingError(
                f"Two tensors of the adapter are the same one, {twice}: {', '.join(same)}.",
                tensors=same,
                hint="The file holds more than one adapter; save the one to merge by itself.",
            )
        stored = {new: self.renamed.get(old, old) for old, new in names.items()}
        return replace(
            self,
            tensors={new: self.tensors[old] for old, new in names.items()},
            renamed={new: own for new, own in stored.items() if new != own},
        )


def read_adapter(adapter: Adapter) -> AdapterFile:
    """The adapter's tensors, mapped from its file. Raises NotFoundError, MalformedError or AccountingError."""
    repository = adapter.repository
    for name in (ADAPTER_SAFETENSORS, ADAPTER_PICKLED):
        if name in repository.files:
            path = repository.local(name)
            with Checkpoint(path.parent, [path.name]) as held:
                file = AdapterFile(adapter, {key: held[key] for key in held.tensors})
            if adapter.method in SOFT_PROMPTS:
                return file
            return file.under(_unwrapped({key: _spelled(key, adapter.method) for key in file.tensors}))
    raise NotFoundError(
        f"{repository.origin} holds neither {ADAPTER_SAFETENSORS} nor {ADAPTER_PICKLED}",
        hint="Check that this is an adapter repository and that its weights were pushed.",
    )


def fitted(files: tuple[AdapterFile, ...], base: nn.Module) -> tuple[AdapterFile, ...]:
    """The files as they fit `base`: where no module of a file is one of the base's, under the one reading that fits.

    A file may have one part too many in front of all its paths, or lack the first, or know the modules by the paths
    that they had in transformers 4.
    """
    paths = {path for path, _ in base.named_modules()}
    return tuple(_fitted(file, base, paths) for file in files)


def names_read(files: tuple[AdapterFile, ...]) -> Iterator[Finding]:
    """What was read otherwise than it is written: PEFT alone would leave it aside."""
    for file in files:
        if file.renamed:
            name, own = next(iter(file.renamed.items()))
            text = f"this and {len(file.renamed) - 1} more names are not PEFT's own; it was read as {name}"
            yield note("adapter", own, text)


def saved_twice(files: tuple[AdapterFile, ...]) -> frozenset[str]:
    """Names of tensors that a file holds a second time under the name that PEFT reads.

    Where the vocabulary was resized in training, PEFT saves embeddings with all that is inside: a trained module's
    tensor in its wrapper too, and trained tokens for each of the tied modules.
    """
    return frozenset(name for file in files for name in file.tensors if _again(name, file.tensors))


def _again(name: str, tensors: Mapping[str, Tensor]) -> bool:
    others = [outside] if (outside := name.replace(_SAVED, ".")) != name else []
    if name.endswith(_TOKENS):
        others += [other for other in tensors if other.endswith(_TOKENS) and other != name]
    return any(other in tensors and torch.equal(tensors[other], tensors[name]) for other in others)


def adapter_folder(repository: Repository) -> Path:
    """A local folder with the adapter's config and weights, as they are."""
    wanted = [name for name in (CONFIG, ADAPTER_SAFETENSORS, ADAPTER_PICKLED) if name in repository.files]
    if CONFIG not in wanted:
        raise NotFoundError(f"{repository.origin} holds no {CONFIG}")
    return repository.folder(wanted)


def peft_folder(file: AdapterFile, place: Path) -> Path:
    """A local folder from which PEFT loads the weights: made in the empty `place` where names are not PEFT's own."""
    if not file.renamed:
        return adapter_folder(file.adapter.repository)
    from safetensors.torch import save_file

    save_file({name: tensor.clone() for name, tensor in file.tensors.items()}, place / ADAPTER_SAFETENSORS)
    return place


def peft_config(file: AdapterFile, base: BaseModel) -> Any:
    """PEFT's config object for putting a trained adapter on `base`, without what only training used.

    Where the start changed the base and that one is at hand, PEFT would change it a second time. For tasks with a head
    PEFT's own training always saves it, and its loading insists; transformers' `add_adapter` leaves the base's alone.
    """
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    adapter = file.adapter
    made = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(adapter.method)]
    values = {
        key: value
        for key, value in adapter.config.items()
        if not _TRAINING_ONLY.fullmatch(key) and not (value is None and key.endswith("_pattern"))
    }
    heads = _PEFT_HEADS.get(str(values.get("task_type")))
    if heads is not None and not _holds_whole(file, heads):
        values["task_type"] = None
    values = made.check_kwargs(**{**values, "peft_type": PeftType(adapter.method)})
    if adapter.method == "LORA" and changed_base(adapter.config) and not is_named(adapter, base):
        values["init_lora_weights"] = True
    config = made.from_peft_type(**values)
    config.inference_mode = True
    return config


def _holds_whole(file: AdapterFile, heads: Collection[str]) -> bool:
    """Whether the file holds tensors of one of the modules `heads` themselves, and not what PEFT adds to them."""
    inside = [name.removeprefix(PREFIX) for name in file.tensors]
    whole = [path for path in inside if _module(path, file.adapter.method) == path.rpartition(".")[0]]
    return any(head in path.partition(".")[0] for path in whole for head in heads)


def _spelled(name: str, method: str) -> str:
    """A name of the file without what wrappers, second prefixes and the adapter's own name add to it."""
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    if "base_model" in parts and set(parts[: parts.index("base_model")]) <= {"module"}:
        parts = parts[parts.index("base_model") :]
    if parts[0] == "base_model" and parts[1:2] != ["model"]:
        return ".".join(parts)  # shared by all modules: VeRA's projections, VB-LoRA's bank
    while parts[:2] == ["base_model", "model"]:
        parts = parts[2:]
    at = next((at for at, part in enumerate(parts) if method == "LORA" and part in _LORA), None)
    if at is not None:
        leaf = parts[-1] if parts[-1] in _LEAVES else "weight" if parts[at] in _FACTORS else ""
        parts = [*parts[: at + 1], *([leaf] if leaf else [])]
    return PREFIX + ".".join(parts)


def _unwrapped(names: Mapping[str, str]) -> dict[str, str]:
    """`names` with trained modules as PEFT saves them: without its wrapper, unless the file has them so as well."""
    found = {key: name.replace(f"{_SAVED}default.", _SAVED) for key, name in names.items()}
    present = set(found.values())
    return {
        key: outside if (outside := name.replace(_SAVED, ".")) not in present else name
        for key, name in found.items()
    }


def _fitted(file: AdapterFile, base: nn.Module, paths: Collection[str]) -> AdapterFile:
    method = file.adapter.method
    inside = {name: name.removeprefix(PREFIX) for name in file.tensors if name.startswith(PREFIX)}
    modules = {name: _module(path, method) for name, path in inside.items()}
    if not inside or any(module in paths for module in modules.values()):
        return file
    now = _moved(base, set(modules.values()))
    readings = [
        {module: f"model.{module}" for module in modules.values()},
        {module: module.partition(".")[2] for module in modules.values()},
        {module: now[module] for module in modules.values()},
    ]
    if len({module.partition(".")[0] for module in modules.values()}) > 1:
        del readings[1]
    fitting = {tuple(reading.items()) for reading in readings if set(reading.values()) <= set(paths)}
    if len(fitting) != 1:
        return file
    [(*reading,)] = fitting
    new = dict(reading)
    names = {
        name: PREFIX + new[modules[name]] + path.removeprefix(modules[name]) for name, path in inside.items()
    }
    return file.under({name: names.get(name, name) for name in file.tensors})


def _moved(base: Any, modules: Collection[str]) -> dict[str, str]:
    """Where transformers would look for these modules if a checkpoint held them: its list knows older models."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    renamings = [entry for entry in get_model_conversion_mapping(base) if isinstance(entry, WeightRenaming)]
    state, prefix = base.state_dict(), base.base_model_prefix
    found = {
        module: rename_source_key(f"{module}.weight", renamings, [], prefix, state)[0] for module in modules
    }
    return {module: name.removesuffix(".weight") for module, name in found.items()}


def _module(path: str, method: str) -> str:
    """The path of the module that a tensor of this path belongs to."""
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    mark = PEFT_TYPE_TO_PREFIX_MAPPING.get(PeftType(method), "")
    parts = path.split(".")
    at = next(
        (at for at, part in enumerate(parts) if part in _OWN or (mark and part.startswith(mark))),
        len(parts) - 1,
    )
    return ".".join(parts[:at])
