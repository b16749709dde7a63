"""fp32 arithmetic over 16-bit weights that stay where they lie, mapped from the shards.

A `LazyFloat` says it is fp32 and holds something smaller: the stored 16-bit tensor, or an oracle's recipe. It becomes
real when an operation reads it and is gone after. Whole-model fp32 copies are never made, and the bits are those of
`.float()`. A linear layer's weight is never whole in fp32 either: it is made and multiplied some rows at a time, in a
buffer that stays in cache, and its mapped pages are let go when many vectors have passed through it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from merge_adapter.verify.memory.mapped import is_paged, need, release
from merge_adapter.verify.memory.scratch import own_scratch

Content = Callable[[], Tensor]
"""Gives the fp32 content, anew at each call or the stored tensor itself."""

PIECE = 1 << 19
"""Elements of a linear layer's weight that are fp32 at a time: 2 MB. Smaller ones than row blocks, so that many
threads find some to share."""

MANY = 64
"""Vectors in one pass from which on reading a weight again later costs little beside multiplying by it."""


class Fill(Protocol):
    """Writes rows [start, stop) of a matrix into `out`, fp32 and of that shape."""

    def __call__(self, start: int, stop: int, out: Tensor) -> None: ...


class LazyFloat(Tensor):
    """An fp32 tensor whose content is made at the operation that reads it."""

    _content: Content
    _stored: Tensor | None
    _fill: Fill | None
    _mapped: Tensor | None
    """What is read when the content is made, and can be let go after."""

    @staticmethod
    def __new__(
        cls,
        content: Content,
        shape: torch.Size,
        device: torch.device,
        stored: Tensor | None = None,
        fill: Fill | None = None,
        mapped: Tensor | None = None,
    ) -> LazyFloat:
        made: LazyFloat = Tensor._make_wrapper_subclass(
            cls, shape, dtype=torch.float32, device=device, requires_grad=False
        )
        made._content = content
        made._stored = stored
        made._fill = fill
        made._mapped = stored if mapped is None else mapped
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
                need(stored)
                with torch._C.DisableTorchFunctionSubclass():
                    return func(args[0], stored, *args[2:], **kwargs).float()
        if func is nn.functional.linear and len(args) >= 2 and isinstance(args[1], LazyFloat):
            with torch._C.DisableTorchFunctionSubclass():
                return _linear(*args, **kwargs)
        # the inherited form would turn every result into a LazyFloat without content
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch calls it with four arguments, its stub says three
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.detach.default and isinstance(args[0], LazyFloat):
            lazy = args[0]
            return LazyFloat(lazy._content, lazy.shape, lazy.device, lazy._stored, lazy._fill, lazy._mapped)
        return func(*tree_map(_real, args), **tree_map(_real, dict(kwargs or {})))


def _real(value: Any) -> Any:
    return value._content() if isinstance(value, LazyFloat) else value


def _linear(vectors: Tensor, weight: LazyFloat, bias: Tensor | None = None) -> Tensor:
    """`nn.functional.linear` with the weight made some rows at a time."""
    linear = nn.functional.linear
    rows, width = weight.shape
    step = max(1, PIECE // max(1, width))
    if weight._fill is None or weight.device.type != "cpu":
        return linear(vectors, _real(weight), _real(bias))
    bias = _real(bias)
    scratch = own_scratch()
    found = None
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        piece = scratch.floats("weight", torch.Size((stop - start, width)))
        weight._fill(start, stop, piece)
        made = linear(vectors, piece, None if bias is None else bias[start:stop])
        if step >= rows:
            found = made
            break
        if found is None:
            found = made.new_empty((*made.shape[:-1], rows))
        found[..., start:stop] = made
    assert found is not None
    if weight._mapped is not None and vectors.numel() >= MANY * width:
        release(weight._mapped)
    return found


def lazy(stored: Tensor, device: torch.device) -> Tensor:
    """`stored` as fp32 on `device`: lazily when it is 16 bit, as it is otherwise."""
    if is_paged() and stored.is_floating_point():
        return _lazy_paged(stored, device)
    if stored.dtype not in (torch.bfloat16, torch.float16):
        return stored if stored.device == device else stored.to(device)
    held = stored if stored.device == device else stored.to(device)

    def fill(start: int, stop: int, out: Tensor) -> None:
        out.copy_(held[start:stop])

    return LazyFloat(held.float, held.shape, device, held, fill if held.ndim == 2 else None)


def _lazy_paged(stored: Tensor, device: torch.device) -> Tensor:
    """The same for a tensor whose data comes when it is needed, and may be gone again after."""

    def content() -> Tensor:
        need(stored)
        return stored.to(device, torch.float32, copy=True)

    def fill(start: int, stop: int, out: Tensor) -> None:
        need(stored)
        out.copy_(stored[start:stop])

    on_cpu = device.type == "cpu"  # elsewhere an operation needs the content on its own device
    return LazyFloat(
        content, stored.shape, device, stored if on_cpu else None, fill if stored.ndim == 2 else None
    )


def lazy_content(shape: torch.Size, device: torch.device, fill: Fill, mapped: Tensor | None = None) -> Tensor:
    """An fp32 tensor of `shape` whose rows, the tensor seen as a matrix, `fill` makes each time they are read.

    `mapped` is what `fill` reads them from.
    """

    def content() -> Tensor:
        made = torch.empty(shape, dtype=torch.float32)
        rows = made.view(shape[0], -1) if len(shape) else made.view(1, 1)
        step = max(1, PIECE // max(1, rows.shape[1]))
        for start in range(0, rows.shape[0], step):
            fill(start, min(start + step, rows.shape[0]), rows[start : start + step])
        return made.to(device)

    return LazyFloat(content, shape, device, fill=fill if len(shape) == 2 else None, mapped=mapped)


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
                need(buffer)
                moved = buffer.to(device, copy=is_paged())
                module._buffers[name] = (
                    moved.float() if moved.dtype in (torch.bfloat16, torch.float16) else moved
                )
    config = getattr(model, "config", None)
    if config is not None:
        # some forwards read the dtype from the config rather than from a weight
        config.dtype = torch.float32
