"""What models are asked to continue: whole sentences, and the user's turn of a conversation where a template exists."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from merge_adapter.verify.probes import Probe
from merge_adapter.verify.probes.batch import Batch
from merge_adapter.verify.probes.batches import PROMPT, prompts, tokenized

LONGEST = 64
"""Tokens of a prompt; a longer first sentence or turn is passed over, never cut."""

_STOPS = "\u3002\uff01\uff1f"
"""Full stop, exclamation and question mark of scripts that put no space after them."""

_CLOSING = "[\"\u201d\u00bb\u2019')]*"

_SENTENCE = re.compile(
    rf"[^{_STOPS}]*[{_STOPS}]{_CLOSING}|.*?(?:[!?]|(?<!\d)[.]){_CLOSING}(?=\s|$)", re.DOTALL
)


@dataclass(frozen=True)
class Beginnings:
    """Prompts as the models read them and as a person does."""

    batch: Batch
    shown: tuple[str, ...]
    length: int = 0
    """Of the continuations, in tokens."""


def beginnings(
    probes: Sequence[Probe], tokenizer: Any, *, count: int, vocabulary: int, limit: int, encoder: bool
) -> Beginnings | None:
    """Up to `count` prompts from the first probes that give one, conversations and texts in turn.

    `limit` is the longest prompt in tokens that the model has room for. Padded on the left, for an `encoder` on the
    right. None when no probe begins with a sentence short enough.
    """
    templated = bool(getattr(tokenizer, "chat_template", None)) and not encoder
    chats = [probe for probe in probes if probe.messages] if templated else []
    texts = [probe for probe in probes if probe.text]
    rows: list[tuple[list[int], str]] = []
    queues = [iter(chats), iter(texts)]
    while len(rows) < count and queues:
        queue = queues.pop(0)
        for probe in queue:
            found = (
                _turn(probe, tokenizer) if probe.messages else _sentence(probe, tokenizer, encoder=encoder)
            )
            if found is not None and 1 <= len(found[0]) <= min(LONGEST, limit):
                rows.append(found)
                queues.append(queue)
                break
    if not rows:
        return None
    width = max(len(ids) for ids, _ in rows)
    pad = tokenizer.pad_token_id if isinstance(getattr(tokenizer, "pad_token_id", None), int) else 0
    ids = torch.full((len(rows), width), pad % vocabulary, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for at, (tokens, _) in enumerate(rows):
        real = slice(0, len(tokens)) if encoder else slice(width - len(tokens), width)
        ids[at, real] = torch.tensor([token % vocabulary for token in tokens])
        mask[at, real] = 1
    return Beginnings(Batch(ids, mask), tuple(shown for _, shown in rows))


def first_tokens(
    probes: tuple[Probe, ...], tokenizer: Any, *, count: int, vocabulary: int, limit: int
) -> Beginnings | None:
    """The first tokens of up to `count` of the probes, at most `limit`: for where none has a sentence short enough.

    They are shown decoded, so `probes` are those whose text may be.
    """
    if limit < 1:
        return None
    read = tokenized(probes, tokenizer, budget=PROMPT * len(probes), vocabulary=vocabulary, limit=limit)
    cut = prompts(read.batch, count, longest=limit)
    return Beginnings(cut, ()) if cut is not None else None


def spoken(batch: Batch, names: Sequence[str], count: int) -> Beginnings:
    """The first `count` sounds of `batch`, to be written down from the start."""
    heard = batch.part(0, count)
    return Beginnings(Batch(heard.ids[:, :0], heard.mask[:, :0], heard.media), tuple(names[:count]))


def of_one_length(found: Beginnings, count: int) -> Beginnings | None:
    """Up to `count` prompts that need no padding beside each other, of the length that most have, the longer of two.

    For models with something in front of the input, which padding would part from it. None when no two are alike.
    """
    lengths = found.batch.mask.sum(1).tolist()
    usual = max(set(lengths), key=lambda length: (lengths.count(length), length))
    rows = [at for at, length in enumerate(lengths) if length == usual][:count]
    if len(rows) < 2:
        return None
    ids = torch.stack([found.batch.ids[at][found.batch.mask[at].bool()] for at in rows])
    return Beginnings(Batch(ids, torch.ones_like(ids)), tuple(found.shown[at] for at in rows))


def first_sentence(text: str) -> str | None:
    """The first whole sentence of `text`; None when it has none, as code and tables do not."""
    match = _SENTENCE.match(text)
    return match.group(0).strip() if match and "\n" not in match.group(0).strip() else None


def _sentence(probe: Probe, tokenizer: Any, *, encoder: bool) -> tuple[list[int], str] | None:
    text = first_sentence(probe.text)
    if text is None:
        return None
    ids = list(map(int, tokenizer(text)["input_ids"]))
    ends = {tokenizer.eos_token_id, getattr(tokenizer, "sep_token_id", None)} - {None}
    # a tokenizer that closes every text: a decoder would have nothing left to say
    while not encoder and len(ids) > 1 and ids[-1] in ends:
        ids.pop()
    return ids, text


def _turn(probe: Probe, tokenizer: Any) -> tuple[list[int], str] | None:
    """The conversation up to its first turn of the user, and the template's beginning of an answer."""
    at = next((at for at, turn in enumerate(probe.messages) if turn["role"] == "user"), None)
    if at is None:
        return None
    turns = [dict(turn) for turn in probe.messages[: at + 1]]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except Exception:  # noqa: BLE001 - templates are code, and raise what they like
        return None
    return list(map(int, tokenizer(text, add_special_tokens=False)["input_ids"])), turns[-1]["content"]
