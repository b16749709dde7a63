"""Files handed to the Hub one by one, before the commit that will name them.

The draft they go to is opened when the first of them is ready, or found where an earlier run left it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_adapter.hub import PullRequest, PullRequests, Upload, hand_over
from merge_adapter.publish import description
from merge_adapter.publish.contents import Gone
from merge_adapter.publish.flow import open_draft
from merge_adapter.publish.settings import PublishSettings
from merge_adapter.types import OutputFile, Progress, Publication

if TYPE_CHECKING:
    from merge_adapter.hub import Hub


class Outbox:
    """One publication's way out. Not thread-safe: one sender."""

    def __init__(
        self, report: Mapping[str, Any], *, hub: Hub, settings: PublishSettings, progress: Progress
    ) -> None:
        """`report` needs sources and settings only; `settings` come from `prepare`."""
        assert settings.target is not None
        self._report = report
        self._hub = hub
        self._settings = settings
        self._target = settings.target
        self._progress = progress
        self._there: Mapping[str, str] = {}
        self.draft: PullRequest | None = None

    def send(self, file: OutputFile, place: Path) -> Gone | None:
        """Hand one file over; None when the Hub wants it inside the commit, so that it must stay here.

        Raises HubError, PolicyError.
        """
        if self.draft is None:
            self._open()
        assert self.draft is not None
        prefix = f"{self._target.path_in_repo}/" if self._target.path_in_repo else ""
        if self._there.get(prefix + file.path) == file.sha256:
            return Gone()
        upload = Upload(prefix + file.path, place, file.bytes, file.sha256)
        handed = hand_over(self._hub, self._target.repo_id, self.draft.ref, upload)
        return None if handed is None else Gone(handed)

    def withdraw(self, why: str) -> None:
        """Say why nothing follows, and close the draft where it has never held anything."""
        if self.draft is None:
            return
        pulls = PullRequests(self._hub, self._target.repo_id)
        if description.is_placeholder(self.draft.description):
            pulls.close(self.draft, why)
        else:
            pulls.comment(self.draft, why)

    def _open(self) -> None:
        self.draft = open_draft(self._report, hub=self._hub, settings=self._settings, progress=self._progress)
        entries = self._hub.tree(self._target.repo_id, self.draft.ref)
        self._there = {path: entry.lfs.sha256 for path, entry in entries.items() if entry.lfs}


def discard(publication: Publication, why: str, *, hub: Hub) -> None:
    """Close the draft of a merge that did not pass, where its user wants none."""
    assert publication.number is not None
    pulls = PullRequests(hub, publication.repo)
    pulls.close(pulls.get(publication.number), why)
