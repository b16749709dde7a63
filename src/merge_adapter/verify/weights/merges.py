"""PEFT's own merge of one module, made on copies of it, as often as it is asked for."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from merge_adapter.errors import ran_out_of_memory
from merge_adapter.verify.weights.computed import Merges

WIDEST = torch.float64.itemsize + torch.float32.itemsize
"""Bytes of one element of `Merges`, what it is in the stored dtype left out."""


class OwnMerge:
    """The module as it is now: what is later put in the place of its parameters changes nothing here."""

    def __init__(self, module: Any) -> None:
        shared = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
        self._module = copy.deepcopy(module, shared)  # the modules alone, not what they hold
        self.dtype = torch.float64
        """Of the exact merge, known after `exact`."""

    def exact(self) -> Mapping[str, Tensor] | None:
        """All tensors after a merge in fp64 where the method allows, else in fp32; None where it has no merge."""
        for dtype in (torch.float64, torch.float32):
            made = self._merged(dtype)
            if made is not None:
                self.dtype = dtype
                return made
        return None

    def merges(self, leaf: str, loaded: torch.dtype | None = None, *, target: Tensor | None = None) -> Merges:
        """One tensor in all dtypes, of which `target` is what `exact` gave. Takes several times the module's size.

        `loaded`: in what dtype the base was loaded, where that is not its own.
        """
        if target is None:
            target = (self._merged(self.dtype, loaded) or {})[leaf]
        native = (self._merged(None, loaded) or {}).get(leaf)
        single = (
            None if self.dtype == torch.float32 else (self._merged(torch.float32, loaded) or {}).get(leaf)
        )
        return Merges(target, native, single)

    def _merged(
        self, dtype: torch.dtype | None, loaded: torch.dtype | None = None
    ) -> Mapping[str, Tensor] | None:
        """The plain layer's tensors after a merge in `dtype` (its own when None); None when PEFT refuses."""
        twin = copy.deepcopy(self._module)
        if loaded is not None:
            plain_layer(twin).to(loaded)
        if dtype is not None:
            twin = twin.to(dtype)
        twin.eval()
        try:
            with torch.no_grad():
                if hasattr(twin, "unload_and_optionally_merge_module"):
                    layer = twin.unload_and_optionally_merge_module(
                        merge=True, safe_merge=False, adapter_names=None
                    )
                else:
                    twin.merge(safe_merge=False)
                    layer = plain_layer(twin)
        except (
            NotImplementedError,
            RuntimeError,
            ValueError,
            TypeError,
            AttributeError,
            AssertionError,
        ) as error:
            if ran_out_of_memory(error):
                raise
            # each method refuses what it cannot do in its own way; the caller decides what that means
            return None
        return {key: value.detach() for key, value in layer_state(layer).items()}


def plain_layer(module: Any) -> nn.Module:
    """The layer inside PEFT's `module`."""
    layer = module.get_base_layer() if hasattr(module, "get_base_layer") else module.base_layer
    assert isinstance(layer, nn.Module)
    return layer


def layer_state(layer: nn.Module) -> dict[str, Tensor]:
    """Its tensors by their names."""
    return {k: v for k, v in layer.state_dict().items() if isinstance(v, Tensor)}
