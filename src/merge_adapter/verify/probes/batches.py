"""Probe texts as token ids: one batch of equal length that every arm reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from merge_adapter.verify.probes import Probe
from merge_adapter.verify.probes.batch import Batch

SHORTEST = 16
"""Tokens of a document below which a language model has too little context to show an adapter's effect."""

FEWEST = 4
"""Documents that are read whatever the budget: bounds on a mean over one document are that document."""

PROMPT = 16
"""Length of the prompts that are continued greedily, in tokens."""


@dataclass(frozen=True)
class Probes:
    """What the arms read, and what it was made from."""

    batch: Batch
    names: tuple[str, ...]
    source: str
    """`text` or `random token ids`."""
    templated: int = 0
    """How many documents went through the chat template."""

    @property
    def tokens(self) -> int:
        """Real tokens, padding left out."""
        return int(self.batch.mask.sum())


def tokenized(
    probes: tuple[Probe, ...], tokenizer: Any, *, budget: int, vocabulary: int, limit: int
) -> Probes:
    """As many documents as `budget` tokens allow, and FEWEST at least.

    They are cut to one length of at most `limit`, and padded on the right. Ids beyond `vocabulary` (a tokenizer
    larger than its model) are folded back into it.
    """
    length = max(1, min(limit, max(SHORTEST, budget // len(probes))))
    count = min(len(probes), max(FEWEST, budget // length))
    rows: list[list[int]] = []
    templated = 0
    for probe in probes[:count]:
        ids, through = _ids(probe, tokenizer)
        templated += through
        rows.append([token % vocabulary for token in ids[:length]] or [0])
    width = max(map(len, rows))
    pad = tokenizer.pad_token_id if isinstance(getattr(tokenizer, "pad_token_id", None), int) else 0
    padded = torch.full((count, width), pad % vocabulary, dtype=torch.int64)
    mask = torch.zeros((count, width), dtype=torch.int64)
    for at, row in enumerate(rows):
        padded[at, : len(row)] = torch.tensor(row)
        mask[at, : len(row)] = 1
    return Probes(Batch(padded, mask), tuple(probe.name for probe in probes[:count]), "text", templated)


def _ids(probe: Probe, tokenizer: Any) -> tuple[list[int], bool]:
    if probe.messages and getattr(tokenizer, "chat_template", None):
        try:
            text = tokenizer.apply_chat_template([dict(turn) for turn in probe.messages], tokenize=False)
        except Exception:  # noqa: BLE001 - a template may refuse a role; the plain form then serves
            text = ""
        if text:
            return list(map(int, tokenizer(text, add_special_tokens=False)["input_ids"])), True
    return list(map(int, tokenizer(probe.plain())["input_ids"])), False


def random_ids(*, budget: int, vocabulary: int, limit: int, seed: int) -> Probes:
    """Seeded random token ids, for a base without a tokenizer."""
    length = max(1, min(limit, SHORTEST))
    count = max(FEWEST, budget // length)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocabulary, (count, length), generator=generator)
    names = tuple(f"random {at}" for at in range(count))
    return Probes(Batch(ids, torch.ones_like(ids)), names, "random token ids")


def vocabulary(model: Any) -> int | None:
    """Rows of the model's input embeddings; None for a model that takes no token ids."""
    try:
        return int(model.get_input_embeddings().weight.shape[0])
    except (AttributeError, NotImplementedError):
        return None


def positions(config: Any) -> int:
    """The longest document, in tokens, that the model has positions for."""
    for source in (config, getattr(config, "text_config", None)):
        for name in ("max_position_embeddings", "n_positions", "max_sequence_length"):
            value = getattr(source, name, None)
            if isinstance(value, int) and value > 0:
                # RoBERTa's kind spends the padding id and one more on an offset
                return max(1, value - 2)
    return 2048


def prompts(batch: Batch, count: int, *, longest: int = PROMPT) -> Batch | None:
    """The beginnings of the first documents that are long enough, all of one length, unpadded."""
    length = min(PROMPT, longest, int(batch.ids.shape[1]))
    whole = [at for at in range(len(batch)) if int(batch.mask[at, :length].sum()) == length][:count]
    return Batch(batch.ids[whole, :length], batch.mask[whole, :length]) if whole else None
