"""Which documents a verification puts to the models, and what the report says of them.

The user's own come first, or those of the adapter's data sets; then the ones that ship with the package. Texts of data
sets are never shown: strangers wrote them, and reports are published.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from merge_adapter.types import Resolved
from merge_adapter.verify.findings import Finding, note
from merge_adapter.verify.probes import VERSION, Probe, from_file, shipped
from merge_adapter.verify.probes.batches import Probes
from merge_adapter.verify.repository.provenance import untried_domain
from merge_adapter.verify.settings import VerifySettings


@dataclass(frozen=True)
class Texts:
    """The documents of one verification."""

    asked: tuple[Probe, ...]
    """All of them, in their order."""
    shown: tuple[Probe, ...]
    """Those whose text may stand in a report: what is continued greedily."""


def texts_of(settings: VerifySettings) -> Texts:
    """Raises NotFoundError or MalformedError for a user's file that cannot be read."""
    own = from_file(settings.probes) if settings.probes is not None else ()
    domain = tuple(probe for dataset in settings.domain for probe in dataset.probes)
    return Texts((*own, *domain, *shipped()), (*own, *shipped()))


def probes_section(probes: Probes, settings: VerifySettings) -> dict[str, Any]:
    """The section `probes` of the report."""
    section = {
        "version": VERSION,
        "source": probes.source,
        "documents": len(probes.batch),
        "tokens": probes.tokens,
        "chat_templated": probes.templated,
        "own": settings.probes.name if settings.probes is not None else None,
    }
    return section | (
        {"datasets": [dataset.as_json() for dataset in settings.domain]} if settings.domain else {}
    )


def domain_findings(settings: VerifySettings, sources: Resolved) -> Iterator[Finding]:
    """What became of the data sets that the adapters' cards name. A user's own probes take their place."""
    if settings.probes is not None:
        return
    if not settings.domain:
        yield from untried_domain(sources)
    for dataset in settings.domain:
        if dataset.problem:
            text = f"the card names it as training data, and nothing was taken from it: {dataset.problem}"
        else:
            text = (
                f"{len(dataset.probes)} documents of it, the adapter's training data by its card, are among the "
                f"probes, from {dataset.file} at {str(dataset.revision)[:12]}"
            )
        yield note("outputs", dataset.id, text)
