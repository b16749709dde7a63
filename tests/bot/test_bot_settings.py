"""Settings: typed, from a file and the environment, without secrets in their repr, and documented."""

from __future__ import annotations

from pathlib import Path

import pytest

from merge_adapter.bot.settings import BotSettings, RunnerKind, load_settings, settings_table
from merge_adapter.bot.vault import Vault, open_vault
from merge_adapter.bot.worker import settings_from_line, settings_to_line
from merge_adapter.errors import InputError

DOCS = Path(__file__).parents[2] / "docs" / "bot.md"


def test_the_environment_overrides_the_file_and_arguments_override_both(tmp_path: Path) -> None:
    path = tmp_path / "bot.toml"
    path.write_text('port = 1\nworkers = 3\nwatch = ["ada", "acme"]\nrunner = "hf-jobs"\nlease_seconds = 5\n')
    found = load_settings(path, {"MERGE_ADAPTER_BOT_PORT": "2", "MERGE_ADAPTER_BOT_PAGES": "no"}, workers=4)
    assert (found.port, found.workers, found.watch, found.pages) == (2, 4, ("ada", "acme"), False)
    assert found.runner is RunnerKind.HF_JOBS and found.lease_seconds == 5.0
    path.write_text('endpoint = "http://file"')
    assert load_settings(path, {"HF_ENDPOINT": "http://other"}).endpoint == "http://file"
    assert load_settings(None, {"MERGE_ADAPTER_BOT_WATCH": "ada, acme"}).watch == ("ada", "acme")


def test_what_a_space_sets_is_used() -> None:
    found = load_settings(
        None,
        {
            "SPACE_HOST": "ada-bot.hf.space",
            "OAUTH_CLIENT_ID": "id",
            "OAUTH_CLIENT_SECRET": "x",
            "HF_TOKEN": "t",
        },
    )
    assert found.public_url == "https://ada-bot.hf.space"
    assert (found.oauth_client_id, found.oauth_client_secret, found.token) == ("id", "x", "t")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prot = 1", "'prot', which is not a setting"),
        ("port = true", "port to a bool"),
        ('port = "x"', "port to a str"),
        ("watch = [1]", "not a list"),
        ('runner = "moon"', "local or github or hf-jobs"),
        ("workers = -1", "at least 0"),
        ("workers = 1.5", "workers to a float"),
        ("port = 65536", "port is 65536, expected between 0 and 65535"),
        ("retention_days = -1", "retention_days is -1"),
        ("first_wait = nan", "first_wait is nan"),
        ("job_timeout = inf", "job_timeout is inf"),
        ("poll_seconds = 0", "poll_seconds is 0"),
        ('pages = "maybe"', "pages to a str that is not bool"),
        ('endpoint = "huggingface.co"', "endpoint is 'huggingface.co', expected a URL"),
        ('public_url = "merge.example.org"', "expected a URL"),
        ('watch = ["ada", "https://huggingface.co/acme"]', "watch is 'https://huggingface.co/acme'"),
        ('watch = ["ada/"]', "watch is 'ada/'"),
        ('maintainers = ["@ada"]', "maintainers is '@ada', expected the name of an account"),
        ('name = "@merge-bot"', "name is '@merge-bot'"),
        ('webhook_secret = "of two\\nlines"', "webhook_secret is of another form, expected ASCII"),
        ('token = "hf_geheimniß"', "token is of another form"),
        ('github_repository = "https://github.com/ada/merges"', "expected a repository as owner/name"),
        ("port = ", "not valid TOML"),
        ("lease_seconds = 0", "lease_seconds is 0.0, expected a number of at least 0.1"),
        ('disk_budget = "much"', "disk_budget is 'much'"),
        ('devices = ["gpu0"]', "devices is 'gpu0', expected auto, cpu, cuda or cuda:N"),
        ('allow_base = ["meta-llama"]', "allow_base is 'meta-llama', expected OWNER/NAME"),
        ('allow_base = ["*/*"]', r"allow_base is '\*/\*'"),
        ("probe_tokens = 8", "probe_tokens is 8, expected 0 or at least 16"),
        ('jobs_namespace = "acme/merges"', "jobs_namespace is 'acme/merges'"),
        ('public_url = "https://example.org/bot"', "public_url is .*, expected a URL without a path"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bot.toml"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        load_settings(path, {})


def test_an_unknown_variable_is_named_and_its_value_kept() -> None:
    with pytest.raises(InputError, match="MERGE_ADAPTER_BOT_TOKNE") as caught:
        load_settings(None, {"MERGE_ADAPTER_BOT_TOKNE": "hf_secret"})
    assert "hf_secret" not in str(caught.value)


def test_secrets_are_not_shown() -> None:
    found = BotSettings(
        token="hf_1", webhook_secret="w1", secret_key="k1", oauth_client_secret="o1", github_token="g1"
    )
    assert not any(secret in repr(found) for secret in ("hf_1", "w1", "k1", "o1", "g1"))


def test_a_worker_gets_the_same_settings(tmp_path: Path) -> None:
    found = BotSettings(data=tmp_path, watch=("a", "b"), runner=RunnerKind.GITHUB, token="t", port=5)
    assert settings_from_line(settings_to_line(found)) == found


def test_the_key_is_made_once(tmp_path: Path) -> None:
    settings = BotSettings(data=tmp_path / "bot")
    sealed = open_vault(settings).seal("hf_token")
    assert b"hf_token" not in sealed and open_vault(settings).open(sealed) == "hf_token"
    assert (tmp_path / "bot" / "secret.key").stat().st_mode & 0o077 == 0
    with pytest.raises(InputError, match="secret_key changed"):
        Vault("other").open(sealed)


def test_the_documentation_has_the_table() -> None:
    """`docs/bot.md` carries what `settings_table` makes."""
    assert settings_table() in DOCS.read_text()
