"""How far one arm answers from another."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from merge_adapter.verify.outputs.answers import CLASSES, LANGUAGE

WIDE = 1 << 21
"""Logits that are fp64 at a time: vocabularies are large."""


def distances(kind: str, reference: Tensor, other: Tensor, mask: Tensor) -> Mapping[str, Tensor]:
    """How far `other` answers from `reference`, per document, fp64.

    `mean` (documents,): KL(reference || other) in nats averaged over tokens, for kinds with a vocabulary or
    token classes; else the squared distance of logits, embeddings or all numbers. `each`: all single values, flat.
    `agree` (documents,): part of the positions with the same first choice; for embeddings, and for other classes,
    cosine similarity.
    """
    if kind in LANGUAGE or kind == "token-classifier":
        return _token_distances(reference, other, mask)
    left, right = reference.double(), other.double()
    if kind == "embedding":
        square = (left - right).square().sum(-1)
        return {
            "mean": square,
            "each": square,
            "agree": torch.nn.functional.cosine_similarity(left, right, dim=-1),
        }
    if kind == "other":
        square = (left - right).square().mean(-1)
        agree = torch.nn.functional.cosine_similarity(left, right, dim=-1)
        return {"mean": square, "each": square, "agree": agree}
    if kind in CLASSES:
        square = (left - right).square().mean(-1)
        return {"mean": square, "each": square, "agree": (left.argmax(-1) == right.argmax(-1)).double()}
    # question answering, (documents, length, 2): a distribution over positions for the start and one for the end
    left, right = left.transpose(1, 2), right.transpose(1, 2)
    hidden = (mask == 0)[:, None, :]
    left, right = left.masked_fill(hidden, -1e9), right.masked_fill(hidden, -1e9)
    each = _kl(left, right)
    return {"mean": each.mean(1), "each": each.flatten(), "agree": _same_choice(left, right).mean(1)}


def _token_distances(left: Tensor, right: Tensor, mask: Tensor) -> Mapping[str, Tensor]:
    each = _kl(left, right)  # (documents, length)
    real = mask.double()
    count = real.sum(1).clamp(min=1)
    agree = (_same_choice(left, right) * real).sum(1) / count
    return {"mean": (each * real).sum(1) / count, "each": each[mask.bool()], "agree": agree}


def _kl(left: Tensor, right: Tensor) -> Tensor:
    """KL(left || right) over the last dimension of logits, fp64, a few positions at a time."""
    rows, columns = left.reshape(-1, left.shape[-1]), right.reshape(-1, right.shape[-1])
    found = []
    step = max(1, WIDE // max(1, left.shape[-1]))
    for start in range(0, rows.shape[0], step):
        log_p = rows[start : start + step].double().log_softmax(-1)
        log_q = columns[start : start + step].double().log_softmax(-1)
        found.append((log_p.exp() * (log_p - log_q)).sum(-1).clamp(min=0))
    return torch.cat(found).reshape(left.shape[:-1])


def _same_choice(left: Tensor, right: Tensor) -> Tensor:
    return (left.argmax(-1) == right.argmax(-1)).double()
