"""Convolutions that PEFT can train a LoRA on, and no weight of the same layer can hold it."""

from __future__ import annotations

from typing import Any

from merge_adapter.errors import MethodError
from merge_adapter.methods.change import Context, ModuleKind, TensorSpec

_UNMERGED = "Keep the adapter and load it with PEFT beside its base."


def check_convolution(context: Context, path: str, a: TensorSpec) -> None:
    """Raise MethodError where the convolution at `path` cannot do what LoRA's two convolutions do.

    `a` is the first of them, `[rank, in, *kernel]`. PEFT gives it the kernel, stride and padding of the layer, and
    neither its groups nor its dilation nor its mode of padding.
    """
    if context.names.kind(path) is not ModuleKind.CONV:
        return
    module: Any = context.names.module(path)
    if module is None:
        return
    wide = any(size > 1 for size in a.shape[2:])
    padded = module.padding == "same" or any(module.padding)
    reason = ""
    if module.groups > 1:
        reason = (
            f"has {module.groups} groups, each of which sees {module.in_channels // module.groups} of"
            f" {module.in_channels} channels, and PEFT's update sees all of them"
        )
    elif wide and any(step > 1 for step in module.dilation):
        reason = f"has the dilation {tuple(module.dilation)}, and PEFT's update has none"
    elif wide and padded and module.padding_mode != "zeros":
        reason = f"pads its input by the mode {module.padding_mode!r}, and PEFT's update with zeros"
    if reason:
        raise MethodError(
            f"{path} is a convolution that {reason}: no weight of it can hold the update.", hint=_UNMERGED
        )
