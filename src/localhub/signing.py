"""Short-lived signed strings: xet access tokens and storage URLs."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time

from localhub.database import Database


class Signer:
    """HMAC-SHA-256 under a key that is made once per data folder."""

    def __init__(self, database: Database) -> None:
        database.write(
            "INSERT INTO secrets VALUES ('signing', ?) ON CONFLICT DO NOTHING", secrets.token_hex(32)
        )
        row = database.one("SELECT value FROM secrets WHERE name = 'signing'")
        assert row is not None
        self._key = bytes.fromhex(row["value"])

    @property
    def name(self) -> str:
        """16 hex digits that tell this data folder from every other, also after a restart."""
        return self._mac("name")[:16]

    def sign(self, *fields: str, lifetime: float) -> tuple[str, int]:
        """`fields` joined by dots with expiry and signature, and the expiry in Unix seconds."""
        expires = int(time.time() + lifetime)
        text = ".".join((*fields, str(expires)))
        return f"{text}.{self._mac(text)}", expires

    def check(self, signed: str) -> list[str] | None:
        """The fields of a string made by `sign`, None when it was forged or has expired."""
        text, _, mac = signed.rpartition(".")
        if not hmac.compare_digest(mac.encode(), self._mac(text).encode()):
            return None
        *fields, expires = text.split(".")
        return fields if int(expires) > time.time() else None

    def _mac(self, text: str) -> str:
        return hmac.new(self._key, text.encode(), hashlib.sha256).hexdigest()
