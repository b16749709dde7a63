"""What a publication is of: how the same one is recognised again, on a branch or in a pull request.

Two fingerprints. The `lane` names what a series of publications has in common: these adapters, in this folder of
this repository; an open pull request of a lane is updated, never doubled. The `key` names one of them: sources
pinned to their commits, and the settings.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from merge_adapter.report.document import combination_entry, settings_entry, source_entry
from merge_adapter.types import FileOrigin, MergeSettings, Resolved, Verdict

_MARKER = re.compile(
    r"<!-- merge-adapter:1 lane=([0-9a-f]{16}) key=([0-9a-f]{64}) adapter=([0-9a-f]{40}|local) "
    r"base=([0-9a-f]{40}|local) verdict=(pass|fail|inconclusive) -->"
)


@dataclass(frozen=True)
class Identity:
    """Lane and key of a publication, with the commits that a reader of the marker wants to see."""

    lane: str
    """16 hex digits."""
    key: str
    """64 hex digits."""
    adapter: str
    """Commit sha, or `local`."""
    base: str
    """Commit sha, or `local`."""


@dataclass(frozen=True)
class Marker:
    """The hidden line of a pull request's description."""

    identity: Identity
    verdict: Verdict

    def __str__(self) -> str:
        one = self.identity
        return (
            f"<!-- merge-adapter:1 lane={one.lane} key={one.key} adapter={one.adapter} base={one.base} "
            f"verdict={self.verdict.value} -->"
        )


def find_marker(text: str) -> Marker | None:
    """The first marker in `text`; None when there is none."""
    match = _MARKER.search(text)
    if match is None:
        return None
    lane, key, adapter, base, verdict = match.groups()
    return Marker(Identity(lane, key, adapter, base), Verdict(verdict))


def identity_of_report(report: Mapping[str, Any], path_in_repo: str) -> Identity:
    """The identity of a merged folder. Local sources have no commit: the weights stand for them."""
    adapters = [_source(entry) for entry in report.get("adapters") or [report["adapter"]]]
    base = _source(report["base"])
    settings = {**report.get("settings", {}), "dtype": report["output"]["dtype"]}
    if "combination" in report:
        settings["combination"] = dict(report["combination"])
    pinned = all(source["revision"] for source in (*adapters, base))
    weights = [] if pinned else _weights(report["output"]["files"])
    return _identity(adapters, base, settings, weights, path_in_repo)


def identity_of_sources(
    sources: Resolved, settings: MergeSettings, path_in_repo: str, license: str | None = None
) -> Identity | None:
    """The identity before anything is merged; None where a local source leaves it open until then.

    `license` is the one that was chosen, where one was.
    """
    adapters = _adapters(sources)
    base = _source(source_entry(sources.base.repository.origin))
    if not all(source["revision"] for source in (*adapters, base)):
        return None
    chosen: dict[str, Any] = {**settings_entry(settings, license), "dtype": settings.dtype.value}
    if len(sources.adapters) > 1:
        chosen["combination"] = combination_entry(sources.combination)
    return _identity(adapters, base, chosen, [], path_in_repo)


def lane_of(sources: Resolved, path_in_repo: str) -> str:
    """The lane alone, which is known for any sources."""
    return _digest(_lane(_adapters(sources), path_in_repo))[:16]


def _adapters(sources: Resolved) -> list[dict[str, Any]]:
    return [
        _source({**source_entry(one.repository.origin), "weight": one.weight}) for one in sources.adapters
    ]


def _source(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "id": entry.get("id"),
        "revision": entry.get("revision"),
        "subfolder": entry.get("subfolder", ""),
        "weight": float(entry.get("weight", 1.0)),
    }


def _weights(files: Iterable[Mapping[str, Any]]) -> list[list[str]]:
    written = FileOrigin.WRITTEN.value
    return sorted([file["path"], file["sha256"]] for file in files if file["origin"] != written)


def _identity(
    adapters: list[dict[str, Any]],
    base: dict[str, Any],
    settings: Mapping[str, Any],
    weights: list[list[str]],
    path_in_repo: str,
) -> Identity:
    lane = _lane(adapters, path_in_repo)
    key = {"adapters": adapters, "base": base, "settings": dict(settings), "weights": weights}
    return Identity(
        lane=_digest(lane)[:16],
        key=_digest([lane, key]),
        adapter=adapters[0]["revision"] or "local",
        base=base["revision"] or "local",
    )


def _lane(adapters: list[dict[str, Any]], path_in_repo: str) -> list[Any]:
    return [[one["id"], one["subfolder"]] for one in adapters] + [path_in_repo]


def _digest(value: object) -> str:
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()
