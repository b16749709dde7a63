"""Discussions as the bot uses them: what somebody wrote, who may command it, and its answer, said once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from huggingface_hub import DiscussionComment

from merge_adapter.errors import HubError, NotFoundError
from merge_adapter.hub.errors import status_of
from merge_adapter.hub.session import once, repeat

if TYPE_CHECKING:
    from merge_adapter.hub.client import Hub


@dataclass(frozen=True)
class Comment:
    """One comment as the Hub has it now."""

    id: str
    author: str
    text: str


def read_comments(hub: Hub, repo_id: str, number: int) -> tuple[Comment, ...]:
    """The comments of a discussion or pull request, oldest first, without hidden ones."""
    with hub.calling(f"read discussion {number} of {repo_id}", repo_id=repo_id):
        found = repeat(lambda: hub.api.get_discussion_details(repo_id, number), hub.patience)
    return tuple(
        Comment(event.id, event.author, event.content)
        for event in found.events
        if isinstance(event, DiscussionComment) and not event.hidden
    )


def say_once(hub: Hub, repo_id: str, number: int, text: str, *, marker: str) -> None:
    """Comment `text`, which contains `marker`, unless a comment of this account with that marker is there."""
    user = hub.user.lower()

    def look() -> bool | None:
        said = (
            one
            for one in read_comments(hub, repo_id, number)
            if one.author.lower() == user and marker in one.text
        )
        return True if any(said) else None

    if look():
        return
    with hub.calling(f"comment on discussion {number} of {repo_id}", repo_id=repo_id):
        once(lambda: bool(hub.api.comment_discussion(repo_id, number, text)), look, hub.patience)


@dataclass(frozen=True)
class Members:
    """The members of an organisation, as far as this account may see them. Names are in lower case."""

    all: frozenset[str]
    writers: frozenset[str]
    """Those of whom the Hub says that they may write to every repository (admin, write). It tells roles to some
    accounts only, and a contributor's rights end at their own repositories."""


WRITERS = frozenset({"admin", "write"})
"""Roles in an organisation that may write to all of its repositories."""


def members(hub: Hub, organisation: str) -> Members:
    """Who belongs to an organisation; nobody when there is none of that name."""
    try:
        with hub.calling(f"list the members of {organisation}", repo_id=organisation):
            listed = repeat(
                lambda: list(hub.api.list_organization_members(organisation)),
                hub.patience,
            )
    except (HubError, NotFoundError) as error:
        if _says_missing(error):
            return Members(frozenset(), frozenset())
        raise
    roles = {user.username.lower(): getattr(user, "role", None) for user in listed}
    return Members(frozenset(roles), frozenset(name for name, role in roles.items() if role in WRITERS))


def is_organisation(hub: Hub, name: str) -> bool:
    """Whether an account of that name is an organisation."""
    return _exists(hub, name, "organisation", hub.api.get_organization_overview)


def account_exists(hub: Hub, name: str) -> bool:
    """Whether a user or an organisation has that name."""
    return is_organisation(hub, name) or _exists(hub, name, "user", hub.api.get_user_overview)


def _exists(hub: Hub, name: str, kind: str, overview: Callable[[str], object]) -> bool:
    """False where the Hub answers 404; whatever else goes wrong is raised."""
    try:
        with hub.calling(f"look for the {kind} {name}", repo_id=name):
            repeat(lambda: overview(name), hub.patience)
    except (HubError, NotFoundError) as error:
        if _says_missing(error):
            return False
        raise
    return True


def _says_missing(error: Exception) -> bool:
    """Whether the Hub answered 404: accounts, other than repositories, come without the Hub's own error code."""
    return status_of(error) == 404
