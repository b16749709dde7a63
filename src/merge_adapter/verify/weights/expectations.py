"""Which tensor of the merged model must be what: a walk over the model that PEFT built.

PEFT has put its layers where the adapter belongs; this walk asks each of them what it holds, and pairs it with the raw
adapter file. Names are those of the merged model in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from merge_adapter.errors import MethodError
from merge_adapter.types import CombinationType, Resolved
from merge_adapter.verify.models.adapters import PREFIX, AdapterFile
from merge_adapter.verify.models.loading import inner
from merge_adapter.verify.models.weighted import COMBINED
from merge_adapter.verify.weights.by_parameter import by_parameter
from merge_adapter.verify.weights.computed import Computed, Merges
from merge_adapter.verify.weights.low_rank import Dora, LowRank
from merge_adapter.verify.weights.merges import WIDEST, OwnMerge, layer_state, plain_layer
from merge_adapter.verify.weights.oracle import Replaced, Update
from merge_adapter.verify.weights.recipe import Recipe, recipe

ROOM = 1 << 28
"""Bytes of what PEFT's layers were merged to that are kept; the rest is made again each time it is compared."""


@dataclass
class Expectations:
    """What every parameter and persistent buffer of the merged model must be."""

    plain: dict[str, Tensor] = field(default_factory=dict)
    """Name -> the base's own tensor, to be kept."""
    updates: dict[str, Update] = field(default_factory=dict)
    """Name -> what the adapter makes of it."""
    layers: dict[str, nn.Module] = field(default_factory=dict)
    """Name of a weight -> PEFT's layer around it, for the modules part."""
    consumed: set[str] = field(default_factory=set)
    """Keys of the raw adapter files that the closed forms used."""
    disagreements: list[str] = field(default_factory=list)
    """Where PEFT's layer and the raw config differ."""
    room: int = field(default_factory=lambda: ROOM)
    """Bytes of PEFT's merges that may yet be kept."""


def expectations(
    model: Any, sources: Resolved, files: tuple[AdapterFile, ...], *, only: Set[str] | None = None
) -> Expectations:
    """Walk PEFT's `model` and say what each tensor of the merged model must be.

    With `only`, nothing is read or said of other tensors: what the base holds there need not be at hand.
    Raises MethodError for a layer that has no merge.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    found = Expectations()
    root = inner(model)
    handled: list[str] = []
    above = None if only is None else {name[:at] for name in only for at in _dots(name)}
    for name, module in list(root.named_modules(remove_duplicate=False)):
        if any(name == path or name.startswith(path + ".") for path in handled[-1:]):
            continue
        if above is not None and name not in above:
            continue
        if isinstance(module, AuxiliaryTrainingWrapper):
            handled.append(name)
            _wrapper(found, name, module, files)
        elif isinstance(module, BaseTunerLayer):
            handled.append(name)
            _layer(found, name, module, sources, files)
        else:
            for leaf, tensor in _own_tensors(module):
                _plain(found, f"{name}.{leaf}" if name else leaf, tensor, files)
    if only is not None:
        found.plain = {name: tensor for name, tensor in found.plain.items() if name in only}
        found.updates = {name: update for name, update in found.updates.items() if name in only}
        found.layers = {name: layer for name, layer in found.layers.items() if name in only}
    return found


def _dots(name: str) -> list[int]:
    """Where the names of the modules around a tensor end; 0 for the model itself."""
    return [0, *(at for at, letter in enumerate(name) if letter == ".")]


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers that hang directly on a module."""
    yield from ((name, tensor) for name, tensor in module._parameters.items() if tensor is not None)
    skipped = module._non_persistent_buffers_set
    yield from ((n, t) for n, t in module._buffers.items() if t is not None and n not in skipped)


