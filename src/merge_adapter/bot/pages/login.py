"""Sessions: who looks, with a token that stays on the server, sealed."""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import sqlite3
from dataclasses import dataclass

from fastapi import Request, Response

from merge_adapter.bot.app import Parts
from merge_adapter.bot.rows import Viewer
from merge_adapter.errors import MergeAdapterError
from merge_adapter.hub.oauth import Attempt, Login, OAuthApp

SESSION = "merge_adapter_session"
ATTEMPT = "merge_adapter_login"
_ATTEMPT_SECONDS = 600
_HUB = "https://huggingface.co"


@dataclass(frozen=True)
class Session:
    """Somebody who logged in, or nobody."""

    viewer: Viewer
    csrf: str = ""
    """What a form of this session must send along."""
    token: bytes | None = None
    """Their own token, sealed."""

    @property
    def user(self) -> str:
        return self.viewer.user


NOBODY = Session(Viewer())


def oauth_app(parts: Parts) -> OAuthApp | None:
    """The application that users log in to; None where none is configured."""
    settings = parts.settings
    if not settings.oauth_client_id:
        return None
    return OAuthApp(
        settings.oauth_provider or settings.endpoint or _HUB,
        settings.oauth_client_id,
        settings.oauth_client_secret,
        f"{settings.public_url.rstrip('/')}/login/callback",
        settings.oauth_scopes,
    )


def login_target(parts: Parts) -> str:
    """Where the login link opens, "" where nobody can log in. The Hub frames a Space, but not its own login page."""
    if oauth_app(parts) is None:
        return ""
    return "_blank" if parts.settings.public_url.endswith(".hf.space") else "_self"


def read_session(request: Request, parts: Parts) -> Session:
    """Who looks, from the cookie."""
    cookie = request.cookies.get(SESSION, "")
    if not cookie:
        return NOBODY
    rows = parts.queue.store.read("SELECT * FROM sessions WHERE id = ?", (_hashed(cookie),))
    if not rows or rows[0]["expires"] < parts.queue.store.clock():
        return NOBODY
    found = json.loads(rows[0]["organisations"])
    viewer = Viewer(rows[0]["user"], tuple(found["member"]), tuple(found["writes"]))
    return Session(viewer, _csrf(cookie), rows[0]["token"])


def begin_session(response: Response, login: Login, parts: Parts) -> None:
    """Store who logged in, and give the browser an unguessable name for it."""
    cookie, store = secrets.token_urlsafe(32), parts.queue.store
    organisations = json.dumps({"member": login.organisations, "writes": login.writes})
    sealed, expires = parts.vault.seal(login.token), store.clock() + login.seconds

    def work(db: sqlite3.Connection) -> None:
        db.execute(
            "INSERT INTO sessions (id, user, organisations, token, expires) VALUES (?, ?, ?, ?, ?)",
            (_hashed(cookie), login.user, organisations, sealed, expires),
        )

    store.write(work)
    _set_cookie(response, SESSION, cookie, int(login.seconds), parts)


def end_session(request: Request, response: Response, parts: Parts) -> None:
    """Forget a session and its token."""
    cookie = request.cookies.get(SESSION, "")
    parts.queue.store.write(
        lambda db: db.execute("DELETE FROM sessions WHERE id = ?", (_hashed(cookie),)) and None
    )
    response.delete_cookie(SESSION, path="/")


def keep_attempt(response: Response, attempt: Attempt, parts: Parts) -> None:
    """Let the browser carry its own login, sealed, so that only this browser can finish it."""
    sealed = parts.vault.seal(json.dumps([attempt.state, attempt.verifier])).decode()
    _set_cookie(response, ATTEMPT, sealed, _ATTEMPT_SECONDS, parts)


def read_attempt(request: Request, parts: Parts) -> Attempt | None:
    """The login that this browser began."""
    try:
        state, verifier = json.loads(parts.vault.open(request.cookies.get(ATTEMPT, "").encode()))
    except (MergeAdapterError, ValueError):
        return None
    return Attempt(state, verifier)


def genuine(request: Request, session: Session, sent: str, parts: Parts) -> bool:
    """Whether a form comes from a page of ours and of this session (cross-site request forgery)."""
    origin = request.headers.get("origin")
    own = {
        parts.settings.public_url.rstrip("/").lower(),
        f"{request.url.scheme}://{request.url.netloc}".lower(),
    }
    if origin is not None and origin.lower() not in own:
        return False
    return bool(session.csrf) and hmac.compare_digest(sent.encode(), session.csrf.encode())


def _set_cookie(response: Response, name: str, value: str, seconds: int, parts: Parts) -> None:
    """HttpOnly; inside the Hub's frame around a Space only SameSite=None is sent, which needs https."""
    https = parts.settings.public_url.startswith("https://")
    response.set_cookie(
        name,
        value,
        max_age=seconds,
        httponly=True,
        secure=https,
        samesite="none" if https else "lax",
        path="/",
    )


def _hashed(cookie: str) -> str:
    return hashlib.sha256(cookie.encode()).hexdigest()


def _csrf(cookie: str) -> str:
    return hashlib.sha256(b"csrf\0" + cookie.encode()).hexdigest()
