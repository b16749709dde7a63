"""Users, organisations and tokens.

Tokens are kept as SHA-256 digests. A token found by its digest is compared once more in constant time.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from dataclasses import dataclass
from enum import StrEnum

from localhub.database import Database, new_id, now
from localhub.errors import BadRequestError, InvalidCredentialsError, NotFoundError

_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,38}[A-Za-z0-9])?")
RESERVED = frozenset(
    {"api", "datasets", "spaces", "models", "oauth", "login", "static", "collections", "jobs"}
)


class TokenRole(StrEnum):
    """What a token may do."""

    WRITE = "write"
    """All its user may."""
    READ = "read"
    """Reading only."""
    REPOSITORY = "repository"
    """From the OIDC exchange: reads as its user, writes to one repository, creates none."""
    GATED = "gated-repos"
    """From the OIDC exchange: reads gated repositories its user may read, nothing else."""
    OAUTH = "oauth"
    """From a login through OAuth: acts for the user."""


@dataclass(frozen=True)
class Account:
    """A user or an organisation."""

    id: str
    name: str
    type: str
    """`user` or `org`."""
    fullname: str
    created_at: str


@dataclass(frozen=True)
class Identity:
    """Who makes a request, and with what kind of token."""

    user: Account
    role: TokenRole
    token_name: str
    resource: str | None = None
    """For REPOSITORY: `models/owner/name`, the only repository it may write to."""

    @property
    def name(self) -> str:
        return self.user.name


def digest(token: str) -> str:
    """How a token is stored: its SHA-256 in hex."""
    return hashlib.sha256(token.encode()).hexdigest()


class Accounts:
    """The table of users, organisations, members and tokens."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, name: str, *, type: str = "user", fullname: str = "") -> Account:
        """Create an account, or return the one of that name.

        Raises:
            BadRequestError: the name is not one the Hub allows.
        """
        if not _NAME.fullmatch(name) or "--" in name or name.lower() in RESERVED:
            raise BadRequestError(f"Invalid account name {name!r}: letters, digits and single dashes")
        self._database.write(
            "INSERT INTO accounts (name, id, type, fullname, created_at) VALUES (?, ?, ?, ?, ?) "
            "ON CONFLICT DO NOTHING",
            *(name, new_id(), type, fullname or name, now()),
        )
        return self.get(name)

    def find(self, name: str) -> Account | None:
        row = self._database.one("SELECT * FROM accounts WHERE name = ?", name)
        return (
            Account(row["id"], row["name"], row["type"], row["fullname"], row["created_at"]) if row else None
        )

    def get(self, name: str) -> Account:
        account = self.find(name)
        if account is None:
            raise NotFoundError(f"User or organization {name} not found")
        return account

    def join(self, organization: str, user: str, role: str = "write") -> None:
        """Make a user a member with the role `admin`, `write`, `contributor` or `read`."""
        self._database.write(
            "INSERT INTO members VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET role = excluded.role",
            *(organization, user, role),
        )

    def role(self, organization: str, user: str) -> str | None:
        """The user's role in an organisation, None for outsiders."""
        row = self._database.one(
            "SELECT role FROM members WHERE organization = ? AND user = ?", organization, user
        )
        return row["role"] if row else None

    def organizations(self, user: str) -> list[tuple[Account, str]]:
        """Organisations a user belongs to, with the role in each."""
        rows = self._database.all(
            "SELECT organization, role FROM members WHERE user = ? ORDER BY organization", user
        )
        return [(self.get(row["organization"]), row["role"]) for row in rows]

    def members(self, organization: str) -> list[tuple[Account, str]]:
        rows = self._database.all(
            "SELECT user, role FROM members WHERE organization = ? ORDER BY user", organization
        )
        return [(self.get(row["user"]), row["role"]) for row in rows]

    def add_token(
        self,
        user: str,
        token: str,
        *,
        name: str = "default",
        role: TokenRole = TokenRole.WRITE,
        resource: str | None = None,
        lifetime: float | None = None,
    ) -> None:
        """Let `token` speak for `user`; `lifetime` in seconds, None for ever."""
        self._database.write(
            "INSERT INTO tokens VALUES (?, ?, ?, ?, ?, ?, ?) "
            "ON CONFLICT (digest) DO UPDATE SET user = excluded.user, role = excluded.role",
            *(digest(token), user, name, role.value, resource),
            *(None if lifetime is None else time.time() + lifetime, now()),
        )

    def issue_token(
        self, user: str, *, role: TokenRole, resource: str | None = None, lifetime: float | None = None
    ) -> str:
        """A new random token."""
        token = f"hf_{role.value.replace('-', '')}_{secrets.token_urlsafe(32)}"
        self.add_token(user, token, name=role.value, role=role, resource=resource, lifetime=lifetime)
        return token

    def identify(self, token: str) -> Identity:
        """Who speaks with this token.

        Raises:
            InvalidCredentialsError: an unknown or expired token.
        """
        wanted = digest(token)
        row = self._database.one("SELECT * FROM tokens WHERE digest = ?", wanted)
        if row is None or not hmac.compare_digest(row["digest"], wanted):
            raise InvalidCredentialsError
        if row["expires"] is not None and row["expires"] <= time.time():
            raise InvalidCredentialsError
        return Identity(self.get(row["user"]), TokenRole(row["role"]), row["name"], row["resource"])
