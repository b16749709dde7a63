"""The action's surroundings: a step run as the runner runs it, and GitHub's API as GitHub describes it.

`act` starts the container's entry point with the variables and files of a runner, and reads its log by the runner's
own rules. `github_api` is Prism, which checks every request against GitHub's OpenAPI description, behind a recorder.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
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
import yaml
from filelock import FileLock

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".cache" / "github-openapi"
PRISM = "@stoplight/prism-cli@5.16.0"
DESCRIPTION = "@octokit/openapi@23.0.2"
CALLS = CACHE / "calls.json"
"""The part of the description that holds `CALLED`: Prism starts in a third of the time."""
CALLED = (
    "/zen",
    "/repos/{owner}/{repo}/actions/runs",
    "/repos/{owner}/{repo}/actions/runs/{run_id}",
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
REGISTERED = {"add-mask", "error", "warning", "notice", "debug", "group", "endgroup", "stop-commands", "set-output",
              "save-state", "set-env", "add-path", "add-matcher", "remove-matcher", "echo"}  # fmt: skip
"""The commands that the runner knows."""


# ------------------------------------------------------------------------------------------ a step of a job


@dataclass(frozen=True)
class Command:
    name: str
    properties: Mapping[str, str]
    data: str


@dataclass
class Step:
    """What a step left: exit code, log, the commands the runner would have obeyed, outputs, summary."""

    code: int
    log: str
    commands: list[Command]
    outputs: dict[str, str]
    summary: str
    workspace: Path

    def annotations(self, level: str) -> list[str]:
        return [command.data for command in self.commands if command.name == level]

    @property
    def results(self) -> list[dict[str, Any]]:
        return json.loads(self.outputs["results"])


def obeyed(log: str) -> list[Command]:
    """The commands in a log, by the rules of the runner's ActionCommand and ActionCommandManager."""
    found: list[Command] = []
    registered = set(REGISTERED)
    stopped: str | None = None
    for line in re.split(r"\r\n|\r|\n", log):
        command = _new_form(line, registered) or _old_form(line, registered)
        if command is None:
            continue
        if stopped is not None:
            if command.name == stopped:
                registered.discard(stopped)
                stopped = None
            continue
        if command.name == "stop-commands":
            stopped = command.data
            registered.add(stopped)
            continue
        found.append(command)
    assert stopped is None, "the log ends with commands stopped"
    return found


@pytest.fixture(scope="session")
def runner_obeys() -> Callable[[str], list[Command]]:
    """`runner_obeys(log)`: the commands that the runner takes from a log."""
    return obeyed


def _new_form(line: str, registered: set[str]) -> Command | None:
    match = re.match(r"\s*::([^:\s]+)(?: (.*?))?::(.*)$", line)
    if match is None or match[1] not in registered:
        return None
    properties = dict(pair.split("=", 1) for pair in (match[2] or "").split(",") if "=" in pair)
    return Command(match[1], {k: _decoded(v) for k, v in properties.items()}, _decoded(match[3]))


def _old_form(line: str, registered: set[str]) -> Command | None:
    match = re.search(r"##\[([^\]\s]+)(?: ([^\]]*))?\](.*)$", line)
    return Command(match[1], {}, match[3]) if match and match[1] in registered else None


def _decoded(text: str) -> str:
    for code, character in (("%3A", ":"), ("%2C", ","), ("%0A", "\n"), ("%0D", "\r"), ("%25", "%")):
        text = text.replace(code, character)
    return text


def read_outputs(text: str) -> dict[str, str]:
    """The file GITHUB_OUTPUT, as the runner reads it."""
    outputs: dict[str, str] = {}
    lines = iter(text.split("\n"))
    for line in lines:
        if not line:
            continue
        name, delimiter = line.split("<<", 1)
        value = []
        for inner in lines:
            if inner == delimiter:
                break
            value.append(inner)
        else:
            raise AssertionError(f"the output {name} does not end")
        outputs[name] = "\n".join(value)
    return outputs


@pytest.fixture(scope="session")
def definition() -> dict[str, Any]:
    """action.yml."""
    return yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """An empty GITHUB_WORKSPACE."""
    place = tmp_path / "github" / "workspace"
    place.mkdir(parents=True)
    return place


