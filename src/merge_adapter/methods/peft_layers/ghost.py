"""Ghosts: parameters with a shape and next to no storage, to let PEFT build its layers around nothing.

A ghost is a real tensor, one element expanded to the whole shape. PEFT sees device, dtype and shape, makes its own
parameters and buffers for real, and a model of 70 billion parameters takes megabytes. What a ghost cannot give is
values: an initialisation that reads a weight gets ones. `Watch` notices that.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def ghostly(model: Any) -> Any:
    """A copy of a meta model whose parameters are ghosts in float32; tied parameters stay tied."""
    model = copy.deepcopy(model)
    ghosts: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in ghosts:
                ghosts[id(parameter)] = ghost(parameter.shape)
            module._parameters[name] = ghosts[id(parameter)]
    return model.eval()


def ghost(shape: Sequence[int]) -> torch.nn.Parameter:
    """One ghost, float32."""
    one = torch.ones(1) if shape else torch.ones(())  # a scalar (CLIP's logit_scale) expands to nothing else
    return torch.nn.Parameter(one.expand(torch.Size(shape)), requires_grad=False)


def is_ghost(tensor: torch.Tensor) -> bool:
    """Whether the tensor is one element expanded."""
    return tensor.numel() > 1 and all(step == 0 for step in tensor.stride())


def place(module: torch.nn.Module, values: Mapping[str, torch.Tensor]) -> dict[str, torch.nn.Parameter]:
    """Put real values in the place of a module's parameters; returns what was there, for `restore`."""
    before: dict[str, torch.nn.Parameter] = {}
    for name, value in values.items():
        old = module._parameters[name]
        assert old is not None
        before[name] = old
        module._parameters[name] = torch.nn.Parameter(value, requires_grad=False)
    return before


def restore(module: torch.nn.Module, before: Mapping[str, torch.nn.Parameter]) -> None:
    """Undo `place`."""
    for name, parameter in before.items():
        module._parameters[name] = parameter


def skeleton(path: str, module: torch.nn.Module) -> torch.nn.Module:
    """A model that holds nothing but one module, at its path."""
    root = torch.nn.Module()
    root.config = {"tie_word_embeddings": False}  # type: ignore[assignment]  # what PEFT asks of a model
    parent = root
    *above, last = path.split(".")
    for part in above:
        child = torch.nn.Module()
        parent.add_module(part, child)
        parent = child
    parent.add_module(last, module)
    return root


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Notes every operation that reads the values of a ghost; views of ghosts are free."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._storages = {
            parameter.untyped_storage().data_ptr() for parameter in model.parameters() if is_ghost(parameter)
        }
        self.reads: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(self._watched(value) for value in tree_leaves((args, kwargs))):
            made = [value for value in tree_leaves(result) if isinstance(value, torch.Tensor)]
            if not made or not self._all_watched(made):
                self.reads.add(str(func))
        return result

    def _all_watched(self, tensors: Iterable[torch.Tensor]) -> bool:
        return all(self._watched(tensor) for tensor in tensors)

    def _watched(self, value: object) -> bool:
        return (
            isinstance(value, torch.Tensor)
            and value.device.type == "cpu"
            and value.untyped_storage().data_ptr() in self._storages
        )
