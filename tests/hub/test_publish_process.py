"""`merge-adapter publish` as a process: killed in the middle, without a stored token, and what it lets out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from huggingface_hub import HfApi

from localhub.faults import Answer, Delay, FaultProxy, Rule
from localhub.process import LocalHub
from merge_adapter.errors import ExitCode

WAIT_SECONDS = 300.0


def command(folder: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "merge_adapter", "publish", str(folder), "--json", *options]


def environment(url: str, home: Path, **extra: str) -> dict[str, str]:
    """A home of its own: no cache, no stored login, no chunks that xet remembers."""
    return {
        **os.environ,
        "HF_ENDPOINT": url,
        "HF_HOME": str(home),
        "HF_XET_CACHE": str(home / "xet"),
        **extra,
    }


def run(folder: Path, env: Mapping[str, str], *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(folder, *options),
        env=dict(env),
        capture_output=True,
        text=True,
        timeout=WAIT_SECONDS,
        check=False,
    )


def test_a_run_that_is_killed_while_uploading_is_continued(
    world, shared_base: str, tokens, tmp_path: Path
) -> None:
    """kill -9 leaves a draft without files; the next run fills that very draft and makes it ready."""
    adapter = world.adapter()
    merged = world.merged(adapter, shared_base)
    with FaultProxy(world.url) as proxy:
        rule = proxy.add(Rule(Delay(WAIT_SECONDS), method="POST", path=r"/commit/"))
        env = environment(proxy.url, tmp_path / "home", HF_TOKEN=tokens["ann"])
        process = subprocess.Popen(
            command(merged.folder), env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        deadline = time.monotonic() + WAIT_SECONDS
        while not rule.struck and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert rule.struck
        assert tokens["ann"].encode() not in Path(f"/proc/{process.pid}/cmdline").read_bytes()
        process.kill()
        process.communicate()
        repo_id = f"{adapter}-merged"
        assert world.pulls(repo_id) == [(1, "draft", "ann")]
        assert "config.json" not in world.hub().open(repo_id, revision="refs/pr/1").files
        proxy.clear()
        done = run(merged.folder, env)
        sent_again = [one for one in proxy.seen if "xorb" in one.target and one.method == "POST"]
    assert done.returncode == ExitCode.DONE, done.stderr
    assert json.loads(done.stdout)["publication"]["number"] == 1
    assert world.pulls(repo_id) == [(1, "open", "ann")]
    assert sent_again == []  # every chunk was there already


@pytest.mark.parametrize("status", [403, 401, 500])
def test_no_output_of_a_failure_holds_a_token(
    world, shared_base: str, tokens, tmp_path: Path, status: int
) -> None:
    """Not even where the server sends it back, and with the client's debug log switched on."""
    merged = world.merged(world.adapter(), shared_base)
    with FaultProxy(world.url) as proxy:
        message = f"Bad header Authorization: Bearer {tokens['ann']}"
        proxy.add(Rule(Answer(status, message=message, retry_after=3600), path="/discussions"))
        env = environment(proxy.url, tmp_path / "home", HF_TOKEN=tokens["ann"], HF_DEBUG="1")
        done = run(merged.folder, env)
    assert done.returncode == ExitCode.REMOTE, done.stderr
    assert tokens["ann"] not in done.stdout
    assert f"HTTP {status}" in done.stderr or "does not accept" in done.stderr
    ours = [line for line in done.stderr.splitlines() if "Bad header" in line]
    assert all("<token>" in line for line in ours)
    assert tokens["ann"] not in done.stderr


def test_without_any_token_the_message_says_how_to_get_one(world, shared_base: str, tmp_path: Path) -> None:
    """Reading public sources works; writing needs somebody."""
    merged = world.merged(world.adapter(), shared_base)
    done = run(merged.folder, environment(world.url, tmp_path / "home"))
    assert done.returncode == ExitCode.REMOTE
    assert "HF_TOKEN is not set" in done.stderr
    assert "hf auth login" in done.stderr


class Runner:
    """What GitHub Actions gives a job with `id-token: write`: a URL that mints id tokens, and the issuer's keys."""

    def __init__(self) -> None:
        self.key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        public = json.loads(jwt.algorithms.RSAAlgorithm.to_jwk(self.key.public_key()))
        keys = {"keys": [{**public, "kid": "one", "use": "sig", "alg": "RS256"}]}
        runner = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                parts = urlsplit(self.path)
                if parts.path == "/jwks":
                    answer = keys
                else:
                    assert self.headers["Authorization"] == "Bearer request-secret"
                    answer = {"value": runner.mint(parse_qs(parts.query)["audience"][0])}
                content = json.dumps(answer).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def mint(self, audience: str) -> str:
        now = int(time.time())
        claims = {
            "iss": self.url,
            "sub": "repo:ann/training:ref:refs/heads/main",
            "aud": audience,
            "iat": now,
            "exp": now + 300,
            "repository": "ann/training",
        }
        return jwt.encode(claims, self.key, algorithm="RS256", headers={"kid": "one"})


@pytest.fixture
def runner() -> Iterator[Runner]:
    running = Runner()
    thread = threading.Thread(target=running.server.serve_forever, args=(0.05,))
    thread.start()
    yield running
    running.server.shutdown()
    running.server.server_close()
    thread.join()


def test_a_workflow_publishes_without_a_stored_token(world, runner: Runner, tmp_path: Path, tokens) -> None:
    """The id token of the job is exchanged for one that writes to the target alone."""
    publisher = {
        "resource": "ann/model-merged",
        "issuer": runner.url,
        "jwks_uri": f"{runner.url}/jwks",
        "claims": {"repository": "ann/training"},
        "user": "ann",
    }
    options = [f"--trusted-publisher={json.dumps(publisher)}"]
    merged = world.merged(None, None)
    with LocalHub(tmp_path / "hub", {"ann": tokens["ann"]}, options=options) as hub:
        env = environment(
            hub.url,
            tmp_path / "home",
            GITHUB_ACTIONS="true",
            HF_OIDC_RESOURCE="ann/model-merged",
            ACTIONS_ID_TOKEN_REQUEST_URL=f"{runner.url}/mint?api-version=2",
            ACTIONS_ID_TOKEN_REQUEST_TOKEN="request-secret",
        )
        missing = run(merged.folder, env, "--target-repo", "ann/model-merged")
        assert missing.returncode == ExitCode.REMOTE
        assert "creates no repository" in missing.stderr
        HfApi(endpoint=hub.url, token=tokens["ann"]).create_repo("ann/model-merged")
        done = run(merged.folder, env, "--target-repo", "ann/model-merged")
        assert done.returncode == ExitCode.DONE, done.stderr
        assert json.loads(done.stdout)["publication"]["operation"] == "created"
        unknown = run(merged.folder, {**env, "HF_OIDC_RESOURCE": "ann/elsewhere"}, "--target-repo", "ann/x")
        assert unknown.returncode == ExitCode.REMOTE
        assert "Trusted Publisher" in unknown.stderr
        no_permission = {name: value for name, value in env.items() if not name.startswith("ACTIONS_")}
        refused = run(merged.folder, no_permission, "--target-repo", "ann/model-merged")
        assert refused.returncode == ExitCode.REMOTE
        assert "id-token: write" in refused.stderr
    for process in (missing, done, unknown, refused):
        assert "request-secret" not in process.stdout + process.stderr
