"""GitHub's API as GitHub describes it: `github_api` is Prism, which checks every request against GitHub's OpenAPI
description, behind a recorder.
"""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".cache" / "github-openapi"
PRISM = "@stoplight/prism-cli@5.16.0"
DESCRIPTION = "@octokit/openapi@23.0.2"
CALLS = CACHE / "calls.json"
"""The part of the description that holds `CALLED`: Prism starts in a third of the time."""
STORAGE = "/storage/"
"""Where the tests keep what GitHub keeps on hosts of its storage."""
CALLED = (
    "/zen",
    "/repos/{owner}/{repo}/actions/artifacts/{artifact_id}/{archive_format}",
    "/repos/{owner}/{repo}/actions/runs",
    "/repos/{owner}/{repo}/actions/runs/{run_id}",
    "/repos/{owner}/{repo}/actions/runs/{run_id}/artifacts",
    "/repos/{owner}/{repo}/actions/runs/{run_id}/cancel",
    "/repos/{owner}/{repo}/check-runs",
    "/repos/{owner}/{repo}/compare/{basehead}",
    "/repos/{owner}/{repo}/dispatches",
    "/repos/{owner}/{repo}/issues",
    "/repos/{owner}/{repo}/issues/comments/{comment_id}",
    "/repos/{owner}/{repo}/issues/{issue_number}",
    "/repos/{owner}/{repo}/issues/{issue_number}/comments",
    "/repos/{owner}/{repo}/pulls/{pull_number}",
    "/repos/{owner}/{repo}/pulls/{pull_number}/files",
    "/repos/{owner}/{repo}/releases/assets/{asset_id}",
    "/repos/{owner}/{repo}/releases/{release_id}",
    "/repos/{owner}/{repo}/releases/{release_id}/assets",
    "/repos/{owner}/{repo}/statuses/{sha}",
)


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    """Without the query."""
    body: Any
    authorization: str


