"""The tokenizer of a model with a soft prompt: the prompt's tokens in front of everything, the rest as it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from merge_adapter.verify.findings import Finding, fault


def judge_tokens(plain: Mapping[str, Any], found: Mapping[str, Any], count: int) -> Iterator[Finding]:
    """Two surveys: `found` must give `count` new tokens and then what `plain` gives, for every text."""
    for name, surveyed in (("adapter or base", plain), ("merged repository", found)):
        if "error" in surveyed:
            yield fault("tokenizer", "", f"that of the {name} cannot be used: {surveyed['error']}")
            return
    front = found["encoded"][0][:count]
    if len(set(front)) != count or set(front) & {number for ids in plain["encoded"] for number in ids}:
        yield fault("tokenizer", "", f"does not put {count} new tokens in front of a text")
        return
    wrong = sum(
        theirs != [*front, *ours] for theirs, ours in zip(found["encoded"], plain["encoded"], strict=True)
    )
    if wrong:
        yield fault("tokenizer", "", f"encodes {wrong} of {len(plain['encoded'])} probes differently")
    if found["size"] != plain["size"] + count:
        yield fault("tokenizer", "", f"has {found['size']:,} tokens, expected {plain['size'] + count:,}")
    if found["special"] != plain["special"]:
        yield fault("tokenizer", "special tokens", f"are {found['special']}, expected {plain['special']}")


def judge_rendered(
    merged: Any, base: Any, plain: Mapping[str, Any], found: Mapping[str, Any]
) -> Iterator[Finding]:
    """Conversations get the tokens too, and decoding hides them. `merged` and `base` are the tokenizers themselves."""
    front = merged("")["input_ids"][: len(found["encoded"][0]) - len(plain["encoded"][0])]
    for theirs, ours in zip(found["rendered"], plain["rendered"], strict=True):
        if theirs is None or ours is None:
            continue
        ids = merged(theirs, add_special_tokens=False)["input_ids"]
        if list(ids) != [*front, *base(ours, add_special_tokens=False)["input_ids"]]:
            yield fault(
                "tokenizer", "chat template", "does not put the prompt's tokens before a conversation"
            )
            return
    for ids in found["encoded"]:
        if merged.decode(ids, skip_special_tokens=True) != base.decode(
            ids[len(front) :], skip_special_tokens=True
        ):
            yield fault("tokenizer", "", "shows the prompt's tokens in decoded text")
            return
