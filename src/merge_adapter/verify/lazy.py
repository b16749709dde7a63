"""fp32 arithmetic over 16-bit weights that stay where they lie, mapped from the shards.

A `LazyFloat` says it is fp32 and holds something smaller: the stored 16-bit tensor, or an oracle's recipe. It becomes
real when an operation reads it and is gone after. Whole-model fp32 copies are never made, and the bits are those of
`.float()`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

Content = Callable[[], Tensor]
"""Gives the fp32 content, anew at each call or the stored tensor itself."""


class LazyFloat(Tensor):
    """An fp32 tensor whose content is made at the operation that reads it."""

    _content: Content
    _stored: Tensor | None

    @staticmethod
    def __new__(
        cls, content: Content, shape: torch.Size, device: torch.device, stored: Tensor | None = None
    ) -> LazyFloat:
        made: LazyFloat = Tensor._make_wrapper_subclass(
            cls, shape, dtype=torch.float32, device=device, requires_grad=False
        )
        made._content = content
        made._stored = stored
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"LazyFloat({tuple(self.shape)})"

    @classmethod
    def __torch_function__(
        cls,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.embedding and len(args) >= 2 and isinstance(args[1], LazyFloat):
            stored = args[1]._stored
            if stored is not None and not isinstance(args[0], LazyFloat):
                # rows are picked before they are widened: a vocabulary is large, a batch is not
                with torch._C.DisableTorchFunctionSubclass():
                    return func(args[0], stored, *args[2:], **kwargs).float()
        # the inherited form would turn every result into a LazyFloat without content
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch calls it with four arguments, its stub says three
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.detach.default and isinstance(args[0], LazyFloat):
            lazy = args[0]
            return LazyFloat(lazy._content, lazy.shape, lazy.device, lazy._stored)
        return func(*tree_map(_real, args), **tree_map(_real, dict(kwargs or {})))


def _real(value: Any) -> Any:
    return value._content() if isinstance(value, LazyFloat) else value


def lazy(stored: Tensor, device: torch.device) -> Tensor:
    """`stored` as fp32 on `device`: lazily when it is 16 bit, as it is otherwise."""
    if stored.dtype not in (torch.bfloat16, torch.float16):
        return stored if stored.device == device else stored.to(device)
    held = stored if stored.device == device else stored.to(device)
    return LazyFloat(held.float, held.shape, device, held)


def lazy_content(content: Content, shape: torch.Size, device: torch.device) -> Tensor:
    """An fp32 tensor of `shape` whose content `content()` makes on the CPU each time it is read."""
    return LazyFloat(lambda: content().to(device), shape, device)


def set_tensor(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Put `tensor` in the place of the parameter or buffer `name`, whatever its type."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._parameters:
        value = (
            tensor
            if isinstance(tensor, nn.Parameter | LazyFloat)
            else nn.Parameter(tensor, requires_grad=False)
        )
        module._parameters[leaf] = value  # type: ignore[assignment]  # nn.Parameter would refuse a subclass
    else:
        module._buffers[leaf] = tensor


def widen(model: nn.Module, device: torch.device) -> None:
    """Let every 16-bit parameter of `model` compute in fp32 on `device`; buffers are converted, they are small.

    Tied parameters stay tied to one storage.
    """
    seen: dict[int, Tensor] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None or isinstance(parameter, LazyFloat):
                continue
            key = id(parameter)
            if key not in seen:
                seen[key] = lazy(parameter.detach(), device)
            value = seen[key]
            if not isinstance(value, LazyFloat):
                value = nn.Parameter(value, requires_grad=False)
            module._parameters[name] = value  # type: ignore[assignment]
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                moved = buffer.to(device)
                module._buffers[name] = (
                    moved.float() if moved.dtype in (torch.bfloat16, torch.float16) else moved
                )
    config = getattr(model, "config", None)
    if config is not None:
        # some forwards read the dtype from the config rather than from a weight
        config.dtype = torch.float32
