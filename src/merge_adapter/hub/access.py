"""Whom the Hub takes us for, and keeping the token that says so out of every text we write.

The token comes, in the client's own order, from a Trusted Publisher exchange (`HF_OIDC_RESOURCE`), from
`HF_TOKEN`, or from a stored login; `Hub(token=…)` overrides all three. The client resolves it anew for each call,
so that a long run outlives a one-hour token.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal

from huggingface_hub import constants

REDACTED = "<token>"
_TOKEN_SHAPED = re.compile(
    r"hf_[A-Za-z0-9_.-]{16,}|eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_.-]+|(?<=Bearer )[^\s'\"]+"
)
"""Access tokens, JWTs (OIDC), and whatever follows `Bearer `."""


def token_situation(token: str | Literal[False] | None) -> str:
    """Which credentials a call carries, for error messages: never the token itself. False: none, on purpose."""
    if token is False:
        return "no token (public data is read as nobody)"
    if token is not None:
        return "the token that was passed"
    if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN:
        return "no token (HF_HUB_DISABLE_IMPLICIT_TOKEN is set)"
    if oidc_resource():
        return f"the Trusted Publisher token for {oidc_resource()} (HF_OIDC_RESOURCE)"
    if os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN"):
        return "the token in HF_TOKEN"
    if _stored_token():
        return "the stored login (hf auth login)"
    return "no token (HF_TOKEN is not set and nobody is logged in)"


def oidc_resource() -> str:
    """The repository or user that a Trusted Publisher token is scoped to; "" when none is configured."""
    return os.environ.get("HF_OIDC_RESOURCE", "")


def has_token(token: str | Literal[False] | None) -> bool:
    """Whether a call carries credentials at all."""
    return not token_situation(token).startswith("no token")


def redact(text: str, *, token: str | Literal[False] | None = None) -> str:
    """`text` without anything that is, or looks like, a credential."""
    names = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_ID_TOKEN", "ACTIONS_ID_TOKEN_REQUEST_TOKEN")
    for secret in (token, _stored_token(), *map(os.environ.get, names)):
        if secret and len(secret.strip()) >= 4:
            text = text.replace(secret.strip(), REDACTED)
    return _TOKEN_SHAPED.sub(REDACTED, text)


def _stored_token() -> str | None:
    try:
        return Path(constants.HF_TOKEN_PATH).read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeDecodeError):
        return None
