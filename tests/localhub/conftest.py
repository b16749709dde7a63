"""A real Hub process, real clients, and a real receiver of webhooks."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from localhub.process import LocalHub

_numbers = itertools.count()
TOKENS = {"alice": "hf_alice", "bob": "hf_bob", "carol": "hf_carol:read"}


@pytest.fixture(scope="session")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalHub]:
    """One Hub for all tests of this folder; each uses repositories of its own."""
    data = tmp_path_factory.mktemp("hub")
    organizations = {"acme": ["alice:admin", "bob:read"]}
    with LocalHub(data, TOKENS, organizations, options=["--run-jobs"]) as running:
        yield running


@pytest.fixture(scope="session", autouse=True)
def xet_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """hf_xet reads this when its first session starts, so it must be set before any upload."""
    cache = tmp_path_factory.mktemp("xet")
    old = os.environ.get("HF_XET_CACHE")
    os.environ["HF_XET_CACHE"] = str(cache)
    yield cache
    if old is None:
        del os.environ["HF_XET_CACHE"]
    else:
        os.environ["HF_XET_CACHE"] = old


@pytest.fixture(scope="session")
def api(hub: LocalHub) -> Callable[[str | bool], HfApi]:
    """The client of a user (by token), or of nobody (False)."""
    return lambda token: HfApi(endpoint=hub.url, token=token)


@pytest.fixture
def alice(api: Callable[[str | bool], HfApi]) -> HfApi:
    return api("hf_alice")


@pytest.fixture
def bob(api: Callable[[str | bool], HfApi]) -> HfApi:
    return api("hf_bob")


@pytest.fixture
def nobody(api: Callable[[str | bool], HfApi]) -> HfApi:
    return api(False)


@pytest.fixture
def repo(alice: HfApi, request: pytest.FixtureRequest) -> str:
    """A new public model of alice, named after the test."""
    name = f"alice/{request.node.originalname.replace('_', '-')[:80].strip('-')}-{next(_numbers)}"
    alice.create_repo(name)
    return name


@pytest.fixture
def client(hub: LocalHub, tmp_path: Path) -> Callable[..., str]:
    """Run Python code in a process whose environment (cache, endpoint) is set before the import."""

    def run(code: str, token: str = "hf_alice", **environment: str) -> str:
        variables = {
            "PATH": os.environ["PATH"],
            "HOME": str(tmp_path),
            "HF_HOME": str(tmp_path / "home"),
            "HF_XET_CACHE": str(tmp_path / "xet"),
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": token,
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            **environment,
        }
        done = subprocess.run(
            [sys.executable, "-c", code], env=variables, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


class Receiver:
    """Takes webhooks, answering each with the next of `answers` (then 200)."""

    def __init__(self) -> None:
        self.received: list[tuple[dict[str, str], dict]] = []
        self.answers: list[int] = []
        self.changed = threading.Condition()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with receiver.changed:
                    status = receiver.answers.pop(0) if receiver.answers else 200
                    receiver.received.append((dict(self.headers.items()), body))
                    receiver.changed.notify_all()
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/hook"

    def wait(self, count: int) -> list[dict]:
        """The payloads, as soon as there are `count` of them."""
        return self.until(lambda payloads: len(payloads) >= count)

    def until(self, enough: Callable[[list[dict]], bool], seconds: float = 120.0) -> list[dict]:
        """The payloads, as soon as they are `enough`."""
        deadline = time.monotonic() + seconds
        with self.changed:
            while not enough(payloads := [payload for _, payload in self.received]):
                left = deadline - time.monotonic()
                assert left > 0, f"only these webhooks arrived in {seconds:.0f} s: {payloads}"
                self.changed.wait(left)
            return payloads


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    running = Receiver()
    thread = threading.Thread(target=running.server.serve_forever, args=(0.05,))
    thread.start()
    yield running
    running.server.shutdown()
    running.server.server_close()
    thread.join()
