"""The list of repositories: names, visibility, settings, and who may do what with them."""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from localhub.accounts import Accounts, Identity, TokenRole
from localhub.database import Database, new_id, now
from localhub.errors import (
    BadRequestError,
    ConflictError,
    DisabledRepoError,
    ForbiddenError,
    GatedRepoError,
    LoginRequiredError,
    RepoNotFoundError,
)

_NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_-])?")
_WRITERS = frozenset({"admin", "write"})


class Gate(StrEnum):
    """Whether files may be read without asking."""

    OPEN = ""
    AUTO = "auto"
    MANUAL = "manual"


class AccessStatus(StrEnum):
    """Where a user's request for access to a gated repository stands."""

    PENDING = "pending"
    ACCEPTED = "accepted"
    REJECTED = "rejected"


@dataclass(frozen=True)
class Repository:
    """One repository as the Hub lists it."""

    id: str
    type: str
    """`model`, `dataset` or `space`."""
    owner: str
    name: str
    private: bool
    gated: Gate
    disabled: bool
    discussions_disabled: bool
    sdk: str | None
    created_at: str
    modified_at: str
    downloads: int

    @property
    def full_name(self) -> str:
        """`owner/name`, what the client calls repo_id."""
        return f"{self.owner}/{self.name}"

    @property
    def web_path(self) -> str:
        """The path of its page: `/owner/name`, `/datasets/owner/name`."""
        prefix = "" if self.type == "model" else f"/{self.type}s"
        return f"{prefix}/{self.full_name}"

    @property
    def api_path(self) -> str:
        """`/api/models/owner/name`."""
        return f"/api/{self.type}s/{self.full_name}"


@dataclass(frozen=True)
class AccessRequest:
    id: str
    user: str
    status: AccessStatus
    fields: dict[str, str]
    created_at: str


def _repository(row: sqlite3.Row) -> Repository:
    return Repository(
        id=row["id"],
        type=row["type"],
        owner=row["owner"],
        name=row["name"],
        private=bool(row["private"]),
        gated=Gate(row["gated"]),
        disabled=bool(row["disabled"]),
        discussions_disabled=bool(row["discussions_disabled"]),
        sdk=row["sdk"],
        created_at=row["created_at"],
        modified_at=row["modified_at"],
        downloads=row["downloads"],
    )


def valid_name(name: str) -> bool:
    """Whether the Hub would take this as the name of a repository."""
    return bool(_NAME.fullmatch(name)) and ".." not in name and "--" not in name and not name.endswith(".git")


