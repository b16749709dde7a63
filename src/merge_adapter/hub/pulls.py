"""Pull requests of one repository, as far as the account behind the token opened them itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from huggingface_hub.community import DiscussionComment, DiscussionWithDetails

from merge_adapter.hub.session import once, repeat

if TYPE_CHECKING:
    from collections.abc import Callable

    from merge_adapter.hub.client import Hub

_UNSETTLED = ("open", "draft")


@dataclass(frozen=True)
class PullRequest:
    """A pull request as it was when looked at."""

    number: int
    status: str
    """`draft`, `open`, `merged` or `closed`."""
    author: str
    title: str
    description: str
    description_id: str
    """Id of the comment that is the description; it changes when edited, the id stays."""
    comments: tuple[str, ...]
    """What its author wrote below the description, oldest first."""
    url: str

    @property
    def ref(self) -> str:
        """The git ref that holds its files."""
        return f"refs/pr/{self.number}"

    @property
    def draft(self) -> bool:
        return self.status == "draft"


class PullRequests:
    """The pull requests of `repo_id`. Others' are never returned: nobody's marker but our own is believed."""

    def __init__(self, hub: Hub, repo_id: str) -> None:
        self._hub = hub
        self._repo_id = repo_id

    def mine(self) -> tuple[PullRequest, ...]:
        """Those of this account that are open or drafts, lowest number first."""
        user = self._hub.user
        with self._hub.calling(f"list the pull requests of {self._repo_id}", repo_id=self._repo_id):
            listed = repeat(
                lambda: list(
                    self._hub.api.get_repo_discussions(
                        self._repo_id, author=user, discussion_type="pull_request"
                    )
                ),
                self._hub.patience,
            )
        numbers = sorted(
            one.num
            for one in listed
            if one.is_pull_request and one.status in _UNSETTLED and one.author.lower() == user.lower()
        )
        return tuple(self.get(number) for number in numbers)

    def get(self, number: int) -> PullRequest:
        """One pull request with its description."""
        with self._hub.calling(f"read pull request {number} of {self._repo_id}", repo_id=self._repo_id):
            found = repeat(
                lambda: self._hub.api.get_discussion_details(self._repo_id, number), self._hub.patience
            )
        return _pull_request(found)

    def create(self, title: str, description: str, *, look: Callable[[], PullRequest | None]) -> PullRequest:
        """Open a draft. `look` finds the one meant, should its answer be lost: it is never opened twice."""
        with self._hub.calling(f"open a pull request on {self._repo_id}", repo_id=self._repo_id):
            return once(
                lambda: _pull_request(
                    self._hub.api.create_pull_request(self._repo_id, title, description=description)
                ),
                look,
                self._hub.patience,
            )

    def describe(self, pull: PullRequest, title: str, description: str) -> None:
        """Replace title and description where they differ."""
        with self._hub.calling(f"describe pull request {pull.number}", repo_id=self._repo_id):
            if pull.title != title:
                repeat(
                    lambda: self._hub.api.rename_discussion(self._repo_id, pull.number, title),
                    self._hub.patience,
                )
            if pull.description.strip() != description.strip():
                repeat(
                    lambda: self._hub.api.edit_discussion_comment(
                        self._repo_id, pull.number, pull.description_id, description
                    ),
                    self._hub.patience,
                )

    def comment(self, pull: PullRequest, text: str) -> None:
        """Say `text` below the pull request, once: an equal last comment is enough."""

        def look() -> bool | None:
            comments = self.get(pull.number).comments
            return True if comments and comments[-1].strip() == text.strip() else None

        if look():
            return
        with self._hub.calling(f"comment on pull request {pull.number}", repo_id=self._repo_id):
            once(
                lambda: bool(self._hub.api.comment_discussion(self._repo_id, pull.number, text)),
                look,
                self._hub.patience,
            )

    def make_ready(self, pull: PullRequest) -> None:
        """Take a draft out of its draft state."""
        self._change_status(pull, "open", "")

    def close(self, pull: PullRequest, why: str) -> None:
        """Close it with a comment."""
        self._change_status(pull, "closed", why)

    def _change_status(self, pull: PullRequest, status: str, comment: str) -> None:
        def look() -> str | None:
            return status if self.get(pull.number).status == status else None

        if look():
            return
        with self._hub.calling(f"set pull request {pull.number} to {status}", repo_id=self._repo_id):
            once(
                lambda: (
                    self._hub.api.change_discussion_status(
                        self._repo_id,
                        pull.number,
                        "open" if status == "open" else "closed",
                        comment=comment or None,
                    ).new_status
                ),
                look,
                self._hub.patience,
            )


def _pull_request(found: DiscussionWithDetails) -> PullRequest:
    comments = [event for event in found.events if isinstance(event, DiscussionComment)]
    own = [comment for comment in comments if comment.author == found.author]
    first = own[0] if own else None
    return PullRequest(
        number=found.num,
        status=found.status,
        author=found.author,
        title=found.title,
        description=first.content if first else "",
        description_id=first.id if first else "",
        comments=tuple(comment.content for comment in own[1:]),
        url=found.url,
    )
