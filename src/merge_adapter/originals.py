"""Which weights an adapter is merged into when its base is stored quantised: refused, dequantised, or the original.

Two honest references exist, and they differ: the dequantised weights are those that the adapter was trained on, the
16-bit original is the better model. Neither is chosen silently. The original is what the base's own card
names as `base_model`; only an id of the Hub counts there, since cards are written by strangers.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from merge_adapter.checkpoint.layout import find_layout
from merge_adapter.checkpoint.quantization import described, quantization_of, refusal, used_method
from merge_adapter.errors import BaseModelError
from merge_adapter.methods.change import FLOATING, TensorSpec
from merge_adapter.types import BaseModel, QuantizedBase, Repository

Open = Callable[[str], BaseModel]
"""Opens a repository of the Hub as a base."""

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_HOPS = 3
"""Quantised repositories made from quantised ones that are followed to the original."""
_LEAVES_NORMS = ("bitsandbytes", "fp8", "mxfp8", "fbgemm_fp8", "mxfp4")
_COMPARED = 4
"""Norms that are compared; a model that was trained on has none left as it was."""


def settle_base(base: BaseModel, choice: QuantizedBase, open_base: Open, notes: list[str]) -> BaseModel:
    """The base to merge into; `base` itself unless it is stored quantised and the original is asked for.

    Adds to `notes` which reference was taken. Raises BaseModelError where `choice` refuses quantised bases, where
    the format cannot be dequantised, and where no original is named, or one that it was not made from; what
    `open_base` raises passes through.
    """
    quantization = quantization_of(base.config)
    if quantization is None:
        return base
    stored = described(quantization)
    if choice is QuantizedBase.ORIGINAL:
        original = _find_original(base, open_base)
        _check_made_from(base, original)
        notes.append(
            f"The adapter's base {_name(base)} is stored quantised ({stored}). The reference is the 16-bit original "
            f"that its card names, {_name(original)}."
        )
        return original
    original_id = named_original(base.repository)
    reason = refusal(quantization)
    if choice is QuantizedBase.DEQUANTIZE and not reason:
        return base  # the plan notes it
    raise _refused(base, stored, reason, original_id)


def named_original(repository: Repository) -> str:
    """The one model that the card of a quantised repository says it was made from; "" where it names none.

    A card that states another relation (`finetune`, `merge`, `adapter`) names no original.
    """
    from merge_adapter.packaging.metadata import read_card  # imports a YAML parser; few bases are quantised

    card = read_card(repository).metadata
    named, relation = card.get("base_model"), card.get("base_model_relation", "quantized")
    if isinstance(named, list) and len(named) == 1:
        named = named[0]
    if relation != "quantized" or not isinstance(named, str) or not _REPO_ID.fullmatch(named):
        return ""
    return "" if ".." in named or named == repository.origin.repo_id else named


def _find_original(base: BaseModel, open_base: Open) -> BaseModel:
    found = base
    for _ in range(_HOPS):
        named = named_original(found.repository)
        if not named:
            break
        found = open_base(named)
        if quantization_of(found.config) is None:
            return found
    which = _name(base) if found is base else f"{_name(found)}, from which {_name(base)} was made,"
    raise BaseModelError(
        f"the 16-bit original of the quantised base is not known: the card of {which} names no model it was made from",
        hint="Name the original: --base-model OWNER/NAME",
    )


def _check_made_from(base: BaseModel, original: BaseModel) -> None:
    """Raise BaseModelError when tensors that quantising leaves alone are not those of the original.

    That a card names a model does not say that nothing was trained in between. Formats whose makers rescale norms
    (AWQ, SmoothQuant) tell nothing here and are not looked at.
    """
    quantization = quantization_of(base.config)
    if quantization is None or used_method(quantization) not in _LEAVES_NORMS:
        return
    held, others = _vectors(base), _vectors(original)
    shared = sorted(name for name, (_, spec) in held.items() if name in others and others[name][1] == spec)
    step = max(1, len(shared) // _COMPARED)
    for name in shared[::step][:_COMPARED]:
        left, right = (
            one.repository.read(path, offset=place, length=spec.nbytes)
            for one, ((path, place), spec) in ((base, held[name]), (original, others[name]))
        )
        if left != right:
            raise BaseModelError(
                f"{_name(base)} was not made from {_name(original)} by quantising alone, though its card names it: "
                f"{name}, which is stored unquantised, differs",
                hint="Merge into what the adapter was trained on: --quantized-base dequantize. Or name the 16-bit "
                "model that it was made from: --base-model OWNER/NAME",
            )


def _vectors(base: BaseModel) -> dict[str, tuple[tuple[str, int], TensorSpec]]:
    """Norms and biases in floating point: where each lies, and its spec. Reads headers of safetensors only."""
    if not any(path.endswith((".safetensors", ".safetensors.index.json")) for path in base.repository.files):
        return {}
    return {
        stored.spec.name: ((file.path, stored.offset), stored.spec)
        for file in find_layout(base.repository).files
        for stored in file.header.tensors
        if len(stored.spec.shape) == 1
        and stored.spec.dtype in FLOATING
        and stored.spec.name.endswith((".weight", ".bias"))
    }


def _refused(base: BaseModel, stored: str, reason: str, original: str) -> BaseModelError:
    known = f"{original}, which its card names" if original else "which its card does not name"
    if reason:
        return BaseModelError(
            f"the base {base.repository.origin} is stored quantised ({stored}) and cannot be merged into: {reason}",
            hint=f"Merge into the 16-bit original, {known}: --base-model {original or 'OWNER/NAME'}",
        )
    choice = "--quantized-base original" if original else "--base-model OWNER/NAME"
    return BaseModelError(
        f"the base {base.repository.origin} is stored quantised ({stored}), and two merges would be honest: into "
        "the dequantised weights, which the adapter was trained on, or into the 16-bit original",
        hint=f"Choose: --quantized-base dequantize, or, for the original, {known}: {choice}",
    )


def _name(base: BaseModel) -> str:
    """For notes, which are published: a folder by its name alone."""
    origin = base.repository.origin
    return origin.repo_id or (origin.folder.name if origin.folder is not None else "")