class Repositories:
    """The table of repositories and the rules of access to them."""

    def __init__(self, database: Database, accounts: Accounts) -> None:
        self._database = database
        self._accounts = accounts

    # ------------------------------------------------------------------------------------- looking up

    def find(self, type: str, owner: str, name: str) -> Repository | None:
        """A repository by its present name, or by one it had before it was moved."""
        row = self._database.one(
            "SELECT * FROM repositories WHERE type = ? AND owner = ? AND name = ?", type, owner, name
        )
        if row is None:
            row = self._database.one(
                "SELECT r.* FROM repositories r JOIN moved m ON m.repository = r.id "
                "WHERE m.type = ? AND m.owner = ? AND m.name = ?",
                *(type, owner, name),
            )
        return _repository(row) if row else None

    def by_id(self, id: str) -> Repository | None:
        row = self._database.one("SELECT * FROM repositories WHERE id = ?", id)
        return _repository(row) if row else None

    def all(self, type: str | None = None) -> list[Repository]:
        """Every repository, the most recently changed first."""
        where, parameters = ("WHERE type = ?", (type,)) if type else ("", ())
        rows = self._database.all(
            f"SELECT * FROM repositories {where} ORDER BY modified_at DESC, rowid DESC",  # noqa: S608 - a constant
            *parameters,
        )
        return [_repository(row) for row in rows]

    # ----------------------------------------------------------------------------------------- access

    def may_write(self, repository: Repository, identity: Identity | None) -> bool:
        if identity is None or identity.role in (TokenRole.READ, TokenRole.GATED):
            return False
        if identity.role is TokenRole.REPOSITORY:
            return identity.resource == f"{repository.type}s/{repository.full_name}"
        return self.may_administer_namespace(repository.owner, identity)

    def may_administer_namespace(self, namespace: str, identity: Identity) -> bool:
        """Whether the identity may create and change repositories under a user or organisation."""
        if identity.role in (TokenRole.READ, TokenRole.GATED, TokenRole.REPOSITORY):
            return False
        if namespace.lower() == identity.name.lower():
            return True
        return self._accounts.role(namespace, identity.name) in _WRITERS

    def may_see(self, repository: Repository, identity: Identity | None) -> bool:
        """Whether the repository exists at all for this identity."""
        if not repository.private:
            return True
        if identity is None or identity.role is TokenRole.GATED:
            return False
        if identity.role is TokenRole.REPOSITORY:
            return identity.resource == f"{repository.type}s/{repository.full_name}"
        owner = repository.owner
        return owner.lower() == identity.name.lower() or self._accounts.role(owner, identity.name) is not None

    def may_read_files(self, repository: Repository, identity: Identity | None) -> bool:
        """Whether the gate, if there is one, is open for this identity."""
        if repository.gated is Gate.OPEN or self.may_write(repository, identity):
            return True
        if identity is None:
            return False
        owner = repository.owner
        if owner.lower() == identity.name.lower() or self._accounts.role(owner, identity.name) is not None:
            return True
        request = self.access_request(repository, identity.name)
        return request is not None and request.status is AccessStatus.ACCEPTED

    def readable(self, type: str, owner: str, name: str, identity: Identity | None) -> Repository:
        """The repository, for one who may see it.

        Raises:
            RepoNotFoundError: there is none, or it is private and not theirs.
            DisabledRepoError: it was taken down.
        """
        repository = self.find(type, owner, name)
        if repository is None or not self.may_see(repository, identity):
            raise RepoNotFoundError(anonymous=identity is None)
        if repository.disabled:
            raise DisabledRepoError
        return repository

    def require_files(self, repository: Repository, identity: Identity | None, base_url: str) -> None:
        """Raise GatedRepoError unless the files may be read."""
        if not self.may_read_files(repository, identity):
            url = f"{base_url}{repository.web_path}"
            raise GatedRepoError(repository.full_name, url, anonymous=identity is None)

    def require_write(self, repository: Repository, identity: Identity | None) -> Identity:
        """The identity, when it may write here.

        Raises:
            LoginRequiredError: nobody is logged in.
            ForbiddenError: somebody is, who may not.
        """
        if identity is None:
            raise LoginRequiredError
        if not self.may_write(repository, identity):
            raise ForbiddenError(
                "Authorization error: you don't have the rights to write to "
                f"{repository.type}s/{repository.full_name} with this token"
            )
        return identity

    # ---------------------------------------------------------------------------------------- changes

    def create(
        self, type: str, owner: str, name: str, *, private: bool, sdk: str | None = None
    ) -> Repository:
        """A new entry in the list; its git repository is made by the caller.

        Raises:
            ConflictError: the name is taken.
        """
        if type not in ("model", "dataset", "space"):
            raise BadRequestError(f"Invalid repository type {type!r}: expected model, dataset or space")
        if not valid_name(name):
            raise BadRequestError(
                f"Invalid repository name {name!r}: letters, digits, '.', '_', '-', at most 96, no '--' or '..'"
            )
        moment = now()
        try:
            with self._database.writing() as connection:
                connection.execute(
                    "DELETE FROM moved WHERE type = ? AND owner = ? AND name = ?", (type, owner, name)
                )
                connection.execute(
                    "INSERT INTO repositories (id, type, owner, name, private, gated, sdk, created_at, modified_at) "
                    "VALUES (?, ?, ?, ?, ?, '', ?, ?, ?)",
                    (new_id(), type, owner, name, private, sdk, moment, moment),
                )
        except sqlite3.IntegrityError as error:
            raise ConflictError(f"You already created this {type} repo: {owner}/{name}") from error
        created = self.find(type, owner, name)
        assert created is not None
        return created

    def delete(self, repository: Repository) -> None:
        """Remove the entry and all that hangs on it."""
        with self._database.writing() as connection:
            for table in ("discussions", "events", "access_requests", "large_files", "xet_chunks", "moved"):
                connection.execute(f"DELETE FROM {table} WHERE repository = ?", (repository.id,))  # noqa: S608
            connection.execute("DELETE FROM repositories WHERE id = ?", (repository.id,))

    def move(self, repository: Repository, owner: str, name: str) -> Repository:
        """Give it a new name; the old one keeps leading to it."""
        if not valid_name(name):
            raise BadRequestError(f"Invalid repository name {name!r}")
        try:
            with self._database.writing() as connection:
                connection.execute(
                    "UPDATE repositories SET owner = ?, name = ? WHERE id = ?", (owner, name, repository.id)
                )
                connection.execute(
                    "INSERT OR REPLACE INTO moved VALUES (?, ?, ?, ?)",
                    (repository.type, repository.owner, repository.name, repository.id),
                )
        except sqlite3.IntegrityError as error:
            raise ConflictError(f"{owner}/{name} already exists") from error
        moved = self.by_id(repository.id)
        assert moved is not None
        return moved

    def update(
        self,
        repository: Repository,
        *,
        private: bool | None = None,
        gated: Gate | None = None,
        disabled: bool | None = None,
        discussions_disabled: bool | None = None,
    ) -> Repository:
        """Change settings; None leaves one as it is."""
        changes: dict[str, object] = {
            "private": private,
            "gated": None if gated is None else gated.value,
            "disabled": disabled,
            "discussions_disabled": discussions_disabled,
        }
        with self._database.writing() as connection:
            for column, value in changes.items():
                if value is not None:
                    connection.execute(
                        f"UPDATE repositories SET {column} = ? WHERE id = ?",  # noqa: S608 - names above
                        (value, repository.id),
                    )
        updated = self.by_id(repository.id)
        assert updated is not None
        return updated

    def touch(self, repository: Repository) -> None:
        """Its content changed now."""
        self._database.write("UPDATE repositories SET modified_at = ? WHERE id = ?", now(), repository.id)

    def count_download(self, repository: Repository) -> None:
        self._database.write("UPDATE repositories SET downloads = downloads + 1 WHERE id = ?", repository.id)

    # ------------------------------------------------------------------------------- gates and content

    def access_request(self, repository: Repository, user: str) -> AccessRequest | None:
        rows = self._database.all(
            "SELECT * FROM access_requests WHERE repository = ? AND user = ?", repository.id, user
        )
        return _access_request(rows[0]) if rows else None

    def access_requests(self, repository: Repository, status: AccessStatus) -> list[AccessRequest]:
        rows = self._database.all(
            "SELECT * FROM access_requests WHERE repository = ? AND status = ? ORDER BY created_at, rowid",
            *(repository.id, status.value),
        )
        return [_access_request(row) for row in rows]

    def set_access(
        self, repository: Repository, user: str, status: AccessStatus, fields: dict[str, str] | None = None
    ) -> None:
        self._database.write(
            "INSERT INTO access_requests VALUES (?, ?, ?, ?, ?, ?) "
            "ON CONFLICT (repository, user) DO UPDATE SET status = excluded.status",
            *(new_id(), repository.id, user, status.value, json.dumps(fields or {}), now()),
        )

    def link_large_files(self, repository: Repository, digests: Iterable[str]) -> None:
        """Note which large files (by SHA-256) a repository's members have uploaded to it."""
        with self._database.writing() as connection:
            connection.executemany(
                "INSERT INTO large_files VALUES (?, ?) ON CONFLICT DO NOTHING",
                [(repository.id, digest) for digest in digests],
            )

    def has_large_file(self, repository: Repository, digest: str) -> bool:
        return (
            self._database.one(
                "SELECT 1 FROM large_files WHERE repository = ? AND sha256 = ?", repository.id, digest
            )
            is not None
        )


def _access_request(row: sqlite3.Row) -> AccessRequest:
    return AccessRequest(
        row["id"], row["user"], AccessStatus(row["status"]), json.loads(row["fields"]), row["created_at"]
    )
