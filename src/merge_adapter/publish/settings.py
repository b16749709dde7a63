"""What a user chooses about a publication, and what is found out about it before the first byte is written."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

from merge_adapter.licences import LicenceDecision
from merge_adapter.types import OnFail, PublishTo


class Openness(IntEnum):
    """Who may read a repository: the higher, the more closed."""

    PUBLIC = 0
    GATED_AUTO = 1
    """Whoever accepts the terms."""
    GATED_MANUAL = 2
    """Whom the owner lets in."""
    PRIVATE = 3

    def __str__(self) -> str:
        return {0: "public", 1: "gated", 2: "gated (by hand)", 3: "private"}[int(self)]


@dataclass(frozen=True)
class Source:
    """Adapter or base as the policy sees it."""

    role: str
    """`adapter` or `base`."""
    repo_id: str | None
    """None for a local folder."""
    openness: Openness = Openness.PUBLIC
    """A local folder counts as public: who owns it decides by publishing it."""

    @property
    def owner(self) -> str:
        """The namespace; "" for a local folder and for a repository of none."""
        return self.repo_id.split("/")[0] if self.repo_id and "/" in self.repo_id else ""

    def __str__(self) -> str:
        return f"the {self.role} {self.repo_id}" if self.repo_id else f"the local {self.role}"


@dataclass(frozen=True)
class Target:
    """Where the files go, decided and allowed."""

    repo_id: str
    path_in_repo: str
    """Folder inside the repository, "" for its root."""
    private: bool | None
    """Whether the repository is made private when it has to be created; None: as its owner has it by default."""
    least: Openness
    """The repository must be at least this closed."""


@dataclass(frozen=True)
class PublishSettings:
    """What a user can choose about a publication."""

    publish_to: PublishTo = PublishTo.PULL_REQUEST
    target_repo: str | None = None
    """`owner/name`; None means `<adapter>-merged`, or `<repository>-<folder>-merged` where it lies in a folder."""
    private: bool | None = None
    """Of a repository that has to be created; None: private exactly when a source is private or gated."""
    path_in_repo: str | None = None
    """None: the root, or `merged` in the adapter's own repository."""
    on_fail: OnFail = OnFail.DRAFT
    license: str | None = None
    """Overrides what adapter and base say: a licence id of the Hub."""
    allow_base: tuple[str, ...] = ()
    """Bases that may be merged, `OWNER/NAME` or `OWNER/*`; any when empty."""
    target: Target | None = None
    """Set by `prepare`."""
    licence: LicenceDecision | None = None
    """Set by `prepare`."""
    notes: tuple[str, ...] = field(default=())
    """Set by `prepare`: what a person should know about the decisions."""
