"""The modules part: PEFT's own unmerged layer against the merged weight, on random vectors, layer by layer.

It asks PEFT's forward pass instead of its (or our) merge arithmetic, so it works alike for every method, and it sees
a single unmerged module that the outputs of a whole model would drown. Each layer is held against its own predicted
error: what rounding the weight once leaves on average, and what fp32 sums over its width leave.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from merge_adapter.types import Progress
from merge_adapter.verify.findings import Finding, fault, undecided
from merge_adapter.verify.memory.lazy import lazy, widen
from merge_adapter.verify.memory.mapped import release
from merge_adapter.verify.memory.threads import workers
from merge_adapter.verify.rounding import UNIT32, half_ulp, unit
from merge_adapter.verify.weights.expectations import Expectations
from merge_adapter.verify.weights.judging import blocks_of
from merge_adapter.verify.weights.oracle import Update

VECTORS = 16
"""Random inputs per layer."""

SAMPLED_RUNS, RUN = 8, 2
"""How far rounding moves a weight, for its size, is measured on this many runs of this many rows, spread over it."""


@dataclass(frozen=True)
class LayerEvidence:
    """One adapted layer."""

    name: str
    error: float
    """|y_merged - y_unmerged|, root mean square over the vectors."""
    predicted: float
    """The same as rounding alone makes it."""
    effect: float
    """|y_base - y_unmerged|."""
    limit: float
    """Largest ratio of error to prediction that rounding can reach."""

    @property
    def ratio(self) -> float:
        """Error in units of its limit; a right merge stays below 1."""
        return (
            self.error / (self.predicted * self.limit) if self.predicted else math.inf if self.error else 0.0
        )

    @property
    def telling(self) -> bool:
        """Whether a layer left unmerged would stand out."""
        return self.effect > self.predicted * self.limit


def judge_layers(
    expected: Expectations, held: Mapping[str, Tensor], *, seed: int, allow_cast: bool, progress: Progress
) -> tuple[list[LayerEvidence], int]:
    """Every layer that PEFT adapted and that can be run alone, and the number of those that cannot."""
    names = [
        name for name in expected.layers if name in held and held[name].shape == expected.updates[name].shape
    ]

    def judge(name: str) -> LayerEvidence | None:
        layer, update = expected.layers[name], expected.updates[name]
        try:
            return judge_layer(
                name, layer, held[name], _bias(name, held), update, seed=seed, allow_cast=allow_cast
            )
        finally:
            release(held[name])
            release(update.base)
            update.forget()

    found: list[LayerEvidence] = []
    with progress.task("Running layers", len(names), unit="layers") as task, workers() as pool:
        for judged in pool.map(judge, names):
            if judged is not None:
                found.append(judged)
            task.advance(1)
    return found, len(names) - len(found)


def _bias(name: str, held: Mapping[str, Tensor]) -> Tensor | None:
    return held.get(f"{name.removesuffix('.weight')}.bias")


def judge_layer(
    name: str, layer: Any, weight: Tensor, bias: Tensor | None, update: Update, *, seed: int, allow_cast: bool
) -> LayerEvidence | None:
    """One layer; None for a kind that cannot be run on vectors alone. `layer` computes in fp32 afterwards."""
    base = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer.base_layer
    inputs = _inputs(base, seed)
    if inputs is None:
        return None
    if isinstance(base, nn.Embedding):
        inputs = _telling(update, inputs)
    widen(layer, torch.device("cpu"))
    twin = copy.copy(base)
    twin._parameters = dict(base._parameters)
    twin._parameters["weight"] = lazy(weight, torch.device("cpu"))
    if bias is not None and twin._parameters.get("bias") is not None:
        twin._parameters["bias"] = lazy(bias, torch.device("cpu"))
    with torch.no_grad():
        truth, plain = _overheard(layer, base, inputs)
        merged = twin(inputs)
    truth, silent = truth[:VECTORS], truth[VECTORS:]
    error, effect = _size(merged[:VECTORS] - truth), _size(plain[:VECTORS] - truth)
    weighed = truth - silent if silent.shape[0] else truth
    predicted = _predicted(update, weight.dtype, inputs, truth, weighed, allow_cast=allow_cast)
    # every element at the edge of its tolerance is sqrt(3) times the average; few vectors scatter around that
    width = min(VECTORS, truth.numel())
    return LayerEvidence(name, error, predicted, effect, math.sqrt(3) * (1 + 3 / math.sqrt(2 * width)))


def _overheard(layer: Any, base: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """What `layer` answers, and what `base` inside it does, which most layers ask for the same on their way."""
    heard: list[Tensor] = []

    def listen(_module: nn.Module, given: tuple[Any, ...], answer: Any) -> None:
        if len(given) == 1 and given[0] is inputs and isinstance(answer, Tensor):
            heard.append(answer.clone())  # some layers go on in the same memory

    handle = base.register_forward_hook(listen)
    try:
        truth = layer(inputs)
    finally:
        handle.remove()
    plain = heard[0] if heard else base(inputs)
    assert isinstance(truth, Tensor)
    assert isinstance(plain, Tensor)
    return truth, plain


def _inputs(base: nn.Module, seed: int) -> Tensor | None:
    """Random inputs that suit the layer's kind; behind vectors one of zeros, whose answer is what is added to all."""
    generator = torch.Generator().manual_seed(seed)
    if isinstance(base, nn.Embedding):
        return torch.randint(0, base.num_embeddings, (VECTORS,), generator=generator)
    if isinstance(base, nn.Linear):
        shape: tuple[int, ...] = (base.in_features,)
    elif type(base).__name__ == "Conv1D":
        weight = base.weight
        assert isinstance(weight, Tensor)
        shape = (weight.shape[0],)
    elif isinstance(base, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        shape = (base.in_channels, *base.kernel_size)
    else:
        return None
    return torch.cat([torch.randn(VECTORS, *shape, generator=generator), torch.zeros(1, *shape)])


def _telling(update: Update, drawn: Tensor) -> Tensor:
    """The ids `drawn`, or, where the update changes none of their rows, some that it changes: single trained tokens."""
    if any(bool(changed_rows(update, row, row + 1).any()) for row in drawn.tolist()):
        return drawn
    found: list[int] = []
    for start, stop in blocks_of(update):
        found += (changed_rows(update, start, stop).nonzero().flatten() + start).tolist()
        if len(found) >= VECTORS:
            break
    return torch.tensor(found[:VECTORS]) if found else drawn


def changed_rows(update: Update, start: int, stop: int) -> Tensor:
    """Which of the rows [start, stop) the update changes, bool."""
    target, base = (rows(start, stop, torch.float64) for rows in (update.target_rows, update.base_rows))
    return (target != base).any(1)


def _size(value: Tensor) -> float:
    """Norm per input vector, root mean square."""
    return float(value.double().reshape(value.shape[0], -1).square().sum(1).mean().sqrt())


def _predicted(
    update: Update, dtype: torch.dtype, inputs: Tensor, truth: Tensor, weighed: Tensor, *, allow_cast: bool
) -> float:
    """What one rounding of the weight to `dtype` and two fp32 forward passes leave, on average.

    Rounding moves every part of a weight by much the same share of it, and random vectors carry the one into their
    answers as they do the other. So the share is measured on a few rows, and the rest on `weighed`, the weight's part
    of the answers: a row that is a thousand times larger than the others counts whether it is among the few or not.
    """
    rows = update.shape[0]
    last = max(0, rows - RUN)
    square = mass = 0.0
    for start in sorted({last * run // (SAMPLED_RUNS - 1) for run in range(SAMPLED_RUNS)}):
        stop = min(start + RUN, rows)
        target = update.target_rows(start, stop, torch.float64)
        # an error spread evenly over [-h, h] has mean square h^2 / 3
        own = half_ulp(target, dtype).square().sum() / 3 + update.product_error(start, stop).square().sum()
        if allow_cast:
            own = own + update.cast_error(start, stop, dtype).square().sum()
        square += float(own)
        mass += float(target.square().sum())
    size = _size(weighed)
    # rows of zeros tell nothing: no number is rounded by a larger share of itself than this
    rounding = size * (math.sqrt(square / mass) if mass else unit(dtype))
    # partial sums of a dot product walk at random: each addition rounds a sum that has grown; a lookup adds none
    additions = inputs[0].numel() if inputs.is_floating_point() else 0
    return math.hypot(rounding, UNIT32 * size * math.sqrt(additions / 3), UNIT32 * _size(truth))


def layer_findings(found: list[LayerEvidence]) -> Iterator[Finding]:
    """A layer beyond its limit is a fault; layers whose effect drowns in rounding leave nothing to see."""
    for entry in found:
        if not entry.ratio <= 1:
            name = entry.name.removesuffix(".weight")
            text = (
                f"answers {entry.ratio:.3g} times as far from PEFT's own layer as rounding allows "
                f"({_share(entry)})"
            )
            yield fault("modules", name, text)
    blind = sum(not entry.telling for entry in found)
    if found and blind == len(found):
        yield undecided("modules", "", "no layer's update stands out from the rounding of its dtype")


def _share(entry: LayerEvidence) -> str:
    if not entry.effect:
        return "the adapter has no effect here"
    return f"{entry.error / entry.effect:.2g} of the adapter's effect"


def layer_section(found: list[LayerEvidence], skipped: int, verdict: str) -> dict[str, Any]:
    """For merge_report.json."""
    return {
        "verdict": verdict,
        "modules": len(found),
        "within": sum(entry.ratio <= 1 for entry in found),
        "telling": sum(entry.telling for entry in found),
        "skipped": skipped,
        "vectors": VECTORS,
        "worst": _short(max((entry.ratio for entry in found), default=None)),
        "worst_share": _short(max((e.error / e.effect for e in found if e.effect), default=None)),
    }


def _short(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.4g}")
