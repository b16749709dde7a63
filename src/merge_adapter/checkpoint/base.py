"""The base checkpoint as a merge sees it: which tensors it has, and how to open them.

Headers only until it is opened. A base stored quantised is refused here, before any work, unless it is to be
dequantised.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from merge_adapter.checkpoint.layout import Layout, find_layout
from merge_adapter.checkpoint.quantization import described, quantization_of
from merge_adapter.checkpoint.quantized import dequantized
from merge_adapter.errors import BaseModelError
from merge_adapter.methods.change import TensorSpec, Weights
from merge_adapter.types import BaseModel, MergeSettings, QuantizedBase

if TYPE_CHECKING:
    from merge_adapter.checkpoint.reader import StoredWeights


class OpenWeights(Weights, AbstractContextManager[Any], Protocol):
    """Weights that hold files open until the context ends."""

    @property
    def bytes_read(self) -> int:
        """Bytes of tensor data read so far."""
        ...


@dataclass(frozen=True)
class BaseFiles:
    """A base checkpoint, not yet opened."""

    layout: Layout
    specs: Mapping[str, TensorSpec]
    """Every tensor the merge sees, in the order of the files; of a dequantised base the dequantised ones."""
    open: Callable[[], OpenWeights] = field(repr=False)
    notes: tuple[str, ...] = ()
    config_changes: Mapping[str, Any] = field(default_factory=dict)
    """Edits of config.json that come with the way the base is read; None removes a key."""


def read_base(base: BaseModel, settings: MergeSettings) -> BaseFiles:
    """Read the headers of a base.

    Raises BaseModelError for one that is stored quantised, unless the settings say to dequantise it.
    """
    quantization = quantization_of(base.config)
    if quantization is not None and settings.quantized_base is not QuantizedBase.DEQUANTIZE:
        raise BaseModelError(
            f"The base {base.repository.origin} is stored quantised ({described(quantization)}); a merge into it would"
            " round the update away.",
            hint="Name the 16-bit original with --base-model, or merge into the dequantised weights with"
            " --quantized-base dequantize.",
        )
    layout = find_layout(base.repository)
    if quantization is not None:
        plain = dequantized(base, layout)
        return BaseFiles(
            plain.layout,
            plain.layout.specs,
            lambda: plain.open(base),
            notes=(
                f"The base is stored quantised ({described(quantization)}). The reference is its dequantised form, in "
                f"{plain.dtype}: the weights that an adapter trained on this base saw.",
            ),
            config_changes={"quantization_config": None},
        )

    def open_stored() -> StoredWeights:
        from merge_adapter.checkpoint.reader import StoredWeights  # imports torch

        return StoredWeights(base.repository, layout)

    return BaseFiles(layout, layout.specs, open_stored)
