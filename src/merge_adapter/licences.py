"""Which licence a merged model carries, from the licence fields of adapter and base.

A merged model is derived from both, so both licences bind it. This reads metadata, it gives no legal advice: where
two licences may not be combinable the answer is a refusal that a person can override with `--license`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from merge_adapter.errors import PolicyError

_UNSTATED = frozenset({"", "unknown", "none"})
_PERMISSIVE = frozenset(
    {
        "0bsd", "afl-3.0", "apache-2.0", "artistic-2.0", "bsd", "bsd-2-clause", "bsd-3-clause",
        "bsd-3-clause-clear", "bsl-1.0", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc0-1.0",
        "cdla-permissive-1.0", "cdla-permissive-2.0", "ecl-2.0", "isc", "mit", "ms-pl", "ncsa",
        "odc-by", "openmdw-1.0", "pddl", "postgresql", "unlicense", "wtfpl", "zlib",
    }
)  # fmt: skip
"""They ask for notices at most, so work under them may be given out under another licence that keeps these."""

_COMBINES: Mapping[frozenset[str], str] = {
    # GPL FAQ, "How are the various GNU licenses compatible with each other?"
    frozenset({"lgpl-3.0", "gpl-3.0"}): "gpl-3.0",
    frozenset({"lgpl-3.0", "agpl-3.0"}): "agpl-3.0",
    frozenset({"gpl-3.0", "agpl-3.0"}): "agpl-3.0",
    frozenset({"lgpl-2.1", "gpl-2.0"}): "gpl-2.0",
    # creativecommons.org, "Compatible licenses": BY-SA 4.0 may be adapted under GPL 3.0
    frozenset({"cc-by-sa-4.0", "gpl-3.0"}): "gpl-3.0",
    # creativecommons.org, FAQ, chart of licences that can be combined
    frozenset({"cc-by-nc-4.0", "cc-by-nc-sa-4.0"}): "cc-by-nc-sa-4.0",
    frozenset({"cc-by-nc-3.0", "cc-by-nc-sa-3.0"}): "cc-by-nc-sa-3.0",
}
"""Pairs of restrictive licences under one of which a work made from both may be given out."""


@dataclass(frozen=True)
class Licence:
    """The licence fields of a model card."""

    id: str
    """A licence id of the Hub in lower case, several joined by " and "; "" when the card states none."""
    name: str = ""
    """`license_name`, which tells apart the many that are called `other`."""
    link: str = ""

    @property
    def stated(self) -> bool:
        return self.id not in _UNSTATED

    @property
    def permissive(self) -> bool:
        return self.stated and all(part in _PERMISSIVE for part in self.id.split(" and "))

    @property
    def forbids_derivatives(self) -> bool:
        return "-nd-" in f"{self.id}-"

    def same_as(self, other: Licence) -> bool:
        """`other` without a name is no licence in particular, so two of them are not the same."""
        if self.id != other.id:
            return False
        return (
            self.id != "other"
            or bool(self.name and self.name == other.name)
            or bool(self.link and self.link == other.link)
        )

    def __str__(self) -> str:
        return f"{self.id} ({self.name})" if self.name else self.id or "none stated"


@dataclass(frozen=True)
class LicenceDecision:
    """What the merged model's card says, and why where that needs a word."""

    licence: Licence
    note: str = ""


def read_licence(card: Mapping[str, Any]) -> Licence:
    """The licence fields of card metadata; whatever is not text counts as not stated."""
    stated = card.get("license")
    ids = stated if isinstance(stated, list) else [stated]
    clean = sorted({one.strip().lower() for one in ids if isinstance(one, str)})
    return Licence(" and ".join(clean), _text(card.get("license_name")), _text(card.get("license_link")))


def decide_licence(adapter: Licence, base: Licence, *, given: str | None = None) -> LicenceDecision:
    """The licence of the merged model. PolicyError when the two conflict and none was `given`."""
    if given is not None:
        return LicenceDecision(
            Licence(given.strip().lower()),
            f"The licence {given} was given; the adapter states {adapter}, the base {base}.",
        )
    for role, licence in (("adapter", adapter), ("base", base)):
        if licence.forbids_derivatives:
            raise PolicyError(
                f"the licence of the {role}, {licence}, allows no derived works, which a merged model is",
                hint="Ask its owner. With their permission, name the licence of the merged model: --license ID",
            )
    if not base.stated:
        note = "" if adapter.stated else "Neither adapter nor base states a licence."
        return LicenceDecision(adapter, note or f"The base states no licence; {adapter} is the adapter's.")
    if not adapter.stated:
        return LicenceDecision(base, f"The adapter states no licence; {base} is the base's.")
    if adapter.same_as(base):
        return LicenceDecision(base)
    if adapter.permissive:
        return LicenceDecision(
            base, f"The base's licence {base} binds the whole; the adapter itself is {adapter}."
        )
    if base.permissive:
        return LicenceDecision(
            adapter, f"The adapter's licence {adapter} binds the whole; the base itself is {base}."
        )
    combined = _COMBINES.get(frozenset({adapter.id, base.id}))
    if combined is not None:
        return LicenceDecision(Licence(combined), f"{adapter} and {base} combine under {combined}.")
    raise PolicyError(
        f"the licences conflict: the adapter is {adapter}, the base {base}",
        hint="If a licence satisfies both, name it: --license ID. Otherwise the merged model may not be published.",
    )


def _text(value: object) -> str:
    return " ".join(value.split())[:200] if isinstance(value, str) else ""
