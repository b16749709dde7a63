"""A proxy in front of a Hub that breaks things on purpose.

    with FaultProxy(hub.url) as proxy:
        proxy.add(Rule(method="POST", path=r"/commit/", fault=LoseAnswer(), times=1))
        HfApi(endpoint=proxy.url, token="hf_alice").create_commit(...)

or `python -m localhub.faults --upstream URL --rule JSON`. The Host header is passed on, so that the Hub's
answers (redirects, xet and storage addresses) lead through the proxy again.
"""

from __future__ import annotations

import argparse
import http.client
import json
import re
import socket
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

_BLOCK = 16 * 1024
_SHORTEST_WAIT = 0.002
"""Seconds: a shorter sleep takes longer than it says."""
_HOP_BY_HOP = frozenset(
    {"connection", "keep-alive", "transfer-encoding", "te", "upgrade", "proxy-connection"}
)


@dataclass(frozen=True)
class Answer:
    """Answer with a status of its own; the Hub never sees the request."""

    status: int
    retry_after: float | None = None
    """Seconds, as a Retry-After header."""
    code: str = ""
    """X-Error-Code."""
    message: str = "Injected fault"


@dataclass(frozen=True)
class ExpiredToken:
    """Answer as the Hub does to a token that has expired."""


@dataclass(frozen=True)
class Cut:
    """Pass the request on and close the connection after some bytes of the answer's body."""

    after: int = 0


@dataclass(frozen=True)
class CutRequest:
    """Close the connection before the request is passed on."""


@dataclass(frozen=True)
class LoseAnswer:
    """Let the Hub do the work, then close the connection without an answer."""


@dataclass(frozen=True)
class Delay:
    """Wait before the request is passed on."""

    seconds: float


@dataclass(frozen=True)
class Throttle:
    """Pass the answer's body on no faster than this."""

    bytes_per_second: float


Fault = Answer | ExpiredToken | Cut | CutRequest | LoseAnswer | Delay | Throttle
FAULTS: dict[str, type[Fault]] = {
    "answer": Answer,
    "expired-token": ExpiredToken,
    "cut": Cut,
    "cut-request": CutRequest,
    "lose-answer": LoseAnswer,
    "delay": Delay,
    "throttle": Throttle,
}


@dataclass
class Rule:
    """Which requests a fault strikes."""

    fault: Fault
    method: str = ""
    """Upper case; "" for every method."""
    path: str = ""
    """A regular expression that is searched in path and query, as they were sent (encoded)."""
    times: int | None = None
    """How often it strikes; None for always."""
    skip: int = 0
    """How many matching requests pass before the first strike."""
    struck: int = field(default=0, init=False)
    """How often it has struck."""

    def matches(self, method: str, target: str) -> bool:
        return self.method in ("", method) and re.search(self.path, target) is not None


@dataclass(frozen=True)
class Seen:
    """One request that came to the proxy."""

    method: str
    target: str
    fault: Fault | None
    status: int | None
    """What the client was answered; None when the connection was cut."""


class Line:
    """A line of limited bandwidth that all connections share. Thread-safe."""

    def __init__(self, bytes_per_second: float | None) -> None:
        """None: no limit."""
        self._rate = bytes_per_second
        self._free_at = 0.0
        self._lock = threading.Lock()
        self.bytes = 0
        """Passed so far."""

    def carry(self, amount: int) -> None:
        """Return when `amount` bytes have passed, those of others that came before among them."""
        with self._lock:
            self.bytes += amount
            if self._rate is None:
                return
            self._free_at = max(self._free_at, time.monotonic()) + amount / self._rate
            wait = self._free_at - time.monotonic()
        if wait > _SHORTEST_WAIT:
            time.sleep(wait)


