"""What earlier runs have left on the Hub: publications that stand as ready, pull requests of the same lane."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from merge_adapter.errors import InputError
from merge_adapter.hub import PullRequest, PullRequests
from merge_adapter.publish.identity import Identity, find_marker, identity_of_report, identity_of_sources
from merge_adapter.publish.settings import PublishSettings, Target
from merge_adapter.publish.target import find_target
from merge_adapter.publish.whole import published_report, read_remote_report
from merge_adapter.types import MergeSettings, Operation, Publication, PublishTo, Resolved, Verdict

if TYPE_CHECKING:
    from merge_adapter.hub import Hub, HubRepository


@dataclass(frozen=True)
class Published:
    """A publication that is there already, with the report it was made from."""

    report: Mapping[str, Any]
    publication: Publication


def find_published(
    sources: Resolved, settings: MergeSettings, publishing: PublishSettings, *, hub: Hub
) -> Published | None:
    """What an earlier run offered as ready from the same commits and settings; None when there is no such thing.

    `publishing` comes from `prepare`. Local sources are never found: what they are is known after merging.
    """
    target = publishing.target
    if target is None:
        raise InputError("the publication was not prepared: call prepare first")
    identity = identity_of_sources(sources, settings, target.path_in_repo, publishing.license)
    if identity is None or find_target(target, hub=hub) is None:
        return None
    main = hub.open(target.repo_id, subfolder=target.path_in_repo)
    found = published_as(main, identity, target)
    if found is not None:
        return Published(found, on_main(main, target, Operation.UNCHANGED, hub))
    if publishing.publish_to is PublishTo.NEW_REPO:
        return None
    for pull in of_lane(PullRequests(hub, target.repo_id), identity.lane):
        if pull.draft:
            continue
        head = hub.open(target.repo_id, revision=pull.ref, subfolder=target.path_in_repo)
        found = published_as(head, identity, target)
        if found is not None:
            return Published(found, on_pull(pull, head.revision, target, Operation.UNCHANGED))
    return None


def of_lane(pulls: PullRequests, lane: str) -> list[PullRequest]:
    """This account's own pull requests of a lane, open and draft ones."""
    return [pull for pull in pulls.mine() if _marks(pull, lane)]


def _marks(pull: PullRequest, lane: str) -> bool:
    marker = find_marker(pull.description)
    return marker is not None and marker.identity.lane == lane


def published_as(repository: HubRepository, identity: Identity, target: Target) -> dict[str, Any] | None:
    """The report of a whole publication of `identity` that passed; None when it is not there."""
    report = read_remote_report(repository)
    if report is None or report["verification"]["verdict"] != Verdict.PASS.value:
        return None
    if identity_of_report(report, target.path_in_repo) != identity:
        return None
    return published_report(repository)


def on_main(repository: HubRepository, target: Target, operation: Operation, hub: Hub) -> Publication:
    """What was published in the main branch."""
    place = f"/tree/main/{target.path_in_repo}" if target.path_in_repo else ""
    url = f"{hub.endpoint}/{repository.repo_id}{place}"
    return Publication(repository.repo_id, url, operation, repository.revision)


def on_pull(pull: PullRequest, commit: str, target: Target, operation: Operation) -> Publication:
    """What is offered by a pull request, at `commit`."""
    return Publication(target.repo_id, pull.url, operation, commit, pull.number, pull.draft)
