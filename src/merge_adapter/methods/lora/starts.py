"""How a LoRA began: adapters whose initialisation changed the base fit that changed base alone.

PiSSA, OLoRA, CorDA, LoRA-GA and LoftQ take a part out of the base's weights, or replace them, and train what is left.
Saved converted, such an adapter says `true` and fits the plain base. Saved as it is, it is merged where another base
than the one it names is given, which is then taken to be the changed one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from merge_adapter.checkpoint.folder import folder_at
from merge_adapter.errors import BaseModelError, MethodError
from merge_adapter.methods.change import Change, RowChange, Weights
from merge_adapter.methods.lora.arithmetic import LowRank
from merge_adapter.types import Adapter, BaseModel

if TYPE_CHECKING:
    from torch import Tensor

_PLAIN = frozenset({"true", "false", "gaussian", "orthogonal", "eva", "mica", "none"})
"""Values of `init_lora_weights` that leave the base as it is."""
_CHANGED_BASE = {
    "pissa": "PiSSA, which takes the base's principal components out of its weights",
    "olora": "OLoRA, which takes a part of the base's QR decomposition out of its weights",
    "corda": "CorDA, computed from calibration data that no adapter carries",
    "lora_ga": "LoRA-GA, computed from gradients that no adapter carries",
    "loftq": "LoftQ, which replaces the base's weights by quantised ones",
}
"""Values that change the base: beginning of the value -> what happens."""
_LOOKED_AT = 4
"""Modules of a PiSSA adapter whose base weights are read to tell the changed base from the original."""


def changed_base(config: Mapping[str, Any]) -> str:
    """What the initialisation did to the base, "" when nothing. Raises MethodError for a value nobody knows."""
    start = str(config.get("init_lora_weights", True)).lower()
    reason = next((why for name, why in _CHANGED_BASE.items() if start.startswith(name)), "")
    if not reason and start not in _PLAIN:
        raise MethodError(
            f"adapter_config.json: init_lora_weights is {config['init_lora_weights']!r}, which is not known.",
            hint="Update merge-adapter, or set it to true if the base was not changed at initialisation.",
        )
    return reason


def check_start(adapter: Adapter, base: BaseModel) -> tuple[str, ...]:
    """A note where `base` has to be the one that the initialisation changed.

    Raises BaseModelError where it is the one that the adapter names, and so the unchanged one.
    """
    if adapter.method != "LORA" or not (reason := changed_base(adapter.config)):
        return ()
    value = adapter.config["init_lora_weights"]
    if is_named(adapter, base):
        raise BaseModelError(
            f"This adapter was initialised by {reason}. It fits the base as it was changed then, not the one named"
            f" (init_lora_weights={value!r}).",
            hint="Save it converted (save_pretrained with path_initial_model_for_weight_conversion). Or name the"
            " changed base with --base-model.",
        )
    return (
        f"The adapter was initialised by {reason}. The base given is taken to be the one that was changed then"
        f" (init_lora_weights={value!r}).",
    )


def is_named(adapter: Adapter, base: BaseModel) -> bool:
    """Whether `base` is the one that the adapter's config names."""
    named, origin = adapter.config.get("base_model_name_or_path"), base.repository.origin
    if not isinstance(named, str) or not named:
        return True  # nothing to tell it from
    if origin.repo_id is not None:
        return origin.repo_id.lower() == named.lower()
    return origin.folder is not None and origin.folder.resolve() == folder_at(named)


def check_residual(adapter: Adapter, changes: Iterable[Change], base: Weights, factors: Weights) -> None:
    """Raise BaseModelError where a PiSSA adapter is about to be merged into the base before it was changed.

    PiSSA's A begins as the strongest right singular vectors of W, which the changed base has lost and the original
    holds more of than of any other directions; training turns them a little. Reads the smallest few weights.
    """
    if not str(adapter.config.get("init_lora_weights")).lower().startswith("pissa"):
        return
    shares = [_share(change, base, factors) for change in _looked_at(changes)]
    if shares and sum(share > 1 for share in shares) * 2 > len(shares):
        raise BaseModelError(
            "This adapter was initialised by PiSSA, and the base given is not the one that was changed then: its"
            " weights still hold the components that PiSSA takes out.",
            hint="Give the changed base with --base-model, or save the adapter converted"
            " (save_pretrained with path_initial_model_for_weight_conversion).",
        )


def _looked_at(changes: Iterable[Change]) -> list[RowChange]:
    plain = [
        change
        for change in changes
        if isinstance(change, RowChange)
        and isinstance(change.arithmetic, LowRank)
        and not change.arithmetic.transposed
        and len(change.tensor.shape) == 2
    ]
    return sorted(plain, key=lambda change: change.tensor.elements)[:_LOOKED_AT]


def _share(change: RowChange, base: Weights, factors: Weights) -> float:
    """How much of W lies in the rows of A, 1 for as much as in any directions: `|W Q|^2 / |W|^2 * in / r`."""
    import torch

    assert isinstance(change.arithmetic, LowRank)
    weight = base.read(change.reads[0]).double()  # [out, in]
    directions: Tensor = torch.linalg.qr(factors.read(change.arithmetic.right).double().T).Q  # [in, r]
    inside = float((weight @ directions).square().sum() / weight.square().sum().clamp_min(1e-300))
    return inside * directions.shape[0] / directions.shape[1]
