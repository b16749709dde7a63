"""An adapter that did not change while its repository did is what it was when it was published.

A publication into the adapter's own repository is a commit there. By commits alone the adapter would be new then, and
be merged and published again, and again after that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from merge_adapter.errors import NotFoundError
from merge_adapter.hub import HubRepository, PullRequests
from merge_adapter.publish.identity import lane_of
from merge_adapter.publish.settings import PublishSettings
from merge_adapter.publish.standing import of_lane
from merge_adapter.publish.target import find_target
from merge_adapter.publish.whole import read_remote_report
from merge_adapter.report.document import REPORT_FILE
from merge_adapter.types import Adapter, Resolved

if TYPE_CHECKING:
    from merge_adapter.hub import Hub

_NOT_OURS = ".gitattributes"
"""The Hub writes into it by itself when large files are committed."""


def repinned(sources: Resolved, publishing: PublishSettings, *, hub: Hub) -> Resolved:
    """`sources` with each adapter at the commit it was published from, where its files are the same there and now.

    `publishing` comes from `prepare`. Files of merged models beside the adapter are none of its own.
    """
    target = publishing.target
    if target is None or find_target(target, hub=hub) is None:
        return sources
    for report in _published(sources, publishing, hub):
        adapters = tuple(_as_published(one, report, hub) for one in sources.adapters)
        if adapters != sources.adapters:
            own = sources.tokenizer is sources.adapter.repository
            tokenizer = adapters[0].repository if own else sources.tokenizer
            return replace(sources, adapters=adapters, tokenizer=tokenizer)
    return sources


def _published(sources: Resolved, publishing: PublishSettings, hub: Hub) -> Iterator[Mapping[str, Any]]:
    """The reports on main and in this account's open pull requests of the same lane."""
    target = publishing.target
    assert target is not None
    lane = lane_of(sources, target.path_in_repo)

    def read(ref: str) -> dict[str, Any] | None:
        return read_remote_report(hub.open(target.repo_id, revision=ref, subfolder=target.path_in_repo))

    if (report := read("main")) is not None:
        yield report
    for pull in of_lane(PullRequests(hub, target.repo_id), lane):
        if (report := read(pull.ref)) is not None:
            yield report


def _as_published(adapter: Adapter, report: Mapping[str, Any], hub: Hub) -> Adapter:
    """`adapter` at the commit that `report` names, if that holds the same files; else as it is."""
    now = adapter.repository
    if not isinstance(now, HubRepository):
        return adapter
    for entry in report.get("adapters") or [report["adapter"]]:
        named = (entry["id"], entry.get("subfolder", "")) == (now.repo_id, now.origin.subfolder)
        if not named or entry["revision"] in (None, now.revision):
            continue
        with suppress(NotFoundError):  # a history may be rewritten
            then = hub.open(now.repo_id, revision=entry["revision"], subfolder=now.origin.subfolder)
            if _own_files(then) == _own_files(now):
                return replace(adapter, repository=then)
    return adapter


def _own_files(repository: HubRepository) -> dict[str, str]:
    """path -> hash of the content, without what belongs to merged models in folders below."""
    merged = {PurePosixPath(path).parent for path in repository.files if path.endswith(f"/{REPORT_FILE}")}
    return {
        path: entry.lfs.sha256 if entry.lfs else entry.blob_id
        for path, entry in repository.entries.items()
        if path != _NOT_OURS and not merged.intersection(PurePosixPath(path).parents)
    }
