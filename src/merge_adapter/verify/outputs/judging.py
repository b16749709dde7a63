"""The outputs part: does the merged model answer as base + adapter does?

Five arms read the same token ids in fp32: R, B, O and O+ in this process (`reference`), and M, the merged folder, in a
fresh one without PEFT (`separate`).

With d the distance from R: noise N = d(O), its ceiling C = d(O+), error E = d(M), effect S = d(B). The part passes
when E is within C's upper confidence bound and S's lower bound is above N's upper one. It fails when E's lower bound is
above C's upper one, and leaves open what lies between. Where the weights part has left M no room to differ from O, O+
does not run, M reads the first round of documents, and it is d(M, O) that must be within N's bound. When the effect is
not above the noise no comparison of outputs could tell a good merge from none, and the part leaves it open.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from merge_adapter.verify.findings import Finding, fault, undecided
from merge_adapter.verify.memory.kept import Answers
from merge_adapter.verify.outputs.answers import CLASSES
from merge_adapter.verify.outputs.distances import distances
from merge_adapter.verify.outputs.reading import Distances, Reading, joined, read_whole
from merge_adapter.verify.outputs.statistics import Measure, histogram, measure
from merge_adapter.verify.probes.batch import Batch


@dataclass
class Arms:
    """The answers of arms that are small enough to stay in memory, documents in the first dimension."""

    reference: Tensor
    base: Tensor
    oracle: Tensor
    ceiling: Tensor | None
    greedy: tuple[Batch, Tensor, Tensor] | None = None
    """Prompts, R's continuations and the gap between R's first and second choice."""
    base_written: Tensor | None = None
    """The base's own continuations, to show what the adapter changes."""

    @property
    def largest_change(self) -> float:
        """Of any number in an answer, from R to O."""
        pairs = zip(self.oracle, self.reference, strict=True)
        return max(float((oracle - reference).abs().max()) for oracle, reference in pairs)


@dataclass
class OutputsPart:
    """What the outputs part found."""

    findings: list[Finding] = field(default_factory=list)
    evidence: dict[str, Any] = field(default_factory=dict)


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
    arms: Arms | Reading,
    merged: Answers,
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
    reading = arms if isinstance(arms, Reading) else read_whole(arms, kind, batch)
    part = OutputsPart()
    if merged.shape != reading.reference.shape:
        text = f"the merged model answers with shape {merged.shape}, expected {reading.reference.shape}"
        part.findings.append(fault("outputs", "", text))
        return part
    if not all(bool(torch.isfinite(document).all()) for document in merged):
        part.findings.append(fault("outputs", "", "the merged model's answers are not finite"))
        return part
    if not _comparable(reading):
        text = "base + adapter, the base or the rounded oracle gives answers that are not finite: no distance is known"
        part.findings.append(undecided("outputs", "", text))
        return part
    error = _errors(reading.reference, merged, kind, batch)
    found = _measured(reading, merged, error, kind, confidence=confidence, seed=seed, settled=settled)
    part.findings += _rule(found, kind)
    part.evidence = {
        "kind": str(kind),
        "metric": metric(kind),
        "documents": len(reading.batch),
        "documents_merged": len(merged),
        "tokens": int(reading.batch.mask.sum()),
        "confidence": confidence,
        "noise": found.noise.as_json(),
        "ceiling": found.ceiling.as_json(),
        "error": found.error.as_json(),
        "effect": found.effect.as_json(),
        "recovery": found.recovery,
        "identical_to_oracle": found.identical,
        "histogram": histogram(
            {"noise": reading.noise["each"], "error": error["each"], "effect": reading.effect["each"]}
        ),
        "per_document": _documents(names, error, reading),
    }
    part.evidence |= _extras(kind, reading, merged)
    return part


def _comparable(reading: Reading) -> bool:
    """Whether every distance is a number: M reads the first documents only, and nothing exceeds what is not one."""
    found = (reading.noise, reading.effect, *((reading.ceiling,) if reading.ceiling is not None else ()))
    return all(bool(torch.isfinite(one["mean"]).all()) for one in found)


