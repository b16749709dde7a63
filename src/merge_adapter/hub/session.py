"""Calls that a lost answer cannot harm, repeated until the Hub is back; and deadlines for all of them.

The client retries downloads and uploads by itself, but not its plain GETs, and it waits for an answer without
limit.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import httpx2
from huggingface_hub import set_client_factory
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]  # exported lazily
from huggingface_hub.utils._http import default_client_factory

T = TypeVar("T")

RETRIED_STATUSES = frozenset({408, 429, 500, 502, 503, 504})
LOST_CONNECTION = (httpx2.TimeoutException, httpx2.NetworkError, httpx2.RemoteProtocolError)
"""No whole answer came; whether the request was carried out is not known."""

_DEADLINES = httpx2.Timeout(120.0, connect=20.0)
"""Seconds without a single byte. A commit of thousands of files is answered well within it."""


@dataclass(frozen=True)
class Patience:
    """How long a call that may be repeated is repeated."""

    attempts: int = 6
    first_wait: float = 1.0
    """Seconds before the second attempt; doubled each time."""
    longest_wait: float = 30.0
    """Seconds: no single wait is longer, and a Retry-After beyond `retry_after_limit` ends the attempts."""
    retry_after_limit: float = 300.0

    def wait(self, attempt: int, retry_after: float | None) -> float:
        """Seconds to wait after failed attempt number `attempt`, counted from 0."""
        if retry_after is not None:
            return retry_after
        return float(min(self.longest_wait, self.first_wait * 2**attempt))


_prepared = threading.Event()
_preparing = threading.Lock()


def prepare_client() -> None:
    """Give the client's shared session deadlines, and leave the showing of progress to us. Once per process.

    Setting a factory closes the session under whoever is using it.
    """
    with _preparing:
        if not _prepared.is_set():
            set_client_factory(_client_with_deadlines)
            disable_progress_bars()
            _prepared.set()


def repeat(call: Callable[[], T], patience: Patience) -> T:
    """The result of `call`, which must be safe to repeat; its last error when patience runs out."""
    for attempt in range(patience.attempts):
        try:
            return call()
        except HfHubHTTPError as error:
            wait = patience.wait(attempt, retry_after(error.response))
            gives_up = error.response.status_code not in RETRIED_STATUSES or wait > patience.retry_after_limit
            if gives_up or attempt == patience.attempts - 1:
                raise
        except LOST_CONNECTION:
            wait = patience.wait(attempt, None)
            if attempt == patience.attempts - 1:
                raise
        time.sleep(wait)
    raise AssertionError("at least one attempt is made")


def once(send: Callable[[], T], look: Callable[[], T | None], patience: Patience) -> T:
    """Carry out `send`, which must not happen twice.

    When no answer comes, or the server fails with one that does not say whether it acted, `look` tells what became of
    it; only when it finds nothing is it sent again. A 429 was not acted on.
    """
    for attempt in range(patience.attempts):
        try:
            return send()
        except HfHubHTTPError as error:
            wait = patience.wait(attempt, retry_after(error.response))
            if error.response.status_code not in RETRIED_STATUSES or wait > patience.retry_after_limit:
                raise
            failure: Exception = error
        except LOST_CONNECTION as error:
            wait = patience.wait(attempt, None)
            failure = error
        found = look()
        if found is not None:
            return found
        if attempt == patience.attempts - 1:
            raise failure
        time.sleep(wait)
    raise AssertionError("at least one attempt is made")


def retry_after(response: httpx2.Response) -> float | None:
    """Seconds that the server asks to wait, when it says so in seconds."""
    value = response.headers.get("Retry-After", "").strip()
    return float(value) if value.isdigit() else None


def _client_with_deadlines() -> httpx2.Client:
    client = default_client_factory()
    client.timeout = _DEADLINES
    return client
