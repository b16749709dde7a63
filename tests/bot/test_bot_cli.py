"""The bot's commands, as a person types them."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from merge_adapter.bot.server import RunningBot, start
from merge_adapter.cli import run


@pytest.fixture
def environment(hub: Any, monkeypatch: pytest.MonkeyPatch, settings: Any) -> None:
    for name, value in {
        "ENDPOINT": hub.url,
        "TOKEN": "hf_ada",
        "WEBHOOK_SECRET": settings.webhook_secret,
        "WATCH": "ada,demo,ada/one-repository",
    }.items():
        monkeypatch.setenv(f"MERGE_ADAPTER_BOT_{name}", value)


@pytest.fixture
def bot(settings: Any) -> Iterator[RunningBot]:
    with start(settings) as running:
        yield running


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*arguments: str) -> tuple[int, str, str]:
        code = run(list(arguments))
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


def test_a_webhook_is_made_listed_tried_and_deleted(
    environment: None, command: Any, bot: RunningBot, api: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made once for a URL, and changed when the command is given again."""
    code, out, err = command("webhook", "create", bot.webhook_url)
    assert code == 0, err
    hook_id = out.split()[0]
    assert "user ada" in out and "org demo" in out and "model ada/one-repository" in out
    (made,) = [hook for hook in api.list_webhooks() if hook.id == hook_id]
    assert made.url == bot.webhook_url and set(made.domains) == {"repo", "discussion"}
    assert bot.webhook_url in command("webhook", "list")[1]
    monkeypatch.setenv("MERGE_ADAPTER_BOT_WATCH", "ada")
    code, out, err = command("webhook", "create", bot.webhook_url)
    assert code == 0 and out.startswith(hook_id) and "demo" not in out, err
    (changed,) = [hook for hook in api.list_webhooks() if hook.url == bot.webhook_url]
    assert [(item.type, item.name) for item in changed.watched] == [("user", "ada")]
    code, out, _ = command("webhook", "test", bot.webhook_url)
    assert code == 0 and out.count("ok  ") == 2
    assert command("webhook", "delete", hook_id)[:2] == (0, f"deleted {hook_id}\n")
    code, _, err = command("webhook", "delete", hook_id)
    assert code in (2, 5) and "error:" in err


def test_an_account_without_webhooks_is_told_how_to_make_one(
    environment: None, command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MERGE_ADAPTER_BOT_TOKEN", "hf_stranger")
    code, out, err = command("webhook", "list")
    assert (code, out) == (0, "") and "merge-adapter webhook create https://HOST/webhook" in err


def test_a_bot_with_another_secret_fails_the_test(
    environment: None, command: Any, bot: RunningBot, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MERGE_ADAPTER_BOT_WEBHOOK_SECRET", "another")
    code, out, err = command("webhook", "test", bot.webhook_url)
    assert code == 6 and "FAIL  a harmless event" in out and "does not answer as it should" in err


@pytest.mark.parametrize(
    "url",
    ["bot.example", "ftp://bot.example", "http://", "http://exa mple/x", "http://[::1/x", "http://x:y/"],
)
@pytest.mark.parametrize("subcommand", ["create", "test"])
def test_what_is_no_url_is_bad_input(environment: None, command: Any, subcommand: str, url: str) -> None:
    code, _, err = command("webhook", subcommand, url)
    assert code == 2 and "is not a URL" in err


def test_something_that_is_no_bot_is_told(environment: None, command: Any) -> None:
    """A server that speaks something else than HTTP."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            with server.accept()[0] as client:
                client.recv(65536)
                client.sendall(b"220 mail.example ESMTP\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        code, _, err = command("webhook", "test", f"http://127.0.0.1:{server.getsockname()[1]}/webhook")
        thread.join()
    assert code == 5 and "does not answer" in err


def test_what_is_missing_is_said(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    code, _, err = command("webhook", "create", "https://bot.example/webhook")
    assert code == 2 and "no webhook secret" in err
    monkeypatch.setenv("MERGE_ADAPTER_BOT_WEBHOOK_SECRET", "s")
    assert "no owner is watched" in command("webhook", "create", "https://bot.example/webhook")[2]
    monkeypatch.setenv("MERGE_ADAPTER_BOT_RUNNER", "hf-jobs")
    code, _, err = command("serve")
    assert code == 2 and "jobs_image" in err


def test_a_place_that_cannot_be_used_is_named(command: Any, tmp_path: Path) -> None:
    """A port, a data folder, a log: bad input, told with what it was."""
    taken, config = tmp_path / "a-file", tmp_path / "bot.toml"
    taken.touch()
    config.write_text(f'log_file = "{taken}/bot.log"')
    for arguments, message in (
        (("--port", "70000"), "port is 70000"),
        (("--data", str(taken)), f"the data folder {taken} cannot be used"),
        (("--data", str(taken / "below")), "cannot be used: Not a directory"),
        (("--data", str(tmp_path), "--config", str(config)), f"the log {taken}/bot.log cannot be written"),
    ):
        code, _, err = command("serve", *arguments)
        assert code == 2 and message in err, err


def test_the_command_line_starts_without_the_bot() -> None:
    """`--help` imports neither the web framework nor the Hub's client."""
    heavy = "fastapi,uvicorn,jinja2,huggingface_hub,torch,sqlite3,cryptography"
    script = (
        "import sys, merge_adapter.cli as cli; cli.run(['--help']); "
        f"print([name for name in '{heavy}'.split(',') if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    for name in ("serve", "webhook", "backfill"):
        assert name in done.stdout
