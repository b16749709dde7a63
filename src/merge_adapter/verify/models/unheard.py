"""Adapted modules that base + adapter goes around: what holds them reads their weights and never calls them.

PEFT's layer acts where it is called. torch's MultiheadAttention and WavLM's attention take the weights of their
projections for themselves: the update of such a layer says nothing until it is merged. Trained so it stays zero.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from merge_adapter.verify.models.adapters import PREFIX

_INNER = ".base_layer."


def watch(model: nn.Module) -> Callable[[], tuple[str, ...]]:
    """Note from now on what `model` calls; the answer tells the adapted modules, with an update, that it went around.

    For LoRA's layers in PEFT's `model`; paths are those of the base.
    """
    from peft.tuners.lora.layer import LoraLayer

    called: set[nn.Module] = set()
    read: set[nn.Module] = set()
    layers: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        # a layer inside another is the outer one's to use
        if isinstance(module, LoraLayer) and _INNER not in path:
            layers[path.removeprefix(PREFIX)] = module
            module.register_forward_hook(lambda module, *_: called.add(module))
            # through this method PEFT's layer hands out the weight of the module inside it
            module.__dict__["get_base_layer"] = partial(_handing_out, module.get_base_layer, module, read)

    def unheard() -> tuple[str, ...]:
        around = read - called
        return tuple(path for path, module in layers.items() if module in around and _has_update(module))

    return unheard


def _handing_out(own: Callable[[], nn.Module], layer: nn.Module, read: set[nn.Module]) -> nn.Module:
    read.add(layer)
    return own()


def _has_update(layer: nn.Module) -> bool:
    """Whether one of the layer's second factors is not zero, which all are to begin with."""
    return any(
        bool(parameter.detach().any())
        for name, parameter in layer.named_parameters()
        if "lora_B" in name or "lora_embedding_B" in name
    )
