"""The weights of a model with a soft prompt in its vocabulary, row by row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from merge_adapter.verify.findings import Finding, fault, undecided
from merge_adapter.verify.models.storage import same_bytes
from merge_adapter.verify.rounding import half_ulp
from merge_adapter.verify.weights.mutants import Outcome

_ROWS = 4096
"""Rows looked at at a time: vocabularies are large."""
_FAULTS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "prompt left out: rows of zeros": torch.zeros_like,
    "order reversed": lambda prompt: prompt.flip(0),
    "twice as strong": lambda prompt: prompt * 2,
    "one token lost: its row is its neighbour's": lambda prompt: torch.cat(
        (prompt[:1], prompt[:1], prompt[2:])
    ),
}
"""Faults that are injected into the new input rows."""


def judge_rows(base: Any, merged: Any, prompt: Tensor, front: tuple[int, ...]) -> tuple[list[Finding], int]:
    """What is wrong with the tensors of either model, a tensor perhaps in several ways, and how many there are.

    `prompt` is (tokens, width) as the adapter holds it, `front` the ids of its tokens. Every row that the base has must
    be the base's, every new input row the prompt's, every new output row the mean of the others.
    """
    ours, theirs = base.state_dict(), merged.state_dict()
    table, head = _tables(merged)
    findings: list[Finding] = []
    names = sorted(set(ours) | set(theirs))
    for name in names:
        if name not in ours or name not in theirs:
            findings.append(fault("weights", name, "is in one of base and merged model alone"))
        elif name in (table, head, head.replace(".weight", ".bias")):
            if not _same(theirs[name], ours[name], front):
                findings.append(fault("weights", name, "differs from the base beside the prompt's rows"))
        elif theirs[name].shape != ours[name].shape or not same_bytes(
            theirs[name], ours[name].to(theirs[name].dtype)
        ):
            findings.append(fault("weights", name, "differs from the base"))
    if max(front) >= min(len(theirs[table]), len(theirs[head])):
        findings.append(fault("weights", table, "has no rows for the prompt's tokens"))
        return findings, len(names)
    rows = theirs[table][list(front)]
    if not _holds(rows, prompt, measured_scale(base.get_input_embeddings())):
        findings.append(fault("weights", table, "its new rows are not the prompt rounded once"))
    if not _are_means(theirs[head], front):
        text = "its new rows are not the mean of the others: nothing shows that they are never the likeliest"
        findings.append(undecided("weights", head, text))
    return findings, len(names)


def prompt_faults(prompt: Tensor, storage: torch.dtype) -> list[Outcome]:
    """Each fault put into the new input rows, and whether `judge_rows` would see it."""
    return [
        Outcome(name, tried=1, weights=int(not _holds(spoil(prompt).to(storage), prompt)))
        for name, spoil in _FAULTS.items()
        if not torch.equal(spoil(prompt), prompt)  # the order of a single token cannot be wrong
    ]


def _tables(model: Any) -> tuple[str, str]:
    """Names of the input embeddings and of the head."""
    paths = {id(module): path for path, module in model.named_modules()}
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    return f"{paths[id(table)]}.weight", f"{paths[id(head)]}.weight"


def _same(merged: Tensor, base: Tensor, front: tuple[int, ...]) -> bool:
    """Whether the rows that are not new are the base's, all of them and no others."""
    if len(merged) != max(len(base), max(front) + 1) or len(set(range(len(base), len(merged))) - set(front)):
        return False
    for start in range(0, len(base), _ROWS):
        stop = min(start + _ROWS, len(base))
        kept = [row for row in range(start, stop) if row not in front]
        if not same_bytes(merged[kept].contiguous(), base[kept].to(merged.dtype).contiguous()):
            return False
    return True


def measured_scale(table: Any) -> float:
    """What an embedding makes of its rows: 1 for a plain one, more for Gemma's, asked of the module itself."""
    row = int(table.weight[:_ROWS].detach().float().norm(dim=1).argmax())
    with torch.no_grad():
        stored = table.weight[row].detach().double()
        given = table(torch.tensor([row], device=table.weight.device))[0].double()
    return float((given @ stored) / (stored @ stored))


def _holds(rows: Tensor, prompt: Tensor, scale: float = 1.0) -> bool:
    """Whether `rows` are the prompt, divided by the embedding's own factor, rounded once."""
    if rows.shape != prompt.shape:
        return False
    if scale == 1:
        return same_bytes(rows.contiguous(), prompt.to(rows.dtype).contiguous())
    # the factor is itself rounded when a model computes in 16 bit
    wanted = prompt.double() / scale
    slack = 1.01 * half_ulp(wanted, rows.dtype) + 2 * half_ulp(torch.ones(1), rows.dtype) * wanted.abs()
    return bool(((rows.double() - wanted).abs() <= slack).all())


def _are_means(head: Tensor, front: tuple[int, ...]) -> bool:
    """Whether each new row is the mean of the rows of all tokens before them, rounded to the head's dtype."""
    total = torch.zeros(head.shape[1], dtype=torch.float64)
    mass = torch.zeros(head.shape[1], dtype=torch.float64)
    for start in range(0, front[0], _ROWS):
        rows = head[start : min(start + _ROWS, front[0])].double()
        total, mass = total + rows.sum(0), mass + rows.abs().sum(0)
    mean = total / front[0]
    slack = 1.01 * half_ulp(mean, head.dtype) + 2.0**-22 * mass / front[0]
    return all(bool(((head[row].double() - mean).abs() <= slack).all()) for row in front)
