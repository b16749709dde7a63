"""The outputs part: does the merged model answer as base + adapter does?

Five arms read the same token ids in fp32:

    R   base + adapter through PEFT, unmerged: the truth
    B   the base alone: how much the adapter matters
    O   the oracle rounded once to the stored dtype: what rounding costs at best
    O+  the oracle with every weight off at random by as much as the weights part permits: what it may cost
    M   the merged folder, in a fresh process without PEFT

With d the distance from R: noise N = d(O), its ceiling C = d(O+), error E = d(M), effect S = d(B). The part passes when
E is within C's upper confidence bound and S's lower bound is above N's upper one. Where the weights part has left M no
room to differ from O, O+ does not run, M reads a few documents, and it is d(M, O) that must be within N's bound. When
the effect is not above the noise no comparison of outputs could tell a good merge from none, and the part leaves it
open.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from merge_adapter.types import Progress
from merge_adapter.verify.answers import CLASSES, Batch, answer, distances, greedy
from merge_adapter.verify.expectations import Expectations
from merge_adapter.verify.findings import Finding, fault, undecided
from merge_adapter.verify.lazy import Fill, lazy_content, set_tensor, widen
from merge_adapter.verify.mutants import DROPPED, Mutant, Outcome, faulty_rows
from merge_adapter.verify.oracle import Replaced, Update
from merge_adapter.verify.rounding import half_ulp, rounded
from merge_adapter.verify.sentences import Tail
from merge_adapter.verify.statistics import Measure, bounds, histogram, measure
from merge_adapter.verify.weights import blocks

Rounding = Callable[[Update, str, int, int, torch.dtype], Tensor]
"""Rows [start, stop) of an update as a merge in that dtype may hold them."""


@dataclass
class Arms:
    """The answers of the arms that run in this process, documents in the first dimension."""

    reference: Tensor
    base: Tensor
    oracle: Tensor
    ceiling: Tensor | None
    greedy: tuple[Batch, Tensor, Tensor] | None = None
    """Prompts, R's continuations and the gap between R's first and second choice."""
    base_written: Tensor | None = None
    """The base's own continuations, to show what the adapter changes."""


@dataclass
class OutputsPart:
    """What the outputs part found."""

    findings: list[Finding] = field(default_factory=list)
    evidence: dict[str, Any] = field(default_factory=dict)


def run_reference_arms(
    model: Any,
    plain: nn.Module,
    expected: Expectations,
    kind: str,
    batch: Batch,
    *,
    storage: torch.dtype,
    device: torch.device,
    with_ceiling: bool,
    prompts: Batch | None,
    greedy_tokens: int,
    seed: int,
    progress: Progress,
    tail: Tail | None = None,
) -> Arms:
    """R and B on PEFT's `model`; O and O+ on `plain`, a second load of the base. Both are changed in place."""
    widen(model, device)
    arms = 4 if with_ceiling else 3
    with progress.task("Running the reference", arms * int(batch.ids.numel()), unit="tokens") as task:

        def ask(asked: Any) -> Tensor:
            found = []
            for piece in batch.parts():
                found.append(answer(asked, kind, piece, device, tail))
                task.advance(int(piece.ids.numel()))
            return torch.cat(found)

        reference = ask(model)
        written = None
        if prompts is not None and greedy_tokens:
            ids, gaps = greedy(model, prompts, greedy_tokens, device, kind)
            written = (prompts, ids, gaps)
        with model.disable_adapter():
            base = ask(model)
            base_written = (
                greedy(model, prompts, greedy_tokens, device, kind)[0] if written and prompts else None
            )
        place_oracle(plain, expected, storage, device, once_rounded)
        oracle = ask(plain)
        ceiling = None
        if with_ceiling:
            place_oracle(plain, expected, storage, device, dithered(seed))
            ceiling = ask(plain)
    return Arms(reference, base, oracle, ceiling, written, base_written)


def place_oracle(
    plain: nn.Module, expected: Expectations, storage: torch.dtype, device: torch.device, how: Rounding
) -> None:
    """Make `plain` the merged model that `expected` describes, each update put through `how`."""
    for name, update in expected.updates.items():
        set_tensor(plain, name, lazy_content(update.shape, device, _rows(update, name, storage, how)))
    # named one by one: tensors tied in the base part when the adapter changes only one of them
    for name, tensor in expected.plain.items():
        set_tensor(plain, name, tensor)
    widen(plain, device)


def _rows(update: Update, name: str, storage: torch.dtype, how: Rounding) -> Fill:
    """Makes rows of the merged tensor block by block, so that nothing of its size exists in fp64."""

    def fill(start: int, stop: int, out: Tensor) -> None:
        # always the same blocks, whichever rows are asked for: what is random in them must not depend on that
        for first, last in blocks(update.shape):
            low, high = max(first, start), min(last, stop)
            if low < high:
                rows = how(update, name, first, last, storage)
                out[low - start : high - start] = rows[low - first : high - first]

    return fill


