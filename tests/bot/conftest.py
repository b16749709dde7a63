"""Bots, adapters and webhooks on the embedded Hub, for the tests of the bot."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from merge_adapter.bot.probe import payload
from merge_adapter.bot.queue import Queue, RetryRule
from merge_adapter.bot.settings import BotSettings
from merge_adapter.bot.store import Store

if TYPE_CHECKING:
    from localhub.process import LocalHub

SECRET = "s3cret-of-the-webhook"
BASE_ID = "demo/pydoc-llama"


class Clock:
    """Time that tests move by hand."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> Iterator[Store]:
    """A store of its own, whose time is `clock`'s."""
    with Store(tmp_path / "bot.sqlite3", clock=clock) as store:
        yield store


@pytest.fixture
def queue(store: Store) -> Queue:
    """The queue in `store`: leases of a minute, three attempts."""
    return Queue(store, lease_seconds=60, retry=RetryRule(attempts=3, first_wait=10))


@pytest.fixture(scope="session")
def api(hub: LocalHub) -> Any:
    """ada's client."""
    from huggingface_hub import HfApi

    return HfApi(endpoint=hub.url, token="hf_ada")


@pytest.fixture(scope="session")
def base_on_hub(api: Any, lm_base: Path) -> str:
    """The base model that the adapter names, pushed."""
    api.create_repo(BASE_ID, exist_ok=True)
    api.upload_folder(repo_id=BASE_ID, folder_path=lm_base)
    return BASE_ID


@pytest.fixture
def push_adapter(
    api: Any, base_on_hub: str, lm_adapter: Path, tmp_path: Path
) -> Callable[..., tuple[str, str]]:
    """`push_adapter("ada/name")`: push the trained adapter, or a changed README on top; gives (id, sha)."""

    def push(
        repo_id: str, *, change: str = "", folder: Path | None = None, **options: Any
    ) -> tuple[str, str]:
        api.create_repo(repo_id, exist_ok=True, **options)
        source = folder or lm_adapter
        if change:
            source = tmp_path / f"changed-{change}"
            shutil.copytree(folder or lm_adapter, source)
            config = json.loads((source / "adapter_config.json").read_text())
            (source / "adapter_config.json").write_text(
                json.dumps({**config, "inference_mode": True, "x": change})
            )
        done = api.upload_folder(repo_id=repo_id, folder_path=source, commit_message=f"push {change}")
        return repo_id, done.oid

    return push


@pytest.fixture
def settings(hub: LocalHub, tmp_path: Path) -> BotSettings:
    """Settings of a bot of its own, without workers."""
    return settings_for(hub.url, tmp_path / "bot")


def settings_for(url: str, data: Path, **changes: Any) -> BotSettings:
    """Settings of a bot for the Hub at `url`."""
    facts: dict[str, Any] = {
        "data": data,
        "port": 0,
        "endpoint": url,
        "token": "hf_ada",
        "webhook_secret": SECRET,
        "watch": ("ada",),
        "workers": 0,
        "lease_seconds": 3.0,
        "first_wait": 0.2,
        "poll_seconds": 0.3,
        "probe_tokens": 64,
        "name": "merge-adapter",
    }
    return BotSettings(**{**facts, **changes})


@pytest.fixture
def make_settings() -> Callable[..., BotSettings]:
    return settings_for


def post(url: str, body: dict[str, Any] | bytes, secret: str | None = SECRET) -> tuple[int, dict[str, Any]]:
    """POST a webhook; status and answer."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {
        "Content-Type": "application/json",
        **({"X-Webhook-Secret": secret} if secret is not None else {}),
    }
    try:
        with urlopen(Request(url, raw, headers, method="POST"), timeout=30) as response:
            return response.status, json.loads(response.read())
    except HTTPError as error:
        with error:
            text = error.read()
            return error.code, json.loads(text) if text.startswith(b"{") else {}


@pytest.fixture
def send() -> Callable[..., tuple[int, dict[str, Any]]]:
    return post


@pytest.fixture
def push_event() -> Callable[..., dict[str, Any]]:
    """`push_event("ada/x", sha, old=None)`: the payload of a push to main."""

    def event(
        repo_id: str, sha: str, *, old: str | None = None, ref: str = "refs/heads/main"
    ) -> dict[str, Any]:
        refs = [{"ref": ref, "oldSha": old, "newSha": sha}]
        return payload(repo_id, action="update", scope="repo.content", refs=refs)

    return event


@pytest.fixture
def eventually() -> Callable[..., Any]:
    """`eventually(f)`: what `f` gives as soon as it is true; fails after `seconds`."""

    def wait(look: Callable[[], Any], *, seconds: float = 240.0) -> Any:
        deadline = time.monotonic() + seconds
        while True:
            found = look()
            if found:
                return found
            assert time.monotonic() < deadline, "it did not happen"
            time.sleep(0.05)

    return wait


@pytest.fixture
def bot_process(tmp_path: Path) -> Iterator[Callable[[BotSettings], tuple[subprocess.Popen[str], str]]]:
    """`bot_process(settings)`: `merge-adapter serve` as a process; gives it and its URL."""
    started: list[subprocess.Popen[str]] = []

    def start(settings: BotSettings) -> tuple[subprocess.Popen[str], str]:
        config = tmp_path / "bot.toml"
        config.write_text(as_toml(settings))
        with (tmp_path / "bot.log").open("ab") as written:
            process = subprocess.Popen(
                [sys.executable, "-m", "merge_adapter", "serve", "--config", str(config)],
                stdout=subprocess.PIPE,
                stderr=written,
                text=True,
            )
        started.append(process)
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert url, (tmp_path / "bot.log").read_text()
        return process, url

    yield start
    for process in started:
        if process.poll() is None:
            process.terminate()
        process.wait(60)
        if process.stdout is not None:
            process.stdout.close()


def as_toml(settings: BotSettings) -> str:
    """A settings file that says the same."""
    import dataclasses

    lines = []
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        shown = json.dumps(list(value) if isinstance(value, tuple) else value, default=str)
        lines.append(f"{field.name} = {shown}")
    return "\n".join(lines) + "\n"
