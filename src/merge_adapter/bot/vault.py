"""Users' tokens, sealed: what lies in the store or a backup of it is of no use without the key."""

from __future__ import annotations

import base64
import hashlib
import os
import secrets

from cryptography.fernet import Fernet, InvalidToken

from merge_adapter.bot.settings import BotSettings
from merge_adapter.errors import InputError, StorageError


class Vault:
    """Seals and opens short secrets (AES-128-CBC and HMAC-SHA256, as Fernet defines it)."""

    def __init__(self, key: str) -> None:
        self._fernet = Fernet(base64.urlsafe_b64encode(hashlib.sha256(key.encode()).digest()))

    def seal(self, secret: str) -> bytes:
        return self._fernet.encrypt(secret.encode())

    def open(self, sealed: bytes) -> str:
        """Raises InputError when it was sealed with another key."""
        try:
            return self._fernet.decrypt(sealed).decode()
        except InvalidToken:
            raise InputError(
                "a stored token cannot be opened: the bot's secret_key changed since it was sealed",
                hint="Log in again and submit the job again.",
            ) from None


def open_vault(settings: BotSettings) -> Vault:
    """The vault of these settings; its key is made on first use where none is set."""
    if settings.secret_key:
        return Vault(settings.secret_key)
    path = settings.data / "secret.key"
    try:
        settings.data.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"secret.key.{os.getpid()}")
        if not path.exists():
            descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(descriptor, "w") as file:
                file.write(secrets.token_urlsafe(32))
                file.flush()
                os.fsync(file.fileno())
            try:
                os.link(part, path)  # fails where another process was faster, whose key then counts
            except FileExistsError:
                pass
            finally:
                part.unlink()
        return Vault(path.read_text())
    except OSError as error:
        raise StorageError(
            f"the bot's key {path} cannot be kept: {error.strerror}", hint="Check the data folder."
        ) from error
