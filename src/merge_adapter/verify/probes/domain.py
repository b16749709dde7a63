"""Documents of the data sets that an adapter's card names, as the gate gets them. The gate itself fetches nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from merge_adapter.verify.probes import Probe


@dataclass(frozen=True)
class Dataset:
    """One data set of a card, and what was taken from it: public text, written by strangers."""

    id: str
    """As the card names it."""
    revision: str | None = None
    """The commit that was read, 40 hex digits; None when none could be."""
    file: str = ""
    """The one file that was read; "" when there was none."""
    text: str = ""
    """Which columns made the documents; "" when nothing was taken."""
    probes: tuple[Probe, ...] = ()
    bytes_read: int = 0
    problem: str = ""
    """Why nothing was taken; "" when something was."""

    def as_json(self) -> dict[str, Any]:
        """For merge_report.json: where the documents came from, none of their text."""
        entry: dict[str, Any] = {
            "id": self.id,
            "revision": self.revision,
            "documents": len(self.probes),
            "bytes_read": self.bytes_read,
        }
        told = {"file": self.file, "text": self.text, "problem": self.problem}
        return entry | {name: value for name, value in told.items() if value}
