"""A small webhook receiver for the demo: it checks the secret, reads the payload and remembers pushes.

The bot (`merge-adapter serve`) is the one for real use: it keeps a queue that survives a restart.
"""

from __future__ import annotations

import hmac
import json
import queue
import re
import threading
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

_LARGEST = 1 << 20
"""Bytes of a payload read at most."""
_REPO_ID = re.compile(r"[\w][\w.-]{0,95}/[\w][\w.-]{0,95}", re.ASCII)
_SHA = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Push:
    """New content on the main branch of a model repository."""

    repo_id: str
    sha: str


def read_push(payload: Any) -> Push | None:
    """The push a webhook's payload (version 3) tells of, None when it tells of something else.

    Pull requests (`refs/pr/N`) do not count: the bot's own would set it off again. The payload is untrusted;
    only a name and a sha of the right form are taken from it.
    """
    try:
        event, repo, refs = payload["event"], payload["repo"], payload["updatedRefs"]
        if event["scope"] != "repo.content" or repo["type"] != "model":
            return None
        heads = [ref["newSha"] for ref in refs if ref["ref"] == "refs/heads/main" and ref["newSha"]]
        if heads and _REPO_ID.fullmatch(repo["name"]) and _SHA.fullmatch(heads[-1]):
            return Push(repo["name"], heads[-1])
    except (KeyError, TypeError):
        pass
    return None


class Receiver:
    """An HTTP server on 127.0.0.1 that lives as long as the `with` block.

    `secret` must arrive in the header X-Webhook-Secret, or the delivery is refused.
    """

    def __init__(self, secret: str) -> None:
        self._pushes: queue.Queue[Push] = queue.Queue()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(secret, self._pushes))
        self._thread = threading.Thread(
            target=self._server.serve_forever, name="webhook-receiver", daemon=True
        )

    @property
    def url(self) -> str:
        """Where deliveries go."""
        return f"http://127.0.0.1:{self._server.server_address[1]}/webhook"

    def wait(self, seconds: float) -> Push | None:
        """The next push, None when none came in time."""
        try:
            return self._pushes.get(timeout=seconds)
        except queue.Empty:
            return None

    def __enter__(self) -> Receiver:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _handler(secret: str, pushes: queue.Queue[Push]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = 10  # seconds a sender may be silent

        def do_POST(self) -> None:
            given = self.headers.get("X-Webhook-Secret", "")
            if not hmac.compare_digest(given.encode(), secret.encode()):
                self._answer(HTTPStatus.UNAUTHORIZED)
                return
            length = self.headers.get("Content-Length", "")
            if not length.isdecimal() or int(length) > _LARGEST:
                self._answer(
                    HTTPStatus.REQUEST_ENTITY_TOO_LARGE if length.isdecimal() else HTTPStatus.LENGTH_REQUIRED
                )
                return
            try:
                payload = json.loads(self.rfile.read(int(length)))
            except (ValueError, RecursionError):
                self._answer(HTTPStatus.BAD_REQUEST)
                return
            push = read_push(payload)
            if push is not None:
                pushes.put(push)
            self._answer(HTTPStatus.ACCEPTED)

        def _answer(self, status: HTTPStatus) -> None:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *arguments: object) -> None:
            """Say nothing: the terminal belongs to the story."""

    return Handler
