"""Adapted modules that base + adapter goes around: what holds them reads their weights and never calls them.

PEFT's layer acts where it is called. torch's MultiheadAttention and WavLM's attention take the weights of their
projections for themselves: the update of such a layer says nothing until it is merged. Trained so it stays zero.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from merge_adapter.verify.adapters import PREFIX

_CHOICES = (nn.ModuleList, nn.ModuleDict)
"""What holds modules of which some may rightly not be called, such as experts."""
_INNER = ".base_layer."


def watch(model: nn.Module) -> Callable[[], tuple[str, ...]]:
    """Note from now on what `model` calls; the answer tells the adapted modules, with an update, that it went around.

    For LoRA's layers in PEFT's `model`; paths are those of the base.
    """
    from peft.tuners.lora.layer import LoraLayer

    called: set[nn.Module] = set()
    layers: dict[str, tuple[nn.Module, nn.Module]] = {}
    for path, module in model.named_modules():
        holder = model.get_submodule(path.rpartition(".")[0])
        # a layer inside another is the outer one's to use
        if isinstance(module, LoraLayer) and not isinstance(holder, _CHOICES) and _INNER not in path:
            layers[path.removeprefix(PREFIX)] = (holder, module)
            for one in (holder, module):
                one.register_forward_hook(lambda module, *_: called.add(module))

    def unheard() -> tuple[str, ...]:
        return tuple(
            path
            for path, (holder, module) in layers.items()
            if holder in called and module not in called and _has_update(module)
        )

    return unheard


def _has_update(layer: nn.Module) -> bool:
    """Whether one of the layer's second factors is not zero, which all are to begin with."""
    return any(
        bool(parameter.detach().any())
        for name, parameter in layer.named_parameters()
        if "lora_B" in name or "lora_embedding_B" in name
    )