@dataclass(frozen=True)
class Answer:
    status: int
    body: Any = None
    """Sent as JSON, bytes as they are."""
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass
class GitHubApi:
    """Prism with a recorder before it; chosen requests can be answered otherwise, and are then checked all the same
    unless `unchecked`."""

    url: str = ""
    requests: list[Request] = field(default_factory=list)
    answers: list[tuple[str, re.Pattern[str], Callable[[Request], Answer]]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    """What Prism objected to."""

    def answer(self, method: str, path: str, status: int, body: Any = None, **headers: str) -> None:
        """Answer requests whose path matches the expression `path` in full."""
        self.answer_by(method, path, lambda request: Answer(status, body, headers))

    def answer_by(self, method: str, path: str, answer: Callable[[Request], Answer]) -> None:
        """Let a function answer such requests."""
        self.answers.append((method, re.compile(path), answer))

    def sent(self, method: str, path: str) -> list[Request]:
        return [one for one in self.requests if one.method == method and re.fullmatch(path, one.path)]


@pytest.fixture(scope="session")
def prism() -> Iterator[str]:
    """URL of a server that answers as GitHub's own OpenAPI description says, and refuses what it does not allow."""
    program = _installed_prism()
    for attempt in reversed(range(3)):
        # Prism takes no port by itself. Somebody else may take the one found here before Prism does.
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        log = CACHE / f"prism-{port}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [program, "mock", "--host", "127.0.0.1", "--port", str(port), str(CALLS)],
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        try:
            _wait_for(f"http://127.0.0.1:{port}/zen", process, log)
        except RuntimeError:
            _end(process)
            if attempt == 0:
                raise
        else:
            break
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        _end(process)
    log.unlink()


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(timeout=60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _installed_prism() -> str:
    program = CACHE / "node_modules" / ".bin" / "prism"
    npm = shutil.which("npm")
    CACHE.mkdir(parents=True, exist_ok=True)
    stamp = CACHE / "installed"
    with FileLock(CACHE / "lock"):
        packages, wanted = f"{PRISM} {DESCRIPTION}", " ".join((PRISM, DESCRIPTION, *CALLED))
        found = stamp.read_text() if stamp.exists() else ""
        if found == wanted:
            return str(program)
        if found.startswith(packages):
            return _described(program, stamp, wanted)
        if npm is None:
            pytest.skip(
                "npm is not installed: Prism, which serves GitHub's own API description, comes from there"
            )
        done = subprocess.run(
            [
                npm,
                "install",
                "--prefix",
                str(CACHE),
                "--no-audit",
                "--no-fund",
                "--silent",
                PRISM,
                DESCRIPTION,
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            pytest.skip(f"npm could not install Prism: {done.stderr.strip()[-300:]}")
        return _described(program, stamp, wanted)


def _described(program: Path, stamp: Path, wanted: str) -> str:
    """Keep the part of the installed description that is called."""
    generated = CACHE / "node_modules/@octokit/openapi/generated"
    for file in generated.glob("*.json"):
        if file.name != "api.github.com.json":  # 360 MB of other editions
            file.unlink()
    CALLS.write_text(json.dumps(_only_called(json.loads((generated / "api.github.com.json").read_bytes()))))
    stamp.write_text(wanted)
    return str(program)


def _only_called(description: dict[str, Any]) -> dict[str, Any]:
    """The description with the paths in CALLED alone, and the components that they reach."""
    paths = {path: description["paths"][path] for path in CALLED}
    reached: dict[str, dict[str, Any]] = {}
    pending = [paths]
    while pending:
        for reference in re.findall(r'"#/components/([^"/]+)/([^"]+)"', json.dumps(pending.pop())):
            kind, name = reference
            if name not in reached.setdefault(kind, {}):
                reached[kind][name] = description["components"][kind][name]
                pending.append(reached[kind][name])
    return {**description, "paths": paths, "components": reached, "x-webhooks": {}, "webhooks": {}}


def _wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + 240
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"Prism ended: {log.read_text()[-500:]}")
        try:
            urllib.request.urlopen(url, timeout=30).close()
        except urllib.error.HTTPError:
            answered = True
        except OSError:
            answered = False
        else:
            answered = True
        # It says so itself: another server may have the port.
        if answered and b"listening" in log.read_bytes():
            return
        time.sleep(0.1)
    raise RuntimeError(f"Prism did not start: {log.read_text()[-500:]}")


@pytest.fixture
def github_api(prism: str) -> Iterator[GitHubApi]:
    """A fresh recorder before the session's Prism."""
    api = GitHubApi()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(api, prism))
    api.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield api
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    assert not api.failures, api.failures


class _Still(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: those of the description's examples leave this machine."""

    def redirect_request(self, *_: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_Still)


def _handler(api: GitHubApi, prism: str) -> type[BaseHTTPRequestHandler]:
    class Recorder(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do(self) -> None:
            data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            is_json = "json" in (self.headers.get("Content-Type") or "")
            request = Request(
                self.command,
                self.path.partition("?")[0],
                json.loads(data) if data and is_json else data,
                self.headers.get("Authorization") or "",
            )
            api.requests.append(request)
            status, body, headers = self.answered(request, data)
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = do_PATCH = do_PUT = do_DELETE = do

        def answered(self, request: Request, data: bytes) -> tuple[int, bytes, Mapping[str, str]]:
            own = self.own_answer(request)
            if request.path.endswith("/graphql"):  # not in the REST description
                return own or (200, b'{"data": {"viewer": {"login": "github-actions[bot]"}}}', {})
            if request.path.startswith(STORAGE):  # not GitHub's API: where it keeps artifacts
                return own or (404, b"", {})
            status, body = self.ask_prism(data)
            if (status == 422 and b"stoplight.io" in body) or status >= 500:
                api.failures.append(f"{request.method} {request.path}: {body.decode()[:600]}")
            return own or (status, body, {})

        def own_answer(self, request: Request) -> tuple[int, bytes, Mapping[str, str]] | None:
            for method, path, make in reversed(api.answers):
                if request.method == method and path.fullmatch(request.path):
                    answer = make(request)
                    is_raw = isinstance(answer.body, bytes)
                    body = (
                        answer.body
                        if is_raw
                        else b""
                        if answer.body is None
                        else json.dumps(answer.body).encode()
                    )
                    return answer.status, body, answer.headers
            return None

        def ask_prism(self, data: bytes) -> tuple[int, bytes]:
            headers = {
                name: value
                for name, value in self.headers.items()
                if name.lower() not in ("host", "connection", "content-length", "accept-encoding")
            }
            forward = urllib.request.Request(  # the test's own Prism
                prism + self.path, data=data or None, headers=headers, method=self.command
            )
            try:
                with _OPENER.open(forward, timeout=240) as response:
                    status, body = response.status, response.read()
            except urllib.error.HTTPError as error:
                with error:
                    status, body = error.code, error.read()
            for host in (b"https://api.github.com", b"https://uploads.github.com"):
                body = body.replace(host, api.url.encode())
            return status, body

        def log_message(self, *arguments: object) -> None:
            pass

    return Recorder
