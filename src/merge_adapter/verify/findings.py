"""What the parts of the gate say, and the rule that turns it into a verdict."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum

from merge_adapter.types import Verdict


class Weight(IntEnum):
    """How much a finding counts; larger decides over smaller."""

    NOTE = 0
    """Worth knowing; changes nothing."""
    WARNING = 1
    """Lawful, but a person should look."""
    UNDECIDED = 2
    """Something that must be shown could not be."""
    FAULT = 3
    """The merged model is not base + adapter."""


@dataclass(frozen=True)
class Finding:
    """One thing a part of the gate found."""

    weight: Weight
    part: str
    """files, weights, modules, outputs, greedy, tokenizer, config, mutants, adapter."""
    subject: str
    """The tensor, file or field concerned; "" for the whole."""
    text: str
    """A sentence fragment that reads on after `subject: `."""

    def __str__(self) -> str:
        return without_places(f"{self.subject}: {self.text}" if self.subject else self.text)


_PLACE = re.compile(r"(?<![\w/:.<])(?:/[^\s/'\"`:,;()<>]+){2,}")


def without_places(text: str) -> str:
    """`text` with absolute paths cut down to their last parts: libraries name whole ones, and reports are published."""
    return _PLACE.sub(lambda match: match.group().rpartition("/")[2], text)


def fault(part: str, subject: str, text: str) -> Finding:
    """A finding that fails the merge."""
    return Finding(Weight.FAULT, part, subject, text)


def undecided(part: str, subject: str, text: str) -> Finding:
    """A finding that leaves the answer open."""
    return Finding(Weight.UNDECIDED, part, subject, text)


def warning(part: str, subject: str, text: str) -> Finding:
    """A finding a person should look at."""
    return Finding(Weight.WARNING, part, subject, text)


def note(part: str, subject: str, text: str) -> Finding:
    """A finding worth knowing."""
    return Finding(Weight.NOTE, part, subject, text)


def verdict(findings: Iterable[Finding]) -> Verdict:
    """FAIL on any fault, else INCONCLUSIVE on anything left open, else PASS."""
    worst = max((finding.weight for finding in findings), default=Weight.NOTE)
    if worst is Weight.FAULT:
        return Verdict.FAIL
    return Verdict.INCONCLUSIVE if worst is Weight.UNDECIDED else Verdict.PASS


def reasons(findings: Iterable[Finding]) -> tuple[str, ...]:
    """The findings as sentences, the most telling first, equal ones told once with their number."""
    grouped: dict[tuple[Weight, str, str], list[str]] = {}
    for finding in findings:
        grouped.setdefault((finding.weight, finding.part, finding.text.split(" (")[0]), []).append(
            str(finding)
        )
    ordered = sorted(grouped.items(), key=lambda item: (-item[0][0], -len(item[1])))
    found = []
    for (weight, _, _), texts in ordered:
        more = f" (and {len(texts) - 1:,} more like it)" if len(texts) > 1 else ""
        prefix = {Weight.WARNING: "warning: ", Weight.NOTE: "note: "}.get(weight, "")
        found.append(f"{prefix}{texts[0]}{more}")
    if not any(weight >= Weight.UNDECIDED for (weight, _, _), _ in ordered):
        found.insert(
            0, "every tensor is base + adapter within the rounding of its dtype, and the outputs agree"
        )
    return tuple(found)