def once_rounded(update: Update, name: str, start: int, stop: int, dtype: torch.dtype) -> Tensor:  # noqa: ARG001
    """O: rows of the oracle rounded once."""
    work = torch.float64 if dtype == torch.float32 else torch.float32
    return rounded(update.target_rows(start, stop, work), dtype)


def dithered(seed: int) -> Rounding:
    """O+: every element off by a random part of its tolerance, then rounded. The same at every read."""

    def how(update: Update, name: str, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        if isinstance(update, Replaced):
            return once_rounded(update, name, start, stop, dtype)
        generator = torch.Generator().manual_seed(seed + zlib.crc32(f"{name}:{start}".encode()))
        target = update.target_rows(start, stop, torch.float64)
        tolerance = (
            half_ulp(target, dtype)
            + update.product_error(start, stop)
            + update.cast_error(start, stop, dtype)
        )
        shift = torch.rand(target.shape, generator=generator, dtype=torch.float64) * 2 - 1
        return rounded(target + shift * tolerance, dtype)

    return how


def run_mutant_arms(
    plain: nn.Module,
    expected: Expectations,
    outcomes: list[Outcome],
    arms: Arms,
    kind: str,
    batch: Batch,
    *,
    storage: torch.dtype,
    device: torch.device,
    confidence: float,
    seed: int,
    progress: Progress,
    tail: Tail | None = None,
) -> list[Outcome]:
    """Make each fault in the whole of `plain` and ask whether the outputs part's rule would fail it.

    Returns the outcomes with that answer, and one more: a block of layers left unmerged.
    """
    noise = distances(
        kind, arms.reference, arms.ceiling if arms.ceiling is not None else arms.oracle, batch.mask
    )
    limit = bounds(noise["mean"], confidence=confidence, seed=seed)[1]
    dropped = Outcome(DROPPED)
    with progress.task("Injecting faults into outputs", len(outcomes) + 1, unit="faults") as task:
        made = [(one, _mutated(seed, one.mutant)) for one in outcomes if one.mutant is not None]
        for outcome, how in [*made, (dropped, _drop(expected))]:
            place_oracle(plain, expected, storage, device, how)
            answers = torch.cat([answer(plain, kind, piece, device, tail) for piece in batch.parts()])
            found = float(distances(kind, arms.reference, answers, batch.mask)["mean"].mean())
            outcome.outputs = not found <= limit  # answers that are no numbers are caught too
            task.advance(1)
    return [*outcomes, dropped]


def _mutated(seed: int, mutant: Mutant) -> Rounding:
    def how(update: Update, name: str, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        if isinstance(update, Replaced):
            return once_rounded(update, name, start, stop, dtype)
        return faulty_rows(mutant, update, start, stop, dtype, seed)

    return how


def _drop(expected: Expectations) -> Rounding:
    """The once-rounded oracle, but for the block in the middle of the model, which stays the base's."""
    blocks_of = [match.group(0) for name in expected.updates if (match := re.search(r"\.\d+\.", name))]
    chosen = blocks_of[len(blocks_of) // 2] if blocks_of else ""

    def how(update: Update, name: str, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        if chosen in name and not isinstance(update, Replaced):
            return update.base_rows(start, stop, torch.float32).to(dtype)
        return once_rounded(update, name, start, stop, dtype)

    return how


@dataclass(frozen=True)
class Measured:
    """The distances of one run."""

    noise: Measure
    ceiling: Measure
    error: Measure
    effect: Measure
    recovery: float | None
    identical: bool
    """True when the merged model gave the oracle's answers bit for bit."""
    from_oracle: float | None
    """Mean of d(M, O), where that is what decides."""


def judge_outputs(
    arms: Arms,
    merged: Tensor,
    kind: str,
    batch: Batch,
    *,
    names: Sequence[str],
    confidence: float,
    seed: int,
    settled: bool = False,
) -> OutputsPart:
    """Distances of all arms from R, and what follows from them. `merged` covers the first documents of `batch`.

    `settled`: the weights are known to be the oracle's, and the answers must be as well.
    """
    part = OutputsPart()
    count = int(merged.shape[0])
    if merged.shape[1:] != arms.reference.shape[1:]:
        got, wanted = tuple(merged.shape[1:]), tuple(arms.reference.shape[1:])
        text = f"the merged model answers with shape {got}, expected {wanted}"
        part.findings.append(fault("outputs", "", text))
        return part
    if not bool(torch.isfinite(merged).all()):
        part.findings.append(fault("outputs", "", "the merged model's answers are not finite"))
        return part
    raw = {
        "noise": distances(kind, arms.reference, arms.oracle, batch.mask),
        "effect": distances(kind, arms.reference, arms.base, batch.mask),
        "error": distances(kind, arms.reference[:count], merged, batch.mask[:count]),
    }
    if arms.ceiling is not None:
        raw["ceiling"] = distances(kind, arms.reference, arms.ceiling, batch.mask)

    def measured(name: str) -> Measure:
        found = raw[name]
        return measure(found["mean"], found["each"], found["agree"], confidence=confidence, seed=seed)

    noise = measured("noise")
    found = Measured(
        noise,
        measured("ceiling") if arms.ceiling is not None else noise,
        measured("error"),
        measured("effect"),
        _recovery(arms, merged, batch.mask, count),
        bool(torch.equal(merged, arms.oracle[:count])),
        _from_oracle(arms, merged, kind, batch) if settled else None,
    )
    part.findings += _rule(found, kind)
    part.evidence = {
        "kind": str(kind),
        "metric": metric(kind),
        "documents": len(batch),
        "documents_merged": count,
        "tokens": int(batch.mask.sum()),
        "confidence": confidence,
        "noise": found.noise.as_json(),
        "ceiling": found.ceiling.as_json(),
        "error": found.error.as_json(),
        "effect": found.effect.as_json(),
        "recovery": found.recovery,
        "identical_to_oracle": found.identical,
        "histogram": histogram({name: raw[name]["each"] for name in ("noise", "error", "effect")}),
        "per_document": [
            {"name": name, "error": _g(error), "noise": _g(n), "effect": _g(e)}
            for name, error, n, e in zip(
                names,
                raw["error"]["mean"].tolist(),
                raw["noise"]["mean"].tolist(),
                raw["effect"]["mean"].tolist(),
                strict=False,
            )
        ],
    }
    part.evidence |= _extras(kind, arms, merged, count)
    return part


def metric(kind: str) -> str:
    """What the distance of a kind is, in words."""
    if kind == "embedding":
        return "squared distance between embeddings of norm 1"
    if kind in CLASSES:
        return "mean squared difference of logits"
    return "KL divergence from base + adapter, nats per position"


def _g(value: float) -> float:
    return float(f"{value:.4g}")


def _rule(found: Measured, kind: str) -> Iterator[Finding]:
    """The verdict of the part; the bounds are those of the bootstrap, no constant enters."""
    what = "KL" if metric(kind).startswith("KL") else "distance"
    limit = max(found.noise.upper, found.ceiling.upper)
    distance = found.error.mean if found.from_oracle is None else found.from_oracle
    if not found.identical and distance > limit:
        times = distance / limit if limit else float("inf")
        text = (
            f"the merged model's answers are {times:.3g} times as far from base + adapter as rounding allows "
            f"({what} {distance:.3g}, allowed {limit:.3g})"
        )
        yield fault("outputs", "", text)
    if found.effect.lower <= found.noise.upper:
        text = (
            f"the adapter's effect ({what} {found.effect.mean:.3g}) is not above the rounding noise "
            f"({found.noise.mean:.3g}): outputs cannot tell a good merge from none; probes of the adapter's own "
            "domain (--probes), more of them (--probe-tokens) or a wider dtype would decide it"
        )
        yield undecided("outputs", "", text)


def _from_oracle(arms: Arms, merged: Tensor, kind: str, batch: Batch) -> float:
    count = len(merged)
    return float(distances(kind, arms.oracle[:count], merged, batch.mask[:count])["mean"].mean())


def _recovery(arms: Arms, merged: Tensor, mask: Tensor, count: int) -> float | None:
    """<M - B, R - B> / |R - B|^2 over real positions: 1 when the whole effect is there."""
    along = size = 0.0
    # one document at a time: all logits in fp64 would be the largest thing in memory
    for at in range(count):
        base = arms.base[at].double()
        effect, got = arms.reference[at].double() - base, merged[at].double() - base
        if arms.reference.ndim == 3:
            real = mask[at].bool()
            # a constant added to all logits changes nothing
            effect, got = (x[real] - x[real].mean(-1, keepdim=True) for x in (effect, got))
        along += float((effect * got).sum())
        size += float(effect.square().sum())
    return _g(along / size) if size > 0 else None


def _extras(kind: str, arms: Arms, merged: Tensor, count: int) -> dict[str, Any]:
    """Figures of one kind alone."""
    reference = arms.reference[:count]
    if kind in CLASSES:
        flips = int((merged.argmax(-1) != reference.argmax(-1)).sum())
        return {
            "label_flips": flips,
            "label_flips_base": int((arms.base.argmax(-1) != arms.reference.argmax(-1)).sum()),
        }
    if kind == "embedding":
        return {
            "neighbour_overlap": _g(_neighbours(reference, merged)),
            "similarity_shift": _g(_shift(reference, merged)),
        }
    return {}


def _neighbours(reference: Tensor, merged: Tensor, top: int = 3) -> float:
    """Mean share of each document's nearest `top` documents that both models name."""
    if len(reference) < 3:
        return 1.0
    top = min(top, len(reference) - 1)
    chosen = []
    for vectors in (reference, merged):
        similar = vectors.double() @ vectors.double().T
        similar.fill_diagonal_(-torch.inf)
        chosen.append(similar.topk(top, dim=-1).indices)
    same = (chosen[0][:, :, None] == chosen[1][:, None, :]).any(-1)
    return float(same.double().mean())


def _shift(reference: Tensor, merged: Tensor) -> float:
    """Largest change of a cosine similarity between two documents."""
    left, right = reference.double(), merged.double()
    return float((left @ left.T - right @ right.T).abs().max())
