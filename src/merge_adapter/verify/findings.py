"""What the parts of the gate say, and the rule that turns it into a verdict."""

from __future__ import annotations

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
        return f"{self.subject}: {self.text}" if self.subject else self.text


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
