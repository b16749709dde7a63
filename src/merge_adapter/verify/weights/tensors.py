"""The weights part: every parameter and buffer of the merged model in memory, judged and named."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from merge_adapter.types import Progress, Resolved
from merge_adapter.verify.findings import Finding, fault, note, undecided, verdict, warning
from merge_adapter.verify.memory.mapped import release
from merge_adapter.verify.memory.threads import workers
from merge_adapter.verify.rounding import is_narrower
from merge_adapter.verify.weights.computed import Computed
from merge_adapter.verify.weights.diagnosis import Clues, Rows, explain
from merge_adapter.verify.weights.expectations import Expectations
from merge_adapter.verify.weights.judging import Agreement, TensorEvidence, judge_kept, judge_update
from merge_adapter.verify.weights.low_rank import LowRank
from merge_adapter.verify.weights.oracle import Replaced, Update, as_matrix
from merge_adapter.verify.weights.recipe import recipe
from merge_adapter.verify.weights.screen import SCREENED

RETAINED = 0.9
"""Part of an update below which a person is told that the dtype swallowed the rest."""


@dataclass(frozen=True)
class WeightsPart:
    """What the weights part found."""

    tensors: tuple[TensorEvidence, ...]
    findings: tuple[Finding, ...]

    @property
    def wrong(self) -> tuple[TensorEvidence, ...]:
        """Tensors that are not what they must be."""
        return tuple(entry for entry in self.tensors if entry.agreement is Agreement.WRONG)

    @property
    def exact(self) -> bool:
        """True when every tensor is bit for bit the once-rounded oracle."""
        return not self.findings_fatal and all(entry.agreement is Agreement.EXACT for entry in self.tensors)

    @property
    def settled(self) -> bool:
        """True when no tensor can answer otherwise than the once-rounded oracle, but for a part of its own noise.

        Bit for bit equal ones cannot. In 16 bit an element within tolerance is the oracle's unless fp32 arithmetic fell
        on the other side of a tie, which few do; in fp32 that arithmetic is all the noise there is.
        """
        coarse = {str(dtype).removeprefix("torch.") for dtype in SCREENED}
        return not self.findings_fatal and all(
            entry.agreement is Agreement.EXACT
            or (entry.agreement is Agreement.ROUNDED and entry.dtype in coarse)
            for entry in self.tensors
        )

    @property
    def findings_fatal(self) -> bool:
        """True when tensors are missing or misshapen."""
        return any(finding.weight.name == "FAULT" for finding in self.findings)


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter, ties under each of their names, and every persistent buffer."""
    found = {name: value.detach() for name, value in model.named_parameters(remove_duplicate=False)}
    for path, module in model.named_modules(remove_duplicate=False):
        for leaf, buffer in module._buffers.items():
            if buffer is not None and leaf not in module._non_persistent_buffers_set:
                found[f"{path}.{leaf}" if path else leaf] = buffer.detach()
    return found


def stored_dtypes(expected: Expectations, held: Mapping[str, Tensor]) -> dict[str, torch.dtype]:
    """The dtype in which the merged model holds each tensor; the base's for one that it lacks."""
    bases = expected.plain | {name: update.base for name, update in expected.updates.items()}
    return {name: held.get(name, base).dtype for name, base in bases.items()}


def judge_tensors(
    expected: Expectations, merged: nn.Module, sources: Resolved, progress: Progress
) -> WeightsPart:
    """Compare every tensor of `merged` with what `expected` says of it."""
    held = named_tensors(merged)
    findings = list(key_set({*expected.plain, *expected.updates}, set(held)))
    tensors, found = judge_held(expected, held, sources, progress)
    return weights_part(tensors, (*findings, *found))


