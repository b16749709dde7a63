"""What a webhook of the Hub says (payload version 3), as far as it is worth a look.

Nothing in it is believed beyond its names: which commit a ref names, what changed and who wrote a comment is
looked up on the Hub afresh (`intake.py`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from merge_adapter.bot.settings import BotSettings
from merge_adapter.errors import MalformedError

_REPO_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_SHA = re.compile(r"[0-9a-f]{40}")
_COMMENT_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_MOST_DISCUSSIONS = 2**31
MAIN = "refs/heads/main"
VERSION = 3


@dataclass(frozen=True)
class PushEvent:
    """A branch moved."""

    repo_id: str
    ref: str
    old_sha: str | None
    new_sha: str

    @property
    def key(self) -> str:
        """Equal for deliveries of the same event. A branch that is set back to a commit is told of as another."""
        return f"{self.branch_key} {self.old_sha or '-'} {self.new_sha}"

    @property
    def branch_key(self) -> str:
        """How the keys of all pushes to this branch begin."""
        return f"push {self.repo_id.lower()} {self.ref}"


@dataclass(frozen=True)
class CommentEvent:
    """Somebody wrote something that mentions the bot."""

    repo_id: str
    number: int
    comment_id: str

    @property
    def key(self) -> str:
        """Equal for deliveries of the same event."""
        return f"comment {self.repo_id.lower()} {self.number} {self.comment_id}"


@dataclass(frozen=True)
class Ignored:
    """Nothing to do."""

    reason: str


HubEvent = PushEvent | CommentEvent


def read_payload(body: bytes, settings: BotSettings) -> HubEvent | Ignored:
    """The event in a webhook's body. Raises MalformedError when it is not a version-3 payload."""
    payload = _object(_parse(body), "the payload")
    version = _object(payload.get("webhook"), "webhook").get("version")
    if version != VERSION:
        raise MalformedError(f"the webhook speaks version {version!r}, expected {VERSION}")
    event, repo = _object(payload.get("event"), "event"), _object(payload.get("repo"), "repo")
    scope, action = event.get("scope"), event.get("action")
    repo_id = repo.get("name")
    if not isinstance(scope, str) or not isinstance(action, str) or not isinstance(repo_id, str):
        raise MalformedError("the webhook's event or repository has no name")
    if repo.get("type") != "model":
        return Ignored("not a model repository")
    if not _REPO_ID.fullmatch(repo_id) or ".." in repo_id:
        return Ignored("the repository has no name of the form owner/name")
    if not settings.watches(repo_id):
        return Ignored("its owner is not watched")
    if scope.startswith("discussion"):
        return _comment(payload, repo_id, f"{scope}.{action}")
    if scope in ("repo", "repo.content") and action in ("create", "update"):
        return _push(payload, repo, repo_id)
    return Ignored(f"nothing to do on {action} of {scope}")


def _push(payload: Mapping[str, Any], repo: Mapping[str, Any], repo_id: str) -> PushEvent | Ignored:
    refs = payload.get("updatedRefs")
    if not isinstance(refs, list) or not refs:  # creation of a repository: the head, if it has one
        refs = [{"ref": MAIN, "oldSha": None, "newSha": repo.get("headSha")}]
    for entry in refs[:100]:
        ref, new = _object(entry, "updatedRefs").get("ref"), entry.get("newSha")
        if ref == MAIN and isinstance(new, str) and _SHA.fullmatch(new):
            old = entry.get("oldSha")
            known = isinstance(old, str) and _SHA.fullmatch(old) is not None
            return PushEvent(repo_id, MAIN, old if known else None, new)
    return Ignored("the main branch did not move")


def _comment(payload: Mapping[str, Any], repo_id: str, what: str) -> CommentEvent | Ignored:
    if what not in ("discussion.create", "discussion.comment.create"):
        return Ignored(f"nothing to do on {what}")
    comment, discussion = payload.get("comment"), payload.get("discussion")
    if not isinstance(comment, dict) or not isinstance(discussion, dict):
        return Ignored("no comment")
    number, comment_id, content = discussion.get("num"), comment.get("id"), comment.get("content")
    if not isinstance(content, str) or "@" not in content:
        return Ignored("nobody is mentioned")
    if (
        type(number) is not int  # a boolean is one to isinstance
        or not 0 < number < _MOST_DISCUSSIONS
        or not isinstance(comment_id, str)
        or not _COMMENT_ID.fullmatch(comment_id)
    ):
        raise MalformedError("the webhook's comment has no number or id")
    return CommentEvent(repo_id, number, comment_id)


def event_to_json(event: HubEvent) -> str:
    """How the inbox keeps it."""
    return json.dumps({"kind": type(event).__name__, **asdict(event)})


def event_from_json(text: str) -> HubEvent:
    """The event that `event_to_json` wrote."""
    parsed = json.loads(text)
    kind = parsed.pop("kind")
    return PushEvent(**parsed) if kind == PushEvent.__name__ else CommentEvent(**parsed)


def _parse(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise MalformedError(f"the webhook's body is not JSON: {error}") from error


def _object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        found = "missing" if value is None else f"a {type(value).__name__}"
        raise MalformedError(f"{what} in the webhook's body is {found}, expected an object")
    return value
