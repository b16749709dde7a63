"""Logging in with the Hub: OAuth 2.0 authorization code with PKCE (RFC 7636), as OpenID Connect providers speak it."""

from __future__ import annotations

import base64
import hashlib
import secrets
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode, urlsplit

import httpx2

from merge_adapter.errors import HubError, PolicyError
from merge_adapter.hub.conversations import WRITERS

_TIMEOUT = 20.0


@dataclass(frozen=True)
class OAuthApp:
    """An application registered at a provider."""

    provider: str
    """URL below which `/.well-known/openid-configuration` lies."""
    client_id: str
    client_secret: str
    """"" for a public client."""
    redirect_uri: str
    scopes: str


@dataclass(frozen=True)
class Attempt:
    """One login on its way: kept by whoever started it, never in the open."""

    state: str
    verifier: str

    @property
    def challenge(self) -> str:
        digest = hashlib.sha256(self.verifier.encode()).digest()
        return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


@dataclass(frozen=True)
class Login:
    """A user who logged in."""

    user: str
    organisations: tuple[str, ...]
    token: str
    seconds: float
    """How long the token lives."""
    writes: tuple[str, ...] = ()
    """Those of the organisations in whose repositories they may write, by their role."""


def new_attempt() -> Attempt:
    """A fresh, unguessable one."""
    return Attempt(secrets.token_urlsafe(24), secrets.token_urlsafe(48))


def authorize_url(app: OAuthApp, attempt: Attempt) -> str:
    """Where the browser is sent to log in. Raises HubError when the provider does not answer."""
    query = {
        "response_type": "code",
        "client_id": app.client_id,
        "redirect_uri": app.redirect_uri,
        "scope": app.scopes,
        "state": attempt.state,
        "code_challenge": attempt.challenge,
        "code_challenge_method": "S256",
    }
    return f"{_endpoint(app, 'authorization_endpoint')}?{urlencode(query)}"


def finish_login(app: OAuthApp, attempt: Attempt, *, code: str, state: str) -> Login:
    """The user behind `code`. Raises PolicyError for an answer to another login or a refused code, HubError."""
    if not secrets.compare_digest(state.encode(), attempt.state.encode()):
        raise PolicyError("this answer belongs to another login", hint="Log in again.")
    form = {
        "grant_type": "authorization_code",
        "code": code,
        "redirect_uri": app.redirect_uri,
        "client_id": app.client_id,
        "code_verifier": attempt.verifier,
    }
    auth = (app.client_id, app.client_secret) if app.client_secret else None
    answer = _asked("POST", _endpoint(app, "token_endpoint"), data=form, auth=auth)
    token, seconds = answer.get("access_token"), answer.get("expires_in", 3600)
    if not isinstance(token, str) or not token:
        raise HubError(f"{app.provider} answered the login without a token")
    who = _asked("GET", _endpoint(app, "userinfo_endpoint"), headers={"Authorization": f"Bearer {token}"})
    user = who.get("preferred_username")
    if not isinstance(user, str) or not user:
        raise HubError(f"{app.provider} does not say who logged in")
    roles = {
        str(one["preferred_username"]): one.get("roleInOrg")
        for one in who.get("orgs") or ()
        if isinstance(one, dict) and one.get("preferred_username")
    }
    return Login(
        user,
        tuple(roles),
        token,
        float(seconds) if isinstance(seconds, (int, float)) else 3600.0,
        tuple(name for name, role in roles.items() if role in WRITERS),
    )


def origin_of(url: str) -> str:
    """Scheme, host and port of a URL."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"


def _endpoint(app: OAuthApp, name: str) -> str:
    """One of the provider's URLs, which must lie at the provider."""
    found = _asked("GET", f"{app.provider.rstrip('/')}/.well-known/openid-configuration").get(name)
    if not isinstance(found, str) or origin_of(found) != origin_of(app.provider):
        raise HubError(f"{app.provider} names no {name} of its own")
    return found


def _asked(method: str, url: str, **arguments: Any) -> dict[str, Any]:
    """The JSON object a provider answers with. What it says about a refusal is not repeated: it may hold the code."""
    try:
        with httpx2.Client(timeout=_TIMEOUT, follow_redirects=False) as client:
            response = client.request(method, url, **{k: v for k, v in arguments.items() if v is not None})
        parsed = response.json()
    except (httpx2.HTTPError, ValueError) as error:
        raise HubError(
            f"the login provider {origin_of(url)} does not answer as one", hint="Try again in a minute."
        ) from error
    if response.status_code in (400, 401, 403):
        raise PolicyError("the login was refused by the provider", hint="Log in again.")
    if response.status_code != 200 or not isinstance(parsed, dict):
        raise HubError(f"the login provider {origin_of(url)} answered {response.status_code}")
    return parsed
