"""An adapter's weights file: opened, its names brought into the one form that planners read.

That form is what PEFT's `save_pretrained` writes: `base_model.model.` + path of the module + what the method
adds, without the adapter's name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from merge_adapter.checkpoint.layout import Layout, find_layout
from merge_adapter.errors import AccountingError, MalformedError
from merge_adapter.methods.change import TensorSpec
from merge_adapter.types import Adapter

if TYPE_CHECKING:
    from merge_adapter.checkpoint.reader import StoredWeights

PREFIX = "base_model.model."
PROMPT = "prompt_embeddings"
"""The one tensor of a soft prompt, which belongs to no module and has no prefix."""

_WRAPPERS = re.compile(r"(?<![^.])(?:_fsdp_wrapped_module|_orig_mod|_checkpoint_wrapped_module)\.")
"""Path segments that FSDP, torch.compile and activation checkpointing leave in names."""
_LORA_NAMED = re.compile(
    r"(?P<part>\.(?:lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector))"
    r"\.(?P<name>[^.]+)(?P<again>\.(?P=name))?(?P<leaf>\.weight|\.bias)?$"
)
_OUTER = re.compile(r"^(?:module\.)+(?=base_model\.)")
"""What DistributedDataParallel and DeepSpeed put in front of the whole model."""
_OWN_NAME = "the adapter's own name removed"
_SAVED_NAMED = re.compile(r"\.modules_to_save\.(?P<name>[^.]+)\.(?=[^.])")


@dataclass(frozen=True)
class AdapterFile:
    """What the headers of an adapter's weights say."""

    adapter: Adapter
    layout: Layout
    stored: Mapping[str, str]
    """Repaired name -> name in the file."""
    notes: tuple[str, ...] = ()

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Every tensor under its repaired name."""
        found = self.layout.specs
        return {
            name: TensorSpec(name, found[stored].dtype, found[stored].shape)
            for name, stored in self.stored.items()
        }

    @property
    def bytes(self) -> int:
        """Of its weight files."""
        return self.layout.bytes

    @property
    def tensors(self) -> int:
        """How many it holds."""
        return len(self.stored)

    def open(self) -> StoredWeights:
        """The weights, under their repaired names."""
        from merge_adapter.checkpoint.reader import StoredWeights  # imports torch

        return StoredWeights(self.adapter.repository, self.layout, rename=self.stored)


def read_adapter(adapter: Adapter) -> AdapterFile:
    """Read the headers of an adapter's weights and repair their names.

    Raises NotFoundError without weights, MalformedError for an empty file, AccountingError when two tensors
    have the same name once repaired.
    """
    layout = find_layout(adapter.repository, stem="adapter_model", pickled_stem="adapter_model")
    if not layout.specs:
        raise MalformedError(
            f"{adapter.repository.origin}: {layout.files[0].path} holds no tensors.",
            hint="Save the adapter again; under DeepSpeed or FSDP gather the weights before saving.",
        )
    stored, notes = repair_names(layout.specs)
    return AdapterFile(adapter, layout, stored, notes)


def other_readings(file: AdapterFile) -> tuple[AdapterFile, ...]:
    """The file with a path component too few or too many taken for a mistake of whoever saved it.

    Only for an adapter that does not fit as it is, and only to be trusted when exactly one reading fits whole.
    """
    stored_as = {name.removeprefix(PREFIX): stored for name, stored in file.stored.items()}
    first = {path.partition(".")[0] for path in stored_as}
    readings = []
    if len(first) == 1:
        (extra,) = first
        shorter = {PREFIX + path.partition(".")[2]: stored for path, stored in stored_as.items()}
        readings.append((shorter, f"leading {extra}. removed"))
    longer = {f"{PREFIX}model.{path}": stored for path, stored in stored_as.items()}
    readings.append((longer, "leading model. added"))
    return tuple(_reading(file, stored, what) for stored, what in readings if len(stored) == len(file.stored))


def moved(file: AdapterFile, modules: Mapping[str, str]) -> AdapterFile:
    """The file with the paths of its modules replaced: as they are -> as they are to be."""
    stored: dict[str, str] = {}
    for name, own in file.stored.items():
        path = name.removeprefix(PREFIX)
        module = max((one for one in modules if path.startswith(f"{one}.")), key=len)
        stored[PREFIX + modules[module] + path.removeprefix(module)] = own
    return _reading(file, stored, "renamed as transformers renames checkpoints of this model's older form")


def _reading(file: AdapterFile, stored: Mapping[str, str], what: str) -> AdapterFile:
    note = f"All {len(stored)} adapter tensor names were repaired: {what}; only so do they fit."
    return replace(file, stored=stored, notes=(*file.notes, note))


def repair_names(names: Iterable[str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Repaired name -> given name, and one note for each kind of repair.

    Only what cannot mean anything else is repaired here: a missing or doubled `base_model.model.`, an
    adapter's name that was left in, segments that wrappers of the training loop add.
    """
    names = tuple(names)
    repaired: dict[str, str] = {}
    counts: dict[str, int] = {}
    saved_names = {match["name"] for name in names if (match := _SAVED_NAMED.search(name))}
    for name in names:
        fixed = name
        if len(saved_names) == 1 and (match := _SAVED_NAMED.search(name)) is not None:
            fixed = name[: match.start("name")] + name[match.end("name") + 1 :]
            counts[_OWN_NAME] = counts.get(_OWN_NAME, 0) + 1
        for what, repair in _REPAIRS:
            after = repair(fixed)
            if after != fixed:
                counts[what] = counts.get(what, 0) + 1
                fixed = after
        if fixed in repaired:
            pair = tuple(sorted((repaired[fixed], name)))
            raise AccountingError(
                f"Two tensors of the adapter are the same one, {fixed}, once their names are repaired: "
                f"{pair[0]} and {pair[1]}.",
                tensors=pair,
                hint="The file holds more than one adapter; save the one to merge by itself.",
            )
        repaired[fixed] = name
    notes = tuple(f"{count} adapter tensor names were repaired: {what}." for what, count in counts.items())
    return repaired, notes


def _without_wrappers(name: str) -> str:
    return _OUTER.sub("", _WRAPPERS.sub("", name))


def _one_prefix(name: str) -> str:
    while name.startswith(PREFIX + PREFIX):
        name = name.removeprefix(PREFIX)
    return name


def _with_prefix(name: str) -> str:
    return name if name.startswith("base_model.") or name == PROMPT else PREFIX + name


def _without_lora_name(name: str) -> str:
    match = _LORA_NAMED.search(name)
    if match is None or (match["leaf"] is None and match["name"] in ("weight", "bias")):
        return name
    return name[: match.start()] + match["part"] + (match["leaf"] or "")


_REPAIRS = (
    ("segments of DeepSpeed, FSDP or torch.compile wrappers removed", _without_wrappers),
    ("missing prefix base_model.model. added", _with_prefix),
    ("doubled prefix base_model.model. removed", _one_prefix),
    (_OWN_NAME, _without_lora_name),
)
