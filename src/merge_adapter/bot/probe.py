"""`webhook test`: what a bot answers to a forged event, a harmless one, and a real one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from merge_adapter.bot.app import SECRET_HEADER
from merge_adapter.bot.events import MAIN, VERSION
from merge_adapter.bot.settings import BotSettings
from merge_adapter.errors import HubError, InputError
from merge_adapter.hub import Hub

_TIMEOUT = 20.0


@dataclass(frozen=True)
class Check:
    """One thing that was tried."""

    what: str
    passed: bool
    found: str


def probe(url: str, settings: BotSettings, *, adapter: str | None, hub: Hub | None) -> tuple[Check, ...]:
    """Try the bot at `url` with the secret of `settings`. With `adapter`, its head is sent as a push: a real job."""
    check_url(url)
    sample = payload("merge-adapter/sample", action="update", scope="repo.config")
    status, answer = _post(url, sample, "forged")
    checks = [Check("a forged event is refused", status == 401, f"{status}")]
    status, answer = _post(url, sample, settings.webhook_secret)
    checks.append(
        Check("a harmless event is read and ignored", status == 200, f"{status} {_said(answer)}".strip())
    )
    if adapter is not None and hub is not None:
        head = hub.open(adapter)
        push = payload(
            head.repo_id,
            action="update",
            scope="repo.content",
            refs=[_ref(head.revision)],
            private=head.private,
        )
        status, answer = _post(url, push, settings.webhook_secret)
        checks.append(
            Check(f"the newest push of {head.repo_id}", status in (200, 202), f"{status} {_said(answer)}")
        )
    return tuple(checks)


def check_url(url: str) -> None:
    """Raises InputError for what is not the address of a web server."""
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("https", "http") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # half an IPv6 address, a port that is no number
        usable = False
    if not usable or not url.isascii() or not url.isprintable() or " " in url:
        raise InputError(f"{url!r} is not a URL", hint="Such as https://OWNER-SPACE.hf.space/webhook")


def payload(
    repo_id: str,
    *,
    action: str,
    scope: str,
    refs: list[dict[str, str | None]] | None = None,
    private: bool = False,
) -> dict[str, Any]:
    """A webhook's body, version 3, as the Hub would send it."""
    body: dict[str, Any] = {
        "event": {"action": action, "scope": scope},
        "repo": {
            "type": "model",
            "name": repo_id,
            "id": "0" * 24,
            "private": private,
            "url": {"web": "", "api": ""},
            "owner": {"id": "0" * 24},
        },
        "webhook": {"id": "0" * 24, "version": VERSION},
    }
    if refs is not None:
        body["updatedRefs"] = refs
    return body


def _ref(sha: str) -> dict[str, str | None]:
    return {"ref": MAIN, "oldSha": None, "newSha": sha}


def _post(url: str, body: dict[str, Any], secret: str) -> tuple[int, dict[str, Any]]:
    request = Request(  # noqa: S310  # the scheme was checked
        url,
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json", SECRET_HEADER: secret},
        method="POST",
    )
    try:
        with urlopen(request, timeout=_TIMEOUT) as response:  # noqa: S310  # the scheme was checked
            return response.status, _parsed(response.read(65536))
    except HTTPError as error:
        with error:
            return error.code, _parsed(error.read(65536))
    except (OSError, HTTPException) as error:  # URLError is an OSError
        raise HubError(
            f"{url} does not answer: {error}", hint="Is the bot running, and reached there?"
        ) from error


def _parsed(text: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(text)
    except ValueError:
        return {}
    return parsed if isinstance(parsed, dict) else {}


def _said(answer: dict[str, Any]) -> str:
    return str(answer.get("reason") or answer.get("error") or ("accepted" if answer.get("accepted") else ""))
