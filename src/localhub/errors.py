"""What the Hub answers when it refuses, with the headers that clients map to their own exceptions.

RefusedError                          any HTTP status
├── BadRequestError           400
├── InvalidCredentialsError   401   a token the Hub does not know
├── LoginRequiredError        401   no token where one is needed
├── ForbiddenError            403   a token that may not do this
├── GatedRepoError            401/403  X-Error-Code: GatedRepo
├── DisabledRepoError         403
├── RepoNotFoundError         401/404  X-Error-Code: RepoNotFound
├── RevisionNotFoundError     404   X-Error-Code: RevisionNotFound
├── EntryNotFoundError        404   X-Error-Code: EntryNotFound
├── NotFoundError             404   anything that is not a repository
├── ConflictError             409
└── StaleParentError          412   somebody committed since `parentCommit`
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class RefusedError(Exception):
    """One refusal: status, the message for people, the code for clients and the JSON body."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str = "",
        body: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.body = dict(body) if body is not None else {"error": message}

    def headers(self) -> dict[str, str]:
        """X-Error-Message and X-Error-Code; header values are Latin-1 without line breaks."""
        line = " ".join(self.message.split())
        headers = {"X-Error-Message": line.encode("latin-1", "replace").decode("latin-1")}
        if self.code:
            headers["X-Error-Code"] = self.code
        return headers


class BadRequestError(RefusedError):
    def __init__(self, message: str, *, body: Mapping[str, Any] | None = None) -> None:
        super().__init__(400, message, body=body)


class InvalidCredentialsError(RefusedError):
    def __init__(self) -> None:
        super().__init__(401, "Invalid credentials in Authorization header")


class LoginRequiredError(RefusedError):
    def __init__(self, message: str = "Invalid username or password.") -> None:
        super().__init__(401, message)


class ForbiddenError(RefusedError):
    def __init__(self, message: str) -> None:
        super().__init__(403, message)


class GatedRepoError(RefusedError):
    def __init__(self, repo_id: str, url: str, *, anonymous: bool) -> None:
        if anonymous:
            message = (
                f"Access to model {repo_id} is restricted. You must have access to it and be authenticated "
                "to access it. Please log in."
            )
        else:
            message = (
                f"Access to model {repo_id} is restricted and you are not in the authorized list. "
                f"Visit {url} to ask for access."
            )
        super().__init__(401 if anonymous else 403, message, code="GatedRepo")


class DisabledRepoError(RefusedError):
    """The client recognises this one by its text alone."""

    def __init__(self) -> None:
        super().__init__(403, "Access to this resource is disabled.")


class RepoNotFoundError(RefusedError):
    """Also what a private repository looks like from outside: its existence is not told.

    The Hub answers anonymous callers with a bare 401, which the client maps to RepositoryNotFoundError
    for https URLs only; on plain http the code has to say it.
    """

    def __init__(self, *, anonymous: bool) -> None:
        if anonymous:
            super().__init__(401, "Invalid username or password.", code="RepoNotFound")
        else:
            super().__init__(404, "Repository not found", code="RepoNotFound")


class RevisionNotFoundError(RefusedError):
    def __init__(self, revision: str) -> None:
        super().__init__(404, f"Invalid rev id: {revision}", code="RevisionNotFound")


class EntryNotFoundError(RefusedError):
    def __init__(self, message: str = "Entry not found") -> None:
        super().__init__(404, message, code="EntryNotFound")


class NotFoundError(RefusedError):
    def __init__(self, message: str) -> None:
        super().__init__(404, message)


class ConflictError(RefusedError):
    def __init__(self, message: str, *, body: Mapping[str, Any] | None = None) -> None:
        super().__init__(409, message, body=body)


class StaleParentError(RefusedError):
    def __init__(self) -> None:
        super().__init__(412, "A commit has happened since. Please refresh and try again.")
