"""Which adapters have no up-to-date merge, and what each would take: from configs and headers alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from enum import StrEnum

from merge_adapter.bot.jobs import JobRequest, Source
from merge_adapter.bot.runners.flavours import choose_flavour, estimate
from merge_adapter.bot.settings import BotSettings
from merge_adapter.errors import InputError, MergeAdapterError, RemoteError, StorageError
from merge_adapter.hub import Hub, HubRepository
from merge_adapter.hub.catalogue import adapter_folders
from merge_adapter.hub.jobs import hardware
from merge_adapter.plan import make_plan
from merge_adapter.publish import PublishSettings, find_published, prepare, repinned
from merge_adapter.publish.policy import inspect
from merge_adapter.publish.settings import Openness
from merge_adapter.resolve import SourceRequest, resolve
from merge_adapter.types import MergeSettings


class _RememberingHub(Hub):
    """A Hub that opens each repository once: thousands of adapters share a few bases."""

    def __init__(self, hub: Hub) -> None:
        self.__dict__.update(hub.__dict__)
        self._opened: dict[tuple[str, str | None, str], HubRepository] = {}

    def open(self, repo_id: str, *, revision: str | None = None, subfolder: str = "") -> HubRepository:
        key = (repo_id, revision, subfolder)
        found = self._opened.get(key)
        if found is None:
            found = self._opened.setdefault(
                key, super().open(repo_id, revision=revision, subfolder=subfolder)
            )
        return found


class Standing(StrEnum):
    """Where an adapter stands."""

    MERGED = "up to date"
    TO_DO = "to do"
    REFUSED = "refused"
    UNKNOWN = "unknown"
    """The Hub failed, or this machine's disk; look again."""


@dataclass(frozen=True)
class Candidate:
    """One adapter and what its merge would take."""

    repo_id: str
    standing: Standing
    note: str = ""
    """Why it is refused or unknown; where its merge is."""
    base: str = ""
    revision: str = ""
    subfolder: str = ""
    private: bool = True
    bytes_written: int = 0
    bytes_uploaded: int = 0
    """At most: what the Hub has already is not sent again."""
    memory_bytes: int = 0
    disk_bytes: int = 0
    bytes_read: int = 0
    hardware: str = ""
    """On Hugging Face Jobs, where the merge would run there."""
    dollars: float | None = None
    """About what it costs there."""
    observed: float = 0.0
    """When the Hub was asked for the revision, seconds since the epoch."""

    def request(self, *, batch: str) -> JobRequest:
        """The job that does it."""
        return JobRequest(
            adapter=self.repo_id,
            revision=self.revision,
            source=Source.BACKFILL,
            subfolder=self.subfolder,
            private=self.private,
            batch=batch,
            observed=self.observed,
        )


def survey(
    repo_ids: Iterable[str],
    hub: Hub,
    settings: BotSettings,
    *,
    threads: int = 8,
    told: Callable[[Candidate], None] = lambda _: None,
) -> tuple[Candidate, ...]:
    """Look at every adapter, several at a time; the result is in the order given. Failures are candidates too.

    A repository without an adapter at its root has a candidate for each folder that holds one, as pushes have.
    """

    remembering = _RememberingHub(hub)

    def look(repo_id: str) -> tuple[Candidate, ...]:
        candidates = _look(repo_id, remembering, settings)
        for candidate in candidates:
            told(candidate)
        return candidates

    with ThreadPoolExecutor(threads, thread_name_prefix="survey") as pool:
        return tuple(candidate for found in pool.map(look, repo_ids) for candidate in found)


def priced(candidates: Iterable[Candidate], hub: Hub, settings: BotSettings) -> tuple[Candidate, ...]:
    """The candidates with hardware and price where Hugging Face Jobs run them; one that fits on none is refused."""
    flavours = hardware(hub)

    def price(one: Candidate) -> Candidate:
        if one.standing is not Standing.TO_DO:
            return one
        disk = one.disk_bytes + one.bytes_read
        try:
            flavour = choose_flavour(flavours, settings.jobs_flavor, memory=one.memory_bytes, disk=disk)
        except InputError as error:
            return replace(one, standing=Standing.REFUSED, note=error.message)
        return replace(one, hardware=flavour.name, dollars=estimate(flavour, one.bytes_written))

    return tuple(map(price, candidates))


def _look(repo_id: str, hub: Hub, settings: BotSettings) -> tuple[Candidate, ...]:
    observed = time.time()
    try:
        head = hub.open(repo_id)
    except MergeAdapterError as error:
        return (_failed(repo_id, "", error),)
    folders = adapter_folders(head.files) or ("",)
    return tuple(_look_at(head.repo_id, head.revision, folder, observed, hub, settings) for folder in folders)


def _look_at(
    repo_id: str, revision: str, subfolder: str, observed: float, hub: Hub, settings: BotSettings
) -> Candidate:
    try:
        return _plan(repo_id, revision, subfolder, observed, hub, settings)
    except MergeAdapterError as error:
        return _failed(repo_id, subfolder, error)


def _failed(repo_id: str, subfolder: str, error: MergeAdapterError) -> Candidate:
    passing = isinstance(error, RemoteError | StorageError)  # the network or this disk, not the adapter
    standing = Standing.UNKNOWN if passing else Standing.REFUSED
    return Candidate(repo_id, standing, error.message, subfolder=subfolder)


def _plan(
    repo_id: str, revision: str, subfolder: str, observed: float, hub: Hub, settings: BotSettings
) -> Candidate:
    source = SourceRequest((f"{repo_id}@{revision}",), subfolder=subfolder, local_paths=False)
    sources = resolve(source, hub=hub)
    origin = sources.adapter.repository.origin
    read = (sources.adapter.repository, sources.base.repository)
    publishing = prepare(sources, MergeSettings(), PublishSettings(allow_base=settings.allow_base), hub=hub)
    sources = repinned(sources, publishing, hub=hub)
    published = find_published(sources, MergeSettings(), publishing, hub=hub)
    found = Candidate(
        repo_id,
        Standing.TO_DO,
        base=sources.base.repository.origin.repo_id or "",
        revision=origin.revision or "",
        subfolder=origin.subfolder,
        observed=observed,
        private=any(inspect("source", one)[0].openness is Openness.PRIVATE for one in read),
    )
    if published is not None:
        return replace(found, standing=Standing.MERGED, note=published.publication.url)
    plan = make_plan(sources, MergeSettings())
    return replace(
        found,
        bytes_written=plan.bytes_written,
        bytes_uploaded=plan.bytes_changed,
        memory_bytes=plan.memory_bytes,
        disk_bytes=plan.disk_bytes,
        bytes_read=plan.bytes_read,
    )