def judge_held(
    expected: Expectations, held: Mapping[str, Tensor], sources: Resolved, progress: Progress
) -> tuple[list[TensorEvidence], list[Finding]]:
    """Compare the tensors `held`, all of a model or some, with what `expected` says of them."""
    lookup = _Lookup(expected)
    tensors: list[TensorEvidence] = []
    findings: list[Finding] = []
    total = sum(tensor.numel() * tensor.element_size() for tensor in held.values())

    def judge(name: str, tensor: Tensor) -> TensorEvidence | Finding | None:
        return _judge(name, tensor, expected, sources, lookup)

    with progress.task("Comparing weights", total) as task, workers() as pool:
        for tensor, judged in zip(held.values(), pool.map(judge, held, held.values()), strict=True):
            if isinstance(judged, Finding):
                findings.append(judged)
            elif judged is not None:
                tensors.append(judged)
            task.advance(tensor.numel() * tensor.element_size())
    for entry in tensors:
        if entry.agreement is Agreement.WRONG:
            findings.append(_as_finding(entry))
        elif entry.agreement is Agreement.BASE_CAST_FIRST:
            # whatever else is asked of this tensor, injected faults too, is asked of a merge of this kind
            update = expected.updates[entry.name]
            assert isinstance(update, LowRank | Computed)
            expected.updates[entry.name] = update.on_rounded_base(held[entry.name].dtype)
    return tensors, findings


def weights_part(tensors: Sequence[TensorEvidence], findings: Iterable[Finding]) -> WeightsPart:
    """The part as a whole, with what only all tensors together tell."""
    return WeightsPart(tuple(tensors), (*findings, *_remarks(tensors)))


def key_set(wanted: Set[str], held: Set[str]) -> Iterator[Finding]:
    """Every name that must be there is, and no other."""
    for name in sorted(wanted - held):
        yield fault("weights", name, "the merged model has no such tensor")
    for name in sorted(held - wanted):
        yield fault("weights", name, "belongs to neither base nor adapter")


def _judge(
    name: str, tensor: Tensor, expected: Expectations, sources: Resolved, lookup: _Lookup
) -> TensorEvidence | Finding | None:
    update = expected.updates.get(name)
    base = expected.plain.get(name) if update is None else update.base
    if base is None:
        return None
    if tensor.shape != base.shape:
        turned = tensor.ndim == 2 and tensor.shape == base.T.shape
        text = f"has shape {tuple(tensor.shape)}, expected {tuple(base.shape)}"
        return fault("weights", name, f"transposed: {text}" if turned else text)
    try:
        if update is None:
            evidence = judge_kept(name, tensor, base)
        else:
            evidence = judge_update(
                name, tensor, update, kind="replaced" if isinstance(update, Replaced) else "update"
            )
        if evidence.agreement is not Agreement.WRONG:
            return evidence
        if isinstance(update, LowRank | Computed) and is_narrower(tensor.dtype, base.dtype):
            again = judge_update(name, tensor, update.on_rounded_base(tensor.dtype))
            if again.agreement is not Agreement.WRONG:
                return replace(again, agreement=Agreement.BASE_CAST_FIRST)
        return explain(
            evidence, tensor, update, base, clues(sources, name), lookup.alike(tuple(tensor.shape))
        )
    finally:
        release(tensor)
        release(base)
        if update is not None:
            update.forget()


def clues(sources: Resolved, name: str) -> Clues:
    """What the adapter's config says of the module that holds `name`."""
    if sources.adapter.method != "LORA":
        return Clues()
    numbers = recipe(sources.adapter.config, name.rpartition(".")[0])
    return Clues(numbers.rank, numbers.rslora, numbers.dora)


class _Lookup:
    """What the model's tensors of one shape should hold, for naming content found in the wrong place."""

    def __init__(self, expected: Expectations) -> None:
        self._by_shape: dict[tuple[int, ...], dict[str, Rows]] = {}
        for name, tensor in expected.plain.items():
            self._by_shape.setdefault(tuple(tensor.shape), {})[name] = partial(_plain_rows, tensor)
        for name, update in expected.updates.items():
            self._by_shape.setdefault(tuple(update.shape), {})[name] = partial(_target_rows, update)

    def alike(self, shape: tuple[int, ...]) -> Mapping[str, Rows]:
        return self._by_shape.get(shape, {})


def _plain_rows(tensor: Tensor, count: int) -> Tensor:
    return as_matrix(tensor)[:count].float()


def _target_rows(update: Update, count: int) -> Tensor:
    return update.target_rows(0, count, torch.float32)


def _as_finding(evidence: TensorEvidence) -> Finding:
    return fault("weights", evidence.name.removesuffix(".weight"), evidence.diagnosis)