class FaultProxy:
    """The proxy, served from threads of this process while the `with` block lasts.

    `download` and `upload` limit the bodies of all answers together, and of all requests, in bytes per second.
    """

    def __init__(
        self,
        upstream: str,
        rules: Sequence[Rule] = (),
        *,
        port: int = 0,
        download: float | None = None,
        upload: float | None = None,
    ) -> None:
        parts = urlsplit(upstream)
        if parts.scheme != "http" or not parts.hostname:
            raise ValueError(f"upstream must be http://host:port, got {upstream!r}")
        self.upstream = (parts.hostname, parts.port or 80)
        self.down, self.up = Line(download), Line(upload)
        self._rules = list(rules)
        self._seen: list[Seen] = []
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", port), _Handler)
        self._server.proxy = self
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    @property
    def url(self) -> str:
        """What HF_ENDPOINT is set to."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def seen(self) -> tuple[Seen, ...]:
        """All requests that were answered so far, in that order; whoever has an answer finds its request here."""
        with self._lock:
            return tuple(self._seen)

    def add(self, rule: Rule) -> Rule:
        """Let a rule hold from now on. The first one that matches a request decides."""
        with self._lock:
            self._rules.append(rule)
        return rule

    def clear(self) -> None:
        """Let everything through again, and forget what was seen."""
        with self._lock:
            self._rules.clear()
            self._seen.clear()

    def strike(self, method: str, target: str) -> Fault | None:
        """The fault for a request, if one strikes; counts it."""
        with self._lock:
            for rule in self._rules:
                if not rule.matches(method, target) or (rule.times is not None and rule.struck >= rule.times):
                    continue
                if rule.skip > 0:
                    rule.skip -= 1
                    continue
                rule.struck += 1
                return rule.fault
        return None

    def note(self, seen: Seen) -> None:
        with self._lock:
            self._seen.append(seen)

    def serve_forever(self) -> None:
        """Serve in this thread until KeyboardInterrupt."""
        self._server.serve_forever()

    def __enter__(self) -> FaultProxy:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128
    proxy: FaultProxy

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Connections that clients give up are no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # with it, each answer of two writes waits 40 ms
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""

    def _serve(self) -> None:
        self._fault = self.server.proxy.strike(self.command, self.path)
        self._noted = False
        try:
            self._treat(self._fault, self._body())
        finally:
            self._note(None)

    def _note(self, status: int | None) -> None:
        """Note the request, once: before the client can know that it has been answered."""
        if not self._noted:
            self._noted = True
            self.server.proxy.note(Seen(self.command, self.path, self._fault, status))

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = _serve

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            return self._chunked()
        left, parts = int(self.headers.get("Content-Length") or 0), []
        while left and (part := self.rfile.read(min(left, _BLOCK))):
            self.server.proxy.up.carry(len(part))
            parts.append(part)
            left -= len(part)
        return b"".join(parts)

    def _chunked(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.server.proxy.up.carry(size)
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(parts)

    def _treat(self, fault: Fault | None, body: bytes) -> None:
        """Answer as the fault says."""
        if isinstance(fault, ExpiredToken):
            return self._refuse(Answer(401, message="Invalid credentials in Authorization header"))
        if isinstance(fault, Answer):
            return self._refuse(fault)
        if isinstance(fault, CutRequest):
            return self._cut()
        if isinstance(fault, Delay):
            time.sleep(fault.seconds)
        return self._forward(fault, body)

    def _refuse(self, fault: Answer) -> None:
        self._note(fault.status)
        content = json.dumps({"error": fault.message}).encode()
        self.send_response(fault.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Error-Message", fault.message)
        if fault.code:
            self.send_header("X-Error-Code", fault.code)
        if fault.retry_after is not None:
            self.send_header("Retry-After", f"{fault.retry_after:g}")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _cut(self) -> None:
        """End the connection; there is no status to tell."""
        self._note(None)
        self.close_connection = True
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)

    def _forward(self, fault: Fault | None, body: bytes) -> None:
        connection = http.client.HTTPConnection(*self.server.proxy.upstream, timeout=300)
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in _HOP_BY_HOP | {"content-length"}:
                    connection.putheader(name, value)
            connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            answer = connection.getresponse()
            if isinstance(fault, LoseAnswer):
                answer.read()
                return self._cut()
            return self._pass_on(answer, fault)
        except ConnectionError:
            return self._refuse(Answer(502, message="The Hub behind the proxy is down"))
        finally:
            connection.close()

    def _pass_on(self, answer: http.client.HTTPResponse, fault: Fault | None) -> None:
        self.send_response_only(answer.status, answer.reason)
        length = answer.getheader("Content-Length")
        for name, value in answer.getheaders():
            if name.lower() not in _HOP_BY_HOP:
                self.send_header(name, value)
        chunked = length is None and self.command != "HEAD" and answer.status not in (204, 304)
        if chunked:
            self.send_header("Transfer-Encoding", "chunked")
        left = fault.after if isinstance(fault, Cut) else None
        if left is None and not chunked and (self.command == "HEAD" or not answer.length):
            self._note(answer.status)
        self.end_headers()
        while self.command != "HEAD" and (block := answer.read1(_BLOCK)):
            part = block if left is None else block[:left]
            if left is None and answer.length == 0:  # the last one
                self._note(answer.status)
            self.wfile.write(b"%x\r\n%b\r\n" % (len(part), part) if chunked and part else part)
            self.server.proxy.down.carry(len(part))
            if isinstance(fault, Throttle):
                time.sleep(len(part) / fault.bytes_per_second)
            if left is not None:
                left -= len(part)
                if left <= 0:
                    break
        if left is not None:
            self._cut()
            return
        self._note(answer.status)
        if chunked:
            self.wfile.write(b"0\r\n\r\n")


def parse_rule(text: str) -> Rule:
    """A rule from JSON: {"fault": "answer", "status": 503, "method": "POST", "path": "/commit/", "times": 1}.

    Raises:
        ValueError: an unknown fault or field.
    """
    given = json.loads(text)
    name = given.pop("fault", None)
    if name not in FAULTS:
        raise ValueError(f"fault must be one of {sorted(FAULTS)}, got {name!r}")
    rule = {key: given.pop(key) for key in ("method", "path", "times", "skip") if key in given}
    try:
        return Rule(FAULTS[name](**given), **rule)
    except TypeError as error:
        raise ValueError(f"fault {name}: {error}") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until SIGINT; the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m localhub.faults",
        description="A proxy in front of a Hub that breaks things on purpose.",
    )
    parser.add_argument("--upstream", required=True, help="URL of the Hub")
    parser.add_argument("--port", type=int, default=0, help="port to listen on; 0 (default) takes a free one")
    parser.add_argument(
        "--rule",
        action="append",
        default=[],
        metavar="JSON",
        help='such as {"fault": "answer", "status": 503, "path": "/commit/", "times": 2}; faults are '
        + ", ".join(FAULTS),
    )
    for way in ("download", "upload"):
        parser.add_argument(f"--{way}", type=float, metavar="N", help="bytes a second at most, in all")
    options = parser.parse_args(arguments)
    try:
        rules = [parse_rule(text) for text in options.rule]
        proxy = FaultProxy(
            options.upstream, rules, port=options.port, download=options.download, upload=options.upload
        )
    except ValueError as error:
        sys.stderr.write(f"localhub.faults: {error}\n")
        return 2
    sys.stdout.write(f"{proxy.url}\n")
    sys.stdout.flush()
    try:
        proxy.serve_forever()
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
