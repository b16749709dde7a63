"""Greedy text of reference and merged model side by side; a divergence is explained, or it is a finding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from merge_adapter.verify.findings import Finding, warning
from merge_adapter.verify.outputs.judging import Arms
from merge_adapter.verify.outputs.reading import Written
from merge_adapter.verify.outputs.separate import Merged


def judge_greedy(
    arms: Arms, merged: Merged, tokenizer: Any, *, shown: Sequence[str] = ()
) -> tuple[list[Finding], dict[str, Any]]:
    """`judge_written` of arms whose answers are in memory."""
    assert arms.greedy is not None
    prompts, text, gaps = arms.greedy
    written = Written(prompts, text, gaps, arms.base_written)
    return judge_written(written, arms.largest_change, merged, tokenizer, shown=shown)


def judge_written(
    reference: Written, largest_change: float, merged: Merged, tokenizer: Any, *, shown: Sequence[str] = ()
) -> tuple[list[Finding], dict[str, Any]]:
    """The rows for the report, and a finding for each divergence that rounding does not explain.

    `shown` are the prompts as a person reads them; without them the ids are decoded.

    Where the merged model chooses another token, the reference's logits of its first and second choice are compared
    with the `largest_change` of any logit that the once-rounded oracle showed on the probes: less than twice that is a
    coin's toss. What would come after the reference's end of text is not compared.
    """
    assert merged.choices is not None
    continuation, noise = reference.text, 2 * largest_change
    written = merged.written if merged.written is not None else continuation
    rows: list[dict[str, Any]] = []
    findings: list[Finding] = []
    equal = 0
    for at in range(len(reference.prompts)):
        length = _length(tokenizer, continuation[at].tolist())
        differs = (merged.choices[at, :length] != continuation[at, :length]).nonzero().flatten().tolist()
        equal += not differs
        row: dict[str, Any] = {
            "prompt": shown[at] if shown else _text(tokenizer, reference.prompts.ids[at]),
            "reference": _text(tokenizer, continuation[at]),
            "merged": _text(tokenizer, written[at]),
            "equal_tokens": differs[0] if differs else length,
        }
        if reference.base is not None:
            row["base"] = _text(tokenizer, reference.base[at])
        gap = float(reference.gaps[at, differs[0]]) if differs else math.nan
        if math.isfinite(gap) and math.isfinite(noise):  # what is not, the outputs part tells
            row |= {"gap": float(f"{gap:.4g}"), "noise": float(f"{noise:.4g}"), "explained": gap <= noise}
            if gap > noise:
                text = (
                    f"diverges after {differs[0]} tokens, where the reference prefers its own choice by {gap:.3g} "
                    f"logits, more than the rounding noise of {noise:.3g}"
                )
                findings.append(warning("greedy", f"continuation {at + 1}", text))
        rows.append(row)
    return findings, {"tokens": int(continuation.shape[1]), "equal": equal, "of": len(rows), "texts": rows}


def _text(tokenizer: Any, ids: Any) -> str:
    """Decoded up to the first end of text, special tokens left out; ids as numbers without a tokenizer."""
    numbers = list(map(int, ids))
    if tokenizer is None:
        return " ".join(map(str, numbers))
    return str(tokenizer.decode(numbers[: _length(tokenizer, numbers)], skip_special_tokens=True))


def _length(tokenizer: Any, ids: list[int]) -> int:
    """Up to the first end of text, which may also be what some decoders begin with."""
    end = None if tokenizer is None else tokenizer.eos_token_id
    return ids.index(end, 1) + 1 if end in ids[1:] else len(ids)