def _inside(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The same of a module and of all inside it, by their path from there."""
    for path, part in module.named_modules():
        for leaf, tensor in _own_tensors(part):
            yield f"{path}.{leaf}" if path else leaf, tensor


def _plain(found: Expectations, name: str, tensor: Tensor, files: tuple[AdapterFile, ...]) -> None:
    """A tensor PEFT left alone, unless the adapter file carries it under its own name (biases, embeddings)."""
    for file in files:
        for key in (
            f"{PREFIX}{name}",
            f"{PREFIX}{name.rpartition('.')[0]}.base_layer.{name.rpartition('.')[2]}",
        ):
            value = file.tensors.get(key)
            if value is not None:
                found.consumed.add(key)
                found.updates[name] = Replaced(tensor.detach(), value)
                return
    found.plain[name] = tensor.detach()


def _wrapper(found: Expectations, name: str, module: Any, files: tuple[AdapterFile, ...]) -> None:
    """modules_to_save, or single trained rows of an embedding."""
    tokens = getattr(module, "token_adapter", None)
    if tokens is not None:
        _computed(found, name, tokens)
        _consume(found, name, files)
        return
    active = [key for key in module.active_adapters if key in module.modules_to_save]
    trained = module.modules_to_save[active[-1]] if active else module.original_module
    original = dict(module.original_module.named_parameters(remove_duplicate=False))
    for leaf, tensor in trained.named_parameters(remove_duplicate=False):
        raw = [(f"{PREFIX}{name}.{leaf}", file) for file in files if f"{PREFIX}{name}.{leaf}" in file.tensors]
        value = raw[-1][1].tensors[raw[-1][0]] if raw else tensor.detach()
        found.consumed.update(key for key, _ in raw)
        base = original.get(leaf)
        # a head whose shape the adapter changed has no base to compare with
        base = value if base is None or base.shape != value.shape else base.detach()
        found.updates[f"{name}.{leaf}"] = Replaced(base, value)
    for leaf, tensor in _inside(trained):
        if not isinstance(tensor, nn.Parameter):
            found.plain[f"{name}.{leaf}"] = tensor.detach()


def _consume(found: Expectations, path: str, files: tuple[AdapterFile, ...]) -> None:
    start = f"{PREFIX}{path}."
    found.consumed.update(key for file in files for key in file.tensors if key.startswith(start))


def _layer(
    found: Expectations, name: str, module: Any, sources: Resolved, files: tuple[AdapterFile, ...]
) -> None:
    """A layer PEFT adapted: in closed form where there is one, else PEFT's merge on a copy."""
    named = by_parameter(name, module, sources, files)
    if named:
        found.disagreements += [text for parameter in named.values() for text in parameter.disagreements]
        for leaf, tensor in layer_state(plain_layer(module)).items():
            if leaf in named:
                found.updates[f"{name}.{leaf}"] = named[leaf].update
            else:
                _plain(found, f"{name}.{leaf}", tensor, files)
        if "weight" in named:
            found.layers[f"{name}.weight"] = module
        _consume(found, name, files)
        return
    closed = _closed_form(found, name, module, sources, files)
    if closed is None:
        _computed(found, name, module)
        _consume(found, name, files)
        return
    base = module.get_base_layer()
    found.updates[f"{name}.weight"] = closed
    found.layers[f"{name}.weight"] = module
    for leaf, tensor in _inside(base):  # a router may hold more than a weight and a bias
        if leaf == "weight":
            continue
        bias = _bias_update(name, tensor, sources, files) if leaf == "bias" else None
        if bias is not None:
            found.updates[f"{name}.{leaf}"] = bias
        else:
            _plain(found, f"{name}.{leaf}", tensor, files)
    _consume(found, name, files)


def _closed_form(
    found: Expectations, name: str, module: Any, sources: Resolved, files: tuple[AdapterFile, ...]
) -> Update | None:
    """W + sum of s B A over the adapters, or DoRA for a single one; None when the layer is of another kind."""
    lefts: list[Tensor] = []
    rights: list[Tensor] = []
    scales: list[Tensor] = []
    base = module.get_base_layer()
    weight = getattr(base, "weight", None)
    if weight is None or not all(adapter.method == "LORA" for adapter in sources.adapters):
        return None
    magnitude: Tensor | None = None
    transposed = bool(getattr(module, "fan_in_fan_out", False))
    if sources.combination.type is not CombinationType.SEQUENTIAL:
        ranks: tuple[int, ...] = ()
        if sources.combination.type is CombinationType.CAT:
            ranks = tuple(_rank(file, name) for file in files)
        return _combined_form(module, weight, ranks=ranks, transposed=transposed)
    for at, (adapter, file) in enumerate(zip(sources.adapters, files, strict=True)):
        factors = _factors(file, name)
        if factors is None:
            if any(key.startswith(f"{PREFIX}{name}.") for key in file.tensors):
                return None
            continue
        down, up, embedding = factors
        numbers = recipe(adapter.config, name)
        _cross_check(found, name, module, at, len(files), numbers, adapter.weight)
        flip = embedding or transposed
        up, down = up.reshape(up.shape[0], -1), down.reshape(down.shape[0], -1)  # (out, r), (r, in)
        if flip:
            up, down = down.T, up.T  # the stored weight is (in, out)
        if up.shape[0] != weight.shape[0] or down.shape[1] * up.shape[0] != weight.numel():
            return None
        lefts.append(up)
        rights.append(down)
        scales.append(torch.full((up.shape[1],), numbers.scale * adapter.weight, dtype=torch.float64))
        if numbers.dora:
            magnitude = file.module(name, "lora_magnitude_vector")
            if magnitude is None:
                magnitude = file.module(name, "lora_magnitude_vector.weight")
            if magnitude is None or weight.ndim != 2 or embedding or len(files) > 1:
                return None
    if not lefts or any(
        key.startswith(f"{PREFIX}{name}.") and _is_foreign(key) for f in files for key in f.tensors
    ):
        return None
    # a single adapter's factors stay where they lie, in its file
    left = lefts[0] if len(lefts) == 1 else torch.cat(lefts, 1)
    right = rights[0] if len(rights) == 1 else torch.cat(rights, 0)
    scale = torch.cat(scales)
    if magnitude is not None:
        return Dora(weight.detach(), left, right, magnitude=magnitude, by_row=not transposed, scales=scale)
    shares = tuple(_rank(file, name) for file in files) if len(files) > 1 else ()
    return LowRank(weight.detach(), left, right, ranks=shares, scales=scale)


def _rank(file: AdapterFile, name: str) -> int:
    """The rank of one adapter on one module, 0 where it leaves it alone."""
    factors = _factors(file, name)
    return 0 if factors is None else int(factors[0].shape[0])


def _combined_form(module: Any, weight: Tensor, *, ranks: tuple[int, ...], transposed: bool) -> Update | None:
    """W + B A with the factors that PEFT's `add_weighted_adapter` made."""
    if COMBINED in module.lora_A:
        down, up, flip = module.lora_A[COMBINED].weight, module.lora_B[COMBINED].weight, transposed
    elif COMBINED in module.lora_embedding_A:
        down, up, flip = module.lora_embedding_A[COMBINED], module.lora_embedding_B[COMBINED], True
    else:
        return None
    up, down = up.detach().flatten(1), down.detach().flatten(1)  # (out, r), (r, in)
    left, right = (down.T, up.T) if flip else (up, down)
    form = "PEFT's add_weighted_adapter, W + B A"
    return LowRank(weight.detach(), left, right, form=form, ranks=ranks)


_LORA_LEAVES = (
    "lora_A.weight",
    "lora_B.weight",
    "lora_B.bias",
    "lora_embedding_A",
    "lora_embedding_B",
    "lora_magnitude_vector",
    "lora_magnitude_vector.weight",
    "base_layer.bias",
    "base_layer.weight",
    "bias",
    "weight",
)


def _is_foreign(key: str) -> bool:
    """A tensor inside an adapted module that no closed form here accounts for."""
    return not key.endswith(_LORA_LEAVES)


def _factors(file: AdapterFile, name: str) -> tuple[Tensor, Tensor, bool] | None:
    """(A, B, is embedding) as the raw file holds them."""
    down, up = file.module(name, "lora_A.weight"), file.module(name, "lora_B.weight")
    if down is not None and up is not None:
        return down, up, False
    down, up = file.module(name, "lora_embedding_A"), file.module(name, "lora_embedding_B")
    if down is not None and up is not None:
        return down, up, True
    return None


def _cross_check(
    found: Expectations, name: str, module: Any, at: int, count: int, numbers: Recipe, weight: float
) -> None:
    """PEFT's own scaling must agree with what the raw config says."""
    key = "default" if count == 1 and at == 0 else f"adapter_{at}"
    key = "default" if at == 0 and "default" in getattr(module, "scaling", {}) else key
    theirs = getattr(module, "scaling", {}).get(key)
    ours = numbers.scale * weight
    if isinstance(theirs, int | float) and abs(theirs - ours) > 1e-6 * abs(ours):
        found.disagreements.append(f"{name}: PEFT scales by {theirs:g}, the adapter's config says {ours:g}")


def _bias_update(name: str, bias: Tensor, sources: Resolved, files: tuple[AdapterFile, ...]) -> Update | None:
    """The base's bias plus s times the bias of B (`lora_bias`); None when no adapter has one."""
    total = torch.zeros(bias.shape, dtype=torch.float64)
    seen = False
    for adapter, file in zip(sources.adapters, files, strict=True):
        extra = file.module(name, "lora_B.bias")
        if extra is not None:
            total += extra.double() * recipe(adapter.config, name).scale * adapter.weight
            seen = True
    if not seen:
        return None
    return LowRank(bias.detach(), total[:, None], torch.ones(1, 1, dtype=torch.float64))


def _kept(made: Merges, own: OwnMerge, leaf: str, loaded: torch.dtype | None) -> Merges:
    return made if loaded is None else own.merges(leaf, loaded)


def _computed(found: Expectations, name: str, module: Any) -> None:
    """What PEFT's own merge makes of a copy of one module, in fp64 where the method allows, else in fp32."""
    own = OwnMerge(module)
    truth = own.exact()
    if truth is None:
        raise MethodError(
            f"PEFT has no merge for {name} ({type(module).__module__}.{type(module).__name__})",
            hint="Serve this adapter unmerged; it cannot be folded into plain weights.",
        )
    digits = "fp64" if own.dtype == torch.float64 else "fp32"
    label = f"PEFT's own {type(module).__module__.split('.')[2]} layer, {digits}"
    # torch's MultiheadAttention has a layer of PEFT inside, which the merge takes out
    base = layer_state(plain_layer(module))
    originals = {k.replace("base_layer.", ""): v.detach() for k, v in base.items()}
    for leaf, target in truth.items():
        original = originals.get(leaf)
        full = f"{name}.{leaf}" if name else leaf
        if original is None:
            found.plain[full] = target
            continue
        if torch.equal(target, original.to(target.dtype)):
            found.plain[full] = original
            continue
        size = target.numel() * (WIDEST + original.element_size())
        if size <= found.room:
            found.room -= size
            made = own.merges(leaf, target=target)
            found.updates[full] = Computed(original, partial(_kept, made, own, leaf), form=label)
        else:
            found.updates[full] = Computed(original, partial(own.merges, leaf), form=label)
        if leaf == "weight":
            found.layers[full] = module
