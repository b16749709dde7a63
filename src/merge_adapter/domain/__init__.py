"""A few documents of the data sets that an adapter's card names: the adapter's own domain, for the gate to ask about.

The card and the data sets are written by strangers. They are read as nobody, without any token: so private and gated
data never gets into a report, and no card can make our token read for its author. Only bounded pieces of plain files
are read, at the commit that is main's when the run begins. Whatever goes wrong is told, and is no fault of the merge.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from merge_adapter.domain.documents import columns_of, documents
from merge_adapter.domain.records import FORMATS, format_of, read_records
from merge_adapter.errors import HubError, MalformedError, MergeAdapterError, NotFoundError, PolicyError
from merge_adapter.packaging.metadata import named_datasets
from merge_adapter.types import Progress, Repository, Resolved
from merge_adapter.verify.probes.domain import Dataset
from merge_adapter.verify.settings import VerifySettings

if TYPE_CHECKING:
    from merge_adapter.hub import Hub

DOCUMENTS = 8
"""Documents of all data sets together."""

DATASETS = 3
"""Data sets that are read; a card may name hundreds."""

_LONGEST_PATH = 200
"""Characters; paths stand in reports."""
_TRIES = 3
"""Files of one data set that are tried, the likeliest first."""
_TRAINING, _HELD_OUT = (
    re.compile(r"(?<![a-z])train"),
    re.compile(r"(?<![a-z])(test|valid|val|eval|dev)(?![a-z])"),
)
_NO_DATA = re.compile(
    r"(^|/)(\.|readme|license|licence|requirements|dataset_infos|config|.*(metadata|schema)\.json)"
)


def with_domain(gate: VerifySettings, sources: Resolved, *, hub: Hub, progress: Progress) -> VerifySettings:
    """`gate` with the documents of the cards' data sets, unless it says not to look, or has the user's own."""
    if not gate.dataset_probes or not gate.outputs or gate.probes is not None or not named_datasets(sources):
        return gate
    with progress.task("Reading data sets that the card names", None):
        return replace(gate, domain=fetch_domain(sources, hub=hub))


def fetch_domain(sources: Resolved, *, hub: Hub) -> tuple[Dataset, ...]:
    """What can be had of the first `DATASETS` data sets that the cards name. Raises nothing that a data set causes."""
    named = named_datasets(sources)[:DATASETS]
    anybody = hub.anonymous()
    found: list[Dataset] = []
    for name in named:
        try:
            found.append(_fetch(name, DOCUMENTS // len(named), anybody))
        except HubError as error:
            # a Hub that does not answer does not answer for the others either
            found += [Dataset(left, problem=error.message) for left in named[len(found) :]]
            break
    return tuple(found)


def _fetch(name: str, count: int, hub: Hub) -> Dataset:
    """Raises HubError when the Hub does not answer."""
    try:
        repository = hub.open_dataset(name)
    except (NotFoundError, PolicyError):
        return Dataset(name, problem="it is not public, or not there")
    if repository.gated:
        return Dataset(name, problem="its readers must ask for access")
    revision = repository.origin.revision
    problem, spent = "none of its files is of a kind that is read", 0
    try:
        for path in candidates(repository):
            try:
                records = read_records(repository, path)
            except MalformedError as error:
                problem = f"{path}: {error.message}"
                continue
            spent += records.bytes_read
            columns = columns_of(records.rows[0])
            if columns is None:
                problem = f"{path}: no column of it holds text"
                continue
            found = tuple(documents(records.rows, columns, name=name, count=count))
            if found:
                return Dataset(name, revision, path, str(columns), found, spent)
            problem = f"{path}: its records hold no text"
    except HubError:
        raise
    except MergeAdapterError as error:
        problem = error.message
    return Dataset(name, revision, bytes_read=spent, problem=problem)


def candidates(repository: Repository) -> Iterator[str]:
    """The files to try: of a training split before others, easy formats before others, then by path. At most three."""
    ranked = sorted(
        (_split(path.lower()), list(FORMATS.values()).index(kind), path.count("/"), path)
        for path, size in repository.files.items()
        if size
        and len(path) <= _LONGEST_PATH
        and (kind := format_of(path))
        and not _NO_DATA.search(path.lower())
    )
    yield from (path for *_, path in ranked[:_TRIES])


def _split(path: str) -> int:
    if _TRAINING.search(path):
        return 0
    return 2 if _HELD_OUT.search(path) else 1
