"""What a model answers to a batch of probes, the same code in every arm.

One batch shape, one attention implementation, fp32: arms then differ by their weights alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BATCH_TOKENS = 1024
"""Tokens of one forward pass; bounds the memory of the activations and of the logits kept at once."""


@dataclass(frozen=True)
class Batch:
    """Documents of one padded length."""

    ids: Tensor
    """(documents, length) int64."""
    mask: Tensor
    """(documents, length) int64, 1 where a token is real."""

    def __len__(self) -> int:
        return int(self.ids.shape[0])

    def part(self, start: int, stop: int) -> Batch:
        """Documents [start, stop)."""
        return Batch(self.ids[start:stop], self.mask[start:stop])

    def parts(self) -> Iterator[Batch]:
        """Pieces that are each run in one pass."""
        step = max(1, BATCH_TOKENS // max(1, int(self.ids.shape[1])))
        for start in range(0, len(self), step):
            yield self.part(start, start + step)


LANGUAGE = ("causal-lm", "masked-lm", "seq2seq-lm", "image-text-to-text")
"""Kinds that answer with a distribution over a vocabulary at each position."""


def answer(
    model: Any,
    kind: str,
    batch: Batch,
    device: torch.device,
    tail: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """What `model` says to one piece, fp32, on the CPU.

    Language models and token classifiers: (documents, length, classes) logits. Classifiers: (documents, classes).
    Question answering: (documents, length, 2). Embedding models: (documents, width), through
    `tail` or mean-pooled and of norm 1; encoder-decoders read the document and are taught it again as the answer.
    """
    inputs: dict[str, Tensor] = {"input_ids": batch.ids.to(device), "attention_mask": batch.mask.to(device)}
    if kind == "seq2seq-lm":
        inputs["decoder_input_ids"] = batch.ids.to(device)
        inputs["decoder_attention_mask"] = batch.mask.to(device)
    with torch.no_grad():
        output = model(**inputs)
    if kind == "question-answering":
        return torch.stack((output.start_logits, output.end_logits), -1).float().cpu()
    if kind == "embedding":
        if tail is not None:
            return tail(output.last_hidden_state.float().cpu(), batch.mask).float()
        return _pooled(output, batch.mask)
    return _logits(output).float().cpu()


def _logits(output: Any) -> Tensor:
    logits = output.logits if hasattr(output, "logits") else output[0]
    assert isinstance(logits, Tensor)
    return logits


def _pooled(output: Any, mask: Tensor) -> Tensor:
    hidden = output.last_hidden_state.float().cpu()  # (documents, length, width)
    weights = mask[..., None].to(hidden.dtype)
    mean = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)
    return torch.nn.functional.normalize(mean, dim=-1)


def greedy(model: Any, batch: Batch, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Greedy continuations of unpadded prompts: ids (documents, length), and the logit gap of first to second.

    Plain argmax over a growing cache, so that no sampling setting of a generation config plays a part.
    """
    ids = batch.ids.to(device)
    mask = batch.mask.to(device)
    chosen: list[Tensor] = []
    gaps: list[Tensor] = []
    past: Any = None
    step = ids
    with torch.no_grad():
        for _ in range(length):
            inputs: dict[str, Any] = {"input_ids": step, "attention_mask": mask, "use_cache": True}
            if past is not None:
                inputs["past_key_values"] = past
            output = model(**inputs)
            top = _logits(output)[:, -1].float().topk(2, dim=-1)
            chosen.append(top.indices[:, 0].cpu())
            gaps.append((top.values[:, 0] - top.values[:, 1]).cpu())
            past = getattr(output, "past_key_values", None)
            step = top.indices[:, :1]
            mask = torch.cat((mask, torch.ones_like(step)), 1)
            if past is None:
                ids = torch.cat((ids, step), 1)
                step = ids
    return torch.stack(chosen, 1), torch.stack(gaps, 1)


def taught(model: Any, prompts: Batch, continuation: Tensor, device: torch.device) -> Tensor:
    """The model's own next-token choice at every place of a given continuation: (documents, length)."""
    ids = torch.cat((prompts.ids, continuation), 1).to(device)
    with torch.no_grad():
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids))
    start = prompts.ids.shape[1] - 1
    return _logits(output)[:, start:-1].float().argmax(-1).cpu()


def distances(kind: str, reference: Tensor, other: Tensor, mask: Tensor) -> Mapping[str, Tensor]:
    """How far `other` answers from `reference`, per document, fp64.

    `mean` (documents,): KL(reference || other) in nats averaged over tokens, for kinds with a vocabulary or
    token classes; else the squared distance of logits or embeddings. `each`: all single values, flat. `agree`
    (documents,): part of the positions with the same first choice (for embeddings: cosine similarity).
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
    if kind == "classifier":
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
    """KL(left || right) over the last dimension of logits, fp64, a few positions at a time: vocabularies are large."""
    rows, columns = left.reshape(-1, left.shape[-1]), right.reshape(-1, right.shape[-1])
    found = []
    for start in range(0, rows.shape[0], 64):
        log_p = rows[start : start + 64].double().log_softmax(-1)
        log_q = columns[start : start + 64].double().log_softmax(-1)
        found.append((log_p.exp() * (log_p - log_q)).sum(-1).clamp(min=0))
    return torch.cat(found).reshape(left.shape[:-1])


def _same_choice(left: Tensor, right: Tensor) -> Tensor:
    return (left.argmax(-1) == right.argmax(-1)).double()
