"""Paths in which `%2F` is not a slash.

Clients put a revision such as `refs/pr/1` into one path segment as `refs%2Fpr%2F1`, but ASGI servers
decode the path before routing. `KeepEncodedSlashes` decodes it again from the raw path with every
encoded slash replaced by a control character that no valid path holds, and the convertors `seg` and
`rest` turn it back once the route is known.
"""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import unquote_to_bytes

from starlette.convertors import Convertor, register_url_convertor
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

ENCODED_SLASH = "\x1f"
_PULL_REQUEST_REF = re.compile(r"refs/(?:pr/\d+|heads/[^/]+|tags/[^/]+|convert/[\w.-]+)(?=/|$)")


class KeepEncodedSlashes:
    """ASGI middleware; refuses paths with control characters or invalid UTF-8 (400)."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            raw: bytes = scope.get("raw_path") or scope["path"].encode()
            raw = raw.split(b"?", 1)[0]
            try:
                parts = [unquote_to_bytes(part).decode("utf-8") for part in re.split(b"%2[fF]", raw)]
            except UnicodeDecodeError:
                parts = ["\x00"]
            if any(ord(c) < 32 or ord(c) == 127 for part in parts for c in part):
                await PlainTextResponse("Malformed path", status_code=400)(scope, receive, send)
                return
            scope = {**scope, "path": ENCODED_SLASH.join(parts)}
        await self.app(scope, receive, send)


class _Decoding(Convertor[str]):
    def convert(self, value: str) -> str:
        return value.replace(ENCODED_SLASH, "/")

    def to_string(self, value: str) -> str:
        return value.replace("/", ENCODED_SLASH)


class Segment(_Decoding):
    """One path segment."""

    regex = "[^/]+"


class Rest(_Decoding):
    """All that follows, possibly nothing."""

    regex = ".*"


class RevisionAndPath(Convertor[Any]):
    """`{revision}/{path}` where the revision may be `refs/pr/N`, encoded or not. Gives (revision, path)."""

    regex = ".+"

    def convert(self, value: str) -> str:
        bare = _PULL_REQUEST_REF.match(value)
        if bare:
            value = bare[0].replace("/", ENCODED_SLASH) + value[bare.end() :]
        return value

    def to_string(self, value: str) -> str:
        return value


def split_revision(value: str) -> tuple[str, str]:
    """The (revision, path) of a `revpath` parameter; path is "" when there is none."""
    revision, _, path = value.partition("/")
    return revision.replace(ENCODED_SLASH, "/"), path.replace(ENCODED_SLASH, "/")


class Kind(Convertor[str]):
    """`models`, `datasets` or `spaces`; gives the singular."""

    regex = "models|datasets|spaces"

    def convert(self, value: str) -> str:
        return value[:-1]

    def to_string(self, value: str) -> str:
        return value + "s"


def register() -> None:
    """Make `{x:seg}`, `{x:rest}`, `{x:revpath}` and `{x:kind}` known to Starlette."""
    register_url_convertor("seg", Segment())
    register_url_convertor("rest", Rest())
    register_url_convertor("revpath", RevisionAndPath())
    register_url_convertor("kind", Kind())