def _remarks(tensors: Sequence[TensorEvidence]) -> Iterator[Finding]:
    updates = [entry for entry in tensors if entry.kind == "update" and entry.retained is not None]
    low = [entry for entry in updates if (entry.retained or 0.0) < RETAINED]
    if low:
        worst = min(low, key=lambda entry: entry.retained or 0.0)
        better = {"bfloat16": "float16 or float32", "float16": "float32"}.get(worst.dtype, "a wider dtype")
        text = (
            f"{worst.dtype} kept less than {RETAINED:.0%} of the update in {len(low)} of {len(updates)} tensors "
            f"({worst.retained or 0.0:.0%} here); {better} would keep it"
        )
        yield warning("weights", worst.name.removesuffix(".weight"), text)
    cast = [entry for entry in tensors if entry.agreement is Agreement.CAST_FIRST]
    if cast:
        text = f"the update was rounded to 16 bit before it was added in {len(cast)} tensors: a rounding, not an error"
        yield note("weights", "", text)
    based = [entry for entry in tensors if entry.agreement is Agreement.BASE_CAST_FIRST]
    if based:
        text = (
            f"the base was rounded to {based[0].dtype} before the update was added in {len(based)} tensors, as PEFT "
            "does on a base that is loaded in it: a rounding, not an error"
        )
        yield note("weights", "", text)
    touched = [entry for entry in tensors if entry.kind != "kept"]
    if not touched:
        yield fault("weights", "", "the adapter reaches no tensor of this model")
    elif not any(entry.effect > 0 for entry in touched):
        yield undecided(
            "weights", "", "the adapter's update is zero everywhere: the merge and the base are one model"
        )


def total_effect(tensors: Sequence[TensorEvidence]) -> float:
    """The median of |D| / |W| over the updated tensors; 0 when there are none."""
    found = sorted(
        entry.effect for entry in tensors if entry.kind == "update" and entry.effect < float("inf")
    )
    return found[len(found) // 2] if found else 0.0


def weights_section(part: WeightsPart) -> dict[str, Any]:
    """For merge_report.json."""
    updated = [entry for entry in part.tensors if entry.kind == "update"]
    return {
        "verdict": str(verdict(part.findings)),
        "tensors": len(part.tensors),
        "updated": len(updated),
        "replaced": sum(entry.kind == "replaced" for entry in part.tensors),
        "kept": sum(entry.kind == "kept" for entry in part.tensors),
        "agreement": dict(Counter(str(entry.agreement) for entry in part.tensors)),
        "alpha": _span([entry.alpha for entry in updated]),
        "retained": _span([entry.retained for entry in updated]),
        "effect": _span([entry.effect for entry in updated]),
        "worst_error": _span([entry.worst for entry in updated]),
        "per_tensor": [
            evidence_of(entry) for entry in part.tensors if entry.kind != "kept" or entry.diagnosis
        ],
    }


def _span(values: Iterable[float | None]) -> dict[str, float] | None:
    found = sorted(value for value in values if value is not None and abs(value) < float("inf"))
    if not found:
        return None
    return {
        "min": float(f"{found[0]:.4g}"),
        "median": float(f"{found[len(found) // 2]:.4g}"),
        "max": float(f"{found[-1]:.4g}"),
    }


def evidence_of(entry: TensorEvidence) -> dict[str, Any]:
    """One tensor for merge_report.json; numbers rounded to what they can mean."""
    raw = {
        "name": entry.name,
        "kind": entry.kind,
        "dtype": entry.dtype,
        "shape": list(entry.shape),
        "agreement": str(entry.agreement),
        "differing_share": _short(entry.share_differing),
        "wrong": entry.wrong,
        "worst_error": _short(entry.worst),
        "effect": _short(entry.effect),
        "alpha": _short(entry.alpha),
        "retained": _short(entry.retained),
        "residual": _short(entry.residual),
        "oracle": entry.oracle,
        "diagnosis": entry.diagnosis,
    }
    return {key: value for key, value in raw.items() if value not in (None, "")}


def _short(value: float | None) -> float | None:
    if value is None or value != value or value in (float("inf"), float("-inf")):
        return None
    return float(f"{value:.4g}")