@pytest.fixture
def act(tmp_path: Path, workspace: Path, definition: dict[str, Any]) -> Callable[..., Step]:
    """`act("push", payload, inputs={…}, env={…})`: one step, in a process of its own."""
    count = iter(range(1000))

    def run(
        event_name: str = "workflow_dispatch",
        event: Mapping[str, Any] | None = None,
        *,
        inputs: Mapping[str, str] | None = None,
        env: Mapping[str, str] | None = None,
    ) -> Step:
        files = tmp_path / "github" / f"step-{next(count)}"
        (files / "home").mkdir(parents=True)
        for name in ("outputs", "summary"):
            (files / name).touch()
        (files / "event.json").write_text(json.dumps(event or {}), encoding="utf-8")
        values = {name: str(entry.get("default", "")) for name, entry in definition["inputs"].items()}
        values |= {"github-token": ""} | dict(inputs or {})
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(files / "home"),
            "LANG": "C.UTF-8",
            "OMP_NUM_THREADS": "1",
            "HF_HOME": os.environ["HF_HOME"],
            "HF_ENDPOINT": os.environ["HF_ENDPOINT"],
            "HF_HUB_DISABLE_TELEMETRY": "1",
            **{f"INPUT_{name.upper()}": value for name, value in values.items()},
            "GITHUB_WORKSPACE": str(workspace),
            "GITHUB_EVENT_NAME": event_name,
            "GITHUB_EVENT_PATH": str(files / "event.json"),
            "GITHUB_REPOSITORY": "octocat/adapters",
            "GITHUB_SHA": "6dcb09b5b57875f334f61aebed695e2e4193db5e",
            "GITHUB_REF": "refs/heads/main",
            "GITHUB_RUN_ID": "1658821493",
            "GITHUB_RUN_ATTEMPT": "1",
            "GITHUB_WORKFLOW": "Merge",
            "GITHUB_JOB": "merge",
            "GITHUB_OUTPUT": str(files / "outputs"),
            "GITHUB_STEP_SUMMARY": str(files / "summary"),
            **(env or {}),
        }
        done = subprocess.run(
            [str(Path(sys.executable).parent / "merge-adapter"), "action"],
            cwd=workspace,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=240,
            check=False,
        )
        log = done.stdout.decode()
        return Step(
            done.returncode,
            log,
            obeyed(log),
            read_outputs((files / "outputs").read_text(encoding="utf-8")),
            (files / "summary").read_text(encoding="utf-8"),
            workspace,
        )

    return run


@pytest.fixture
def git(workspace: Path) -> Callable[..., str]:
    """`git("commit", "-m", "…")` in the workspace, which is made a repository first."""

    def run(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-c", "user.name=Ada", "-c", "user.email=ada@example.org", *arguments],
            cwd=workspace,
            env={"PATH": os.environ["PATH"], "HOME": str(workspace.parent), "GIT_CONFIG_NOSYSTEM": "1"},
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.strip()

    run("init", "--quiet", "--initial-branch=main")
    return run


# ------------------------------------------------------------------------------------------ GitHub's API


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    """Without the query."""
    body: Any
    authorization: str


Answer = tuple[int, Any]


@dataclass
class GitHubApi:
    """Prism with a recorder before it; chosen requests can be answered otherwise, and are then checked all the same
    unless `unchecked`."""

    url: str = ""
    requests: list[Request] = field(default_factory=list)
    answers: list[tuple[str, re.Pattern[str], Callable[[Request], Answer]]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    """What Prism objected to."""

    def answer(self, method: str, path: str, status: int, body: Any = None) -> None:
        """Answer requests whose path matches the expression `path` in full."""
        self.answers.append((method, re.compile(path), lambda request: (status, body)))

    def sent(self, method: str, path: str) -> list[Request]:
        return [one for one in self.requests if one.method == method and re.fullmatch(path, one.path)]


@pytest.fixture(scope="session")
def prism() -> Iterator[str]:
    """URL of a server that answers as GitHub's own OpenAPI description says, and refuses what it does not allow."""
    program = _installed_prism()
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
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(timeout=10)
    log.unlink()


def _installed_prism() -> str:
    program = CACHE / "node_modules" / ".bin" / "prism"
    npm = shutil.which("npm")
    CACHE.mkdir(parents=True, exist_ok=True)
    stamp = CACHE / "installed"
    with FileLock(CACHE / "lock"):
        wanted = " ".join((PRISM, DESCRIPTION, *CALLED))
        if stamp.exists() and stamp.read_text() == wanted:
            return str(program)
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
        generated = CACHE / "node_modules/@octokit/openapi/generated"
        for file in generated.glob("*.json"):
            if file.name != "api.github.com.json":  # 360 MB of other editions
                file.unlink()
        CALLS.write_text(
            json.dumps(_only_called(json.loads((generated / "api.github.com.json").read_bytes())))
        )
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
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"Prism ended: {log.read_text()[-500:]}")
        try:
            urllib.request.urlopen(url, timeout=5).close()
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.1)
        else:
            return
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
            status, body = self.answered(request, data)
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = do_PATCH = do_PUT = do_DELETE = do

        def answered(self, request: Request, data: bytes) -> tuple[int, bytes]:
            own = self.own_answer(request)
            if request.path.endswith("/graphql"):  # not in the REST description
                return own or (200, b'{"data": {"viewer": {"login": "github-actions[bot]"}}}')
            status, body = self.ask_prism(data)
            if (status == 422 and b"stoplight.io" in body) or status >= 500:
                api.failures.append(f"{request.method} {request.path}: {body.decode()[:600]}")
            return own or (status, body)

        def own_answer(self, request: Request) -> tuple[int, bytes] | None:
            for method, path, answer in reversed(api.answers):
                if request.method == method and path.fullmatch(request.path):
                    status, body = answer(request)
                    return status, b"" if body is None else json.dumps(body).encode()
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
                with urllib.request.urlopen(forward, timeout=30) as response:
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
