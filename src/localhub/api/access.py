"""What every route starts from: the Hub, who is asking, and under which address."""

from __future__ import annotations

import base64
import binascii
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any

from fastapi import Depends, Request

from localhub.accounts import Identity
from localhub.errors import (
    BadRequestError,
    InvalidCredentialsError,
    LoginRequiredError,
    NotFoundError,
    RepoNotFoundError,
)
from localhub.git import GitRepository
from localhub.hub import Hub
from localhub.repositories import Repository
from localhub.webhooks import Subject

COOKIE = "localhub_token"
"""Holds the token of a person who signed in on a page; counts for reading only."""
MAX_JSON_BYTES = 32 * 1024 * 1024


@dataclass
class Context:
    """One request."""

    request: Request

    @property
    def hub(self) -> Hub:
        hub = self.request.app.state.hub
        assert isinstance(hub, Hub)
        return hub

    @property
    def base_url(self) -> str:
        """`http://host:port` as the client sees it, also through a proxy that keeps the Host header."""
        return f"{self.request.url.scheme}://{self.request.headers.get('host', self.request.url.netloc)}"

    @cached_property
    def identity(self) -> Identity | None:
        """Who asks; None without an Authorization header.

        Raises:
            InvalidCredentialsError: a token nobody has.
        """
        token = _token(self.request.headers.get("authorization", ""))
        if token:
            return self.hub.accounts.identify(token)
        cookie = self.request.cookies.get(COOKIE) if self.request.method in ("GET", "HEAD") else None
        try:
            return self.hub.accounts.identify(cookie) if cookie else None
        except InvalidCredentialsError:
            # Browsers send cookies to every port of a host: this one may be of another Hub.
            return None

    def login(self) -> Identity:
        """The identity, or 401."""
        if self.identity is None:
            raise LoginRequiredError
        return self.identity

    def readable(self, kind: str, owner: str, name: str) -> Repository:
        """The repository for reading what a gate leaves open: names, refs, discussions."""
        return self.hub.repositories.readable(kind, owner, name, self.identity)

    def files(self, kind: str, owner: str, name: str) -> Repository:
        """The repository for reading files."""
        repository = self.readable(kind, owner, name)
        self.hub.repositories.require_files(repository, self.identity, self.base_url)
        return repository

    def writable(self, kind: str, owner: str, name: str) -> tuple[Repository, Identity]:
        """The repository for changes."""
        repository = self.readable(kind, owner, name)
        return repository, self.hub.repositories.require_write(repository, self.identity)

    def git(self, repository: Repository) -> GitRepository:
        """Its git side. Not to be called inside a transaction, unless the repository's lock is held.

        Raises:
            RepoNotFoundError: it was deleted since it was looked up.
        """
        self.request.state.reading = repository
        try:
            return self.hub.git.open(repository)
        except FileNotFoundError:
            # A move or deletion is under way, or over: look again after it.
            with self.hub.git.lock(repository):
                fresh = self.present(repository)
                self.request.state.reading = fresh
                return self.hub.git.open(fresh)

    def present(self, repository: Repository) -> Repository:
        """The repository as it is now; what holds its lock sees no older state.

        Raises:
            RepoNotFoundError: it was deleted since it was looked up.
        """
        fresh = self.hub.repositories.by_id(repository.id)
        if fresh is None:
            raise RepoNotFoundError(anonymous=self.identity is None)
        return fresh

    def subject(self, repository: Repository, **about: Any) -> Subject:
        """What to tell webhooks."""
        return Subject(repository=repository, base_url=self.base_url, **about)


def _token(header: str) -> str:
    """The token of a Bearer or (as git sends it) Basic header, "" when there is none."""
    scheme, _, value = header.partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            return value
    return ""


def _context(request: Request) -> Context:
    return Context(request)


async def _raw_body(request: Request) -> bytes:
    return await request.body()


async def _json_body(request: Request) -> dict[str, Any]:
    raw = await request.body()
    if not raw:
        return {}
    if len(raw) > MAX_JSON_BYTES:
        raise BadRequestError(f"Body of {len(raw)} bytes, at most {MAX_JSON_BYTES} are read")
    try:
        body = json.loads(raw)
    except ValueError as error:
        raise BadRequestError(f"Body is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise BadRequestError("Body must be a JSON object")
    return body


Ctx = Annotated[Context, Depends(_context)]
RawBody = Annotated[bytes, Depends(_raw_body)]
JsonBody = Annotated[dict[str, Any], Depends(_json_body)]


def text(body: dict[str, Any], key: str, default: str | None = None) -> str:
    """A string of a JSON body.

    Raises:
        BadRequestError: missing without a default, or not a string.
    """
    value = body.get(key, default)
    if value is None and default is None:
        raise BadRequestError(f'"{key}" is required')
    if not isinstance(value, str):
        raise BadRequestError(f'"{key}" must be a string')
    return value


def truthy(value: str | None) -> bool:
    """A flag in a query string or form."""
    return (value or "").lower() in ("1", "true", "yes", "on")


def number(value: str) -> int:
    """A positive number in a path, else 404."""
    if not value.isdecimal() or len(value) > 9:
        raise NotFoundError(f"Not a number: {value}")
    return int(value)
