"""A model with tokens in front of everything it reads, asked as if they were not there.

Base + soft prompt answers at more positions than it was given tokens, and the merged model over a larger vocabulary.
Seen through this, both answer as the base does: a position per token, a logit per token of the base.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class Answer:
    """What generation and comparison read of a model's output."""

    logits: Tensor
    past_key_values: Any = None


class Fronted:
    """Calls `model` with `front` before the input, and drops the positions of the prompt and the logits of `hidden`.

    With an empty `front`, `count` positions are dropped that the model has put in front by itself, as PEFT's model
    does; it is then asked without its cache, which would get the prompt again at every step.
    """

    def __init__(self, model: Any, *, front: Sequence[int], count: int, hidden: Sequence[int]) -> None:
        self._model = model
        self._front = torch.tensor(list(front), dtype=torch.int64)
        self._count = count
        self._hidden = tuple(hidden)
        self.mass = 0.0
        """The largest probability that the hidden tokens had together at a real position."""
        self.chosen = 0
        """Real positions at which a hidden token was the first choice."""

    def __call__(
        self,
        *,
        input_ids: Tensor,
        attention_mask: Tensor,
        past_key_values: Any = None,
        use_cache: bool = False,
    ) -> Answer:
        """Logits (documents, length, tokens that are not hidden)."""
        if not len(self._front):
            output = self._model(input_ids=input_ids, attention_mask=attention_mask)
            return Answer(self._shown(output.logits[:, self._count :]))
        rows = input_ids.shape[0]
        front = self._front.to(input_ids.device).expand(rows, -1)
        inputs: dict[str, Any] = {
            "input_ids": input_ids if past_key_values is not None else torch.cat((front, input_ids), 1),
            "attention_mask": torch.cat((torch.ones_like(front), attention_mask), 1),
        }
        if use_cache:
            inputs |= {"use_cache": True, "past_key_values": past_key_values}
        output = self._model(**inputs)
        logits = output.logits if past_key_values is not None else output.logits[:, len(self._front) :]
        real = attention_mask[:, -logits.shape[1] :].bool()
        self._measure(logits[real])
        return Answer(self._shown(logits), output.past_key_values if use_cache else None)

    def _measure(self, logits: Tensor) -> None:
        if not len(logits) or not self._hidden:
            return
        hidden = torch.tensor(self._hidden, device=logits.device)
        mass = logits.double().softmax(-1)[:, hidden].sum(-1)
        self.mass = max(self.mass, float(mass.max()))
        self.chosen += int(torch.isin(logits.argmax(-1), hidden).sum())

    def _shown(self, logits: Tensor) -> Tensor:
        shown = torch.ones(logits.shape[-1], dtype=torch.bool, device=logits.device)
        for token in self._hidden:
            if token < len(shown):
                shown[token] = False
        return logits[..., shown]