def _errors(truth: Answers, merged: Answers, kind: str, batch: Batch) -> Distances:
    """The merged model's distances from `truth`, a document at a time: all logits at once would be large."""
    return joined(
        [
            distances(kind, right, got, mask)
            for right, got, mask in zip(truth, merged, batch.mask.unsqueeze(1), strict=False)
        ]
    )


def _measured(
    reading: Reading,
    merged: Answers,
    error: Distances,
    kind: str,
    *,
    confidence: float,
    seed: int,
    settled: bool,
) -> Measured:
    def summed(found: Distances) -> Measure:
        return measure(found["mean"], found["each"], found["agree"], confidence=confidence, seed=seed)

    noise = summed(reading.noise)
    from_oracle = None
    if settled:
        from_oracle = float(_errors(reading.oracle, merged, kind, reading.batch)["mean"].mean())
    return Measured(
        noise,
        summed(reading.ceiling) if reading.ceiling is not None else noise,
        summed(error),
        summed(reading.effect),
        _recovery(reading, merged),
        all(torch.equal(*pair) for pair in zip(merged, reading.oracle, strict=False)),
        from_oracle,
    )


def _documents(names: Sequence[str], error: Distances, reading: Reading) -> list[dict[str, Any]]:
    rows = zip(
        names,
        error["mean"].tolist(),
        reading.noise["mean"].tolist(),
        reading.effect["mean"].tolist(),
        strict=False,
    )
    return [
        {"name": name, "error": _g(error), "noise": _g(noise), "effect": _g(effect)}
        for name, error, noise, effect in rows
    ]


def metric(kind: str) -> str:
    """What the distance of a kind is, in words."""
    if kind == "embedding":
        return "squared distance between embeddings of norm 1"
    if kind in CLASSES:
        return "mean squared difference of logits"
    if kind == "other":
        return "mean squared difference of all outputs"
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
        if found.from_oracle is not None or found.error.lower > limit:
            yield fault("outputs", "", text)
        else:
            text += f", but a few documents account for it (lower bound {found.error.lower:.3g}): "
            yield undecided("outputs", "", text + "more of them (--probe-tokens, --probes) would decide it")
    if found.effect.lower <= found.noise.upper:
        text = (
            f"the adapter's effect ({what} {found.effect.mean:.3g}) is not above the rounding noise "
            f"({found.noise.mean:.3g}): outputs cannot tell a good merge from none; probes of the adapter's own "
            "domain (--probes), more of them (--probe-tokens) or a wider dtype would decide it"
        )
        yield undecided("outputs", "", text)


def _recovery(reading: Reading, merged: Answers) -> float | None:
    """<M - B, R - B> / |R - B|^2 over real positions: 1 when the whole effect is there."""
    along = size = 0.0
    # one document at a time: all logits in fp64 would be the largest thing in memory
    documents = zip(reading.reference, reading.base, merged, reading.batch.mask, strict=False)
    for truth, plain, answers, mask in documents:
        base = plain.double()
        effect, got = truth.double() - base, answers.double() - base
        if effect.ndim == 3:
            real = mask[None].bool()
            # a constant added to all logits changes nothing
            effect, got = (x[real] - x[real].mean(-1, keepdim=True) for x in (effect, got))
        along += float((effect * got).sum())
        size += float(effect.square().sum())
    return _g(along / size) if size > 0 else None


def _extras(kind: str, reading: Reading, merged: Answers) -> dict[str, Any]:
    """Figures of one kind alone."""
    if kind not in (*CLASSES, "embedding"):
        return {}
    answers = merged.whole()
    reference = reading.reference.whole()[: len(answers)]
    if kind in CLASSES:
        flips = int((answers.argmax(-1) != reference.argmax(-1)).sum())
        return {"label_flips": flips, "label_flips_base": reading.flips}
    return {
        "neighbour_overlap": _g(_neighbours(reference, answers)),
        "similarity_shift": _g(_shift(reference, answers)),
    }


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
