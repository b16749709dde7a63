"""Every knob of the bot, typed: from a TOML file, then from `MERGE_ADAPTER_BOT_*` in the environment.

`docs/bot.md` carries the table that `settings_table` makes of this file; a test compares the two.
"""

# ruff: noqa: RUF009  # _knob makes fields; it is no default value
from __future__ import annotations

import dataclasses
import math
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from merge_adapter.errors import InputError
from merge_adapter.sizes import parse_bytes

PREFIX = "MERGE_ADAPTER_BOT_"


class RunnerKind(StrEnum):
    """Where jobs run."""

    LOCAL = "local"
    GITHUB = "github"
    HF_JOBS = "hf-jobs"


@dataclass(frozen=True)
class _Shape:
    """How a text must look. One that looks otherwise would be without effect, and nobody would be told."""

    pattern: re.Pattern[str]
    expected: str


_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_URL = _Shape(re.compile(r"https?://[^\s/]\S*"), "a URL, such as https://merge.example.org")
_SITE = _Shape(re.compile(r"https?://[^\s/]+/?"), "a URL without a path, such as https://merge.example.org")
_USER = _Shape(re.compile(_NAME), "the name of an account, without an @")
_WATCHED = _Shape(re.compile(rf"\*|{_NAME}(/{_NAME})?"), "an owner, a repository as owner/name, or *")
_HEADER = _Shape(re.compile(r"[!-~]+"), "ASCII without spaces, as it travels in a header")
_REPOSITORY = _Shape(re.compile(rf"{_NAME}/{_NAME}"), "a repository as owner/name")
_BASE = _Shape(re.compile(rf"{_NAME}/[^\s/]+"), "OWNER/NAME or OWNER/*")
_DEVICE = _Shape(re.compile(r"auto|cpu|cuda(:[0-9]+)?"), "auto, cpu, cuda or cuda:N")
_EVENT = _Shape(re.compile(r"\S.{0,99}"), "a text of at most 100 characters")
_FEWEST_PROBE_TOKENS = 16
"""The command line takes no fewer."""


def _knob(
    default: Any,
    text: str,
    *,
    secret: bool = False,
    also: str = "",
    least: float = 0,
    most: float = math.inf,
    shape: _Shape | None = None,
) -> Any:
    """A field with its meaning. `also` names a variable that others set, read when ours is absent.

    A number lies between `least` and `most`; a text, or each of several, has the `shape`, or is empty.
    """
    facts = {"help": text, "secret": secret, "also": also, "least": least, "most": most, "shape": shape}
    return field(default=default, repr=not secret, metadata=facts)


@dataclass(frozen=True)
class BotSettings:
    """Settings of `merge-adapter serve`. Secrets are not part of its repr."""

    data: Path = _knob(Path("bot-data"), "Folder for the queue, logs and reports; it must outlive restarts.")
    host: str = _knob("127.0.0.1", "Address to listen on; 0.0.0.0 in a container.")
    port: int = _knob(7860, "Port to listen on; 0 takes a free one.", most=65_535)
    public_url: str = _knob(
        "", "URL under which people and the Hub reach the bot.", also="SPACE_HOST", shape=_SITE
    )
    name: str = _knob(
        "", "Name that comments mention, without the @; empty: the account of the bot's token.", shape=_USER
    )
    endpoint: str = _knob("", "URL of the Hub; empty: huggingface.co.", also="HF_ENDPOINT", shape=_URL)
    token: str = _knob("", "The bot's own Hub token.", secret=True, also="HF_TOKEN", shape=_HEADER)
    webhook_secret: str = _knob(
        "",
        "Secret that the Hub's webhook sends; without one no webhook is accepted.",
        secret=True,
        shape=_HEADER,
    )
    watch: tuple[str, ...] = _knob(
        (), "Owners, or repositories as owner/name, whose pushes start jobs; * for all.", shape=_WATCHED
    )
    maintainers: tuple[str, ...] = _knob(
        (), "Users who may command the bot in every watched repository.", shape=_USER
    )
    members_may_command: bool = _knob(
        default=False,
        text="Whether every member of an organisation may command the bot in its repositories; otherwise those whom "
        "the Hub tells it to have the role write or admin.",
    )
    allow_base: tuple[str, ...] = _knob(
        (), "Accept only these base models, such as meta-llama/*; empty: all.", shape=_BASE
    )
    runner: RunnerKind = _knob(RunnerKind.LOCAL, "Where jobs run: local, github or hf-jobs.")
    workers: int = _knob(1, "Jobs that run at the same time.")
    devices: tuple[str, ...] = _knob(
        ("auto",), "local: device of each worker in turn, such as cuda:0, cuda:1.", shape=_DEVICE
    )
    probe_tokens: int = _knob(
        0,
        "local, hf-jobs: tokens for the output test; 0: as many as the verdict needs, at most 512 on a CPU and 2048 on "
        "a GPU.",
    )
    disk_budget: str = _knob(
        "",
        "local: disk that a merge may use, such as 20GB; larger models pass through shard by shard. Empty: no limit.",
    )
    job_timeout: float = _knob(6 * 3600.0, "Seconds after which a job is stopped.", least=1)
    log_file: str = _knob("", "File for the log's lines; empty: standard error.")
    lease_seconds: float = _knob(
        60.0, "Seconds after which a job of a worker that fell silent goes to another.", least=0.1
    )
    attempts: int = _knob(8, "Failures of the network after which a job stays failed.", least=1)
    first_wait: float = _knob(15.0, "Seconds before the first retry; doubled each time.")
    longest_wait: float = _knob(3600.0, "Seconds between two tries at most.")
    jobs_per_user: int = _knob(5, "Open jobs that one user may have.", least=1)
    max_body: int = _knob(1 << 20, "Bytes of a request that are read at most.", least=1024)
    retention_days: float = _knob(90.0, "Days after which ended jobs, their logs and reports are removed.")
    pages: bool = _knob(default=True, text="Whether to serve the web page.")
    secret_key: str = _knob(
        "", "Key that seals users' tokens; empty: made once and kept in the data folder.", secret=True
    )
    oauth_client_id: str = _knob("", "Hub OAuth application for logging in.", also="OAUTH_CLIENT_ID")
    oauth_client_secret: str = _knob("", "Its secret.", secret=True, also="OAUTH_CLIENT_SECRET")
    oauth_provider: str = _knob(
        "", "OpenID provider; empty: the Hub's endpoint.", also="OPENID_PROVIDER_URL", shape=_URL
    )
    oauth_scopes: str = _knob(
        "openid profile read-repos write-repos manage-repos write-discussions",
        "What the login asks for.",
        also="OAUTH_SCOPES",
    )
    github_repository: str = _knob(
        "", "github: repository, owner/name, whose workflow runs the action.", shape=_REPOSITORY
    )
    github_token: str = _knob(
        "", "github: token that may dispatch there.", secret=True, also="GITHUB_TOKEN", shape=_HEADER
    )
    github_event: str = _knob("merge-adapter", "github: type of the repository_dispatch event.", shape=_EVENT)
    github_api: str = _knob(
        "https://api.github.com", "github: URL of its API.", also="GITHUB_API_URL", shape=_URL
    )
    jobs_image: str = _knob("", "hf-jobs: container image of merge-adapter.")
    jobs_namespace: str = _knob("", "hf-jobs: who pays; empty: the account of the bot's token.", shape=_USER)
    jobs_flavor: str = _knob("auto", "hf-jobs: hardware; auto: the cheapest that the plan fits on.")
    poll_seconds: float = _knob(5.0, "github, hf-jobs: seconds between two looks at a remote job.", least=0.1)

    def __post_init__(self) -> None:
        for one in dataclasses.fields(self):
            _check(one, getattr(self, one.name))
        if 0 < self.probe_tokens < _FEWEST_PROBE_TOKENS:
            expected = f"0 or at least {_FEWEST_PROBE_TOKENS}"
            raise InputError(f"the setting probe_tokens is {self.probe_tokens}, expected {expected}")
        if self.disk_budget:
            parse_bytes(self.disk_budget, what="the setting disk_budget")
        if not self.devices:
            raise InputError("the setting devices is empty", hint='Leave it out, or name one: ["auto"]')

    @property
    def database(self) -> Path:
        return self.data / "bot.sqlite3"

    def job_folder(self, job_id: str) -> Path:
        """Where the log and the report of a job lie."""
        return self.data / "jobs" / job_id

    def watches(self, repo_id: str) -> bool:
        """Whether pushes to this repository start jobs."""
        owner = repo_id.partition("/")[0]
        wanted = {item.lower() for item in self.watch}
        return bool(wanted & {"*", owner.lower(), repo_id.lower()})

    def device_of(self, slot: int) -> str:
        """The device of worker number `slot`."""
        return self.devices[slot % len(self.devices)]


def _check(one: dataclasses.Field[Any], value: Any) -> None:
    """Raises InputError for a value that the bot could not work with, or would pass over in silence."""
    least, most, shape = (one.metadata[name] for name in ("least", "most", "shape"))
    if isinstance(value, (int, float)) and not (math.isfinite(value) and least <= value <= most):
        bound = f"between {least} and {most}" if most < math.inf else f"a number of at least {least}"
        raise InputError(f"the setting {one.name} is {value}, expected {bound}")
    for text in (value if isinstance(value, tuple) else (value,)) if shape else ():
        if text and not shape.pattern.fullmatch(text):
            found = "of another form" if one.metadata["secret"] else repr(text[:100])
            raise InputError(f"the setting {one.name} is {found}, expected {shape.expected}")


def load_settings(
    path: Path | None = None, environment: Mapping[str, str] | None = None, **overrides: Any
) -> BotSettings:
    """Settings from variables that others set, then `path`, then our own variables, then `overrides` not None.

    Raises InputError naming the setting and where it came from when one is unknown or of the wrong type.
    """
    environment = os.environ if environment is None else environment
    values = _from_others(environment)
    if path is not None:
        values |= _from_file(path)
    values |= _from_environment(environment)
    values |= {name: value for name, value in overrides.items() if value is not None}
    return BotSettings(**values)


def _from_file(path: Path) -> dict[str, Any]:
    try:
        parsed = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"the settings file {path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"the settings file {path} is not valid TOML: {error}") from error
    hints = get_type_hints(BotSettings)
    for name in parsed:
        if name not in hints:
            raise InputError(
                f"{path} sets {name!r}, which is not a setting", hint=f"Known: {', '.join(sorted(hints))}"
            )
    return {name: _typed(name, value, hints[name], str(path)) for name, value in parsed.items()}


def _from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    hints = get_type_hints(BotSettings)
    known = {f"{PREFIX}{name.upper()}" for name in hints}
    for variable in environment:
        if variable.startswith(PREFIX) and variable not in known and variable != f"{PREFIX}CONFIG":
            raise InputError(f"{variable} is set, but there is no such setting of the bot")
    return {
        name: _typed(name, environment[variable], kind, variable)
        for name, kind in hints.items()
        if environment.get(variable := f"{PREFIX}{name.upper()}")
    }


def _from_others(environment: Mapping[str, str]) -> dict[str, Any]:
    """What a Space, huggingface_hub and GitHub set: the weakest source, under a file and our own variables."""
    hints = get_type_hints(BotSettings)
    values: dict[str, Any] = {}
    for one in dataclasses.fields(BotSettings):
        variable = one.metadata["also"]
        text = environment.get(variable, "") if variable else ""
        if text:
            text = f"https://{text}" if variable == "SPACE_HOST" else text
            values[one.name] = _typed(one.name, text, hints[one.name], variable)
    return values


def _typed(name: str, value: Any, kind: Any, where: str) -> Any:
    """`value`, from TOML or as text from the environment, as the type of the field."""
    try:
        return _convert(value, kind)
    except (ValueError, TypeError):
        expected = {tuple: "a list", Path: "a path"}.get(
            get_origin(kind) or kind, getattr(kind, "__name__", "")
        )
        if isinstance(kind, type) and issubclass(kind, StrEnum):
            expected = " or ".join(member.value for member in kind)
        # The value is not shown: it may be a secret under the wrong name.
        raise InputError(f"{where} sets {name} to a {type(value).__name__} that is not {expected}") from None


_WORDS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def _convert(value: Any, kind: Any) -> Any:
    if get_origin(kind) is tuple:
        items = [item.strip() for item in value.split(",")] if isinstance(value, str) else list(value)
        if not all(isinstance(item, str) for item in items):
            raise TypeError
        return tuple(item for item in items if item)
    if isinstance(kind, UnionType):
        return _convert(value, next(one for one in get_args(kind) if one is not type(None)))
    if kind is bool:
        if isinstance(value, bool):
            return value
        if (word := _text(value).lower()) not in _WORDS:
            raise ValueError
        return _WORDS[word]
    if isinstance(value, bool) or (kind is int and isinstance(value, float)):  # 1.5 workers are not one
        raise TypeError
    if kind in (int, float):
        return kind(value)
    return kind(_text(value))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def settings_table() -> str:
    """The Markdown table of all settings."""
    lines = ["| setting | default | meaning |", "| --- | --- | --- |"]
    for one in dataclasses.fields(BotSettings):
        default = one.default
        if isinstance(default, tuple):
            shown = "[" + ", ".join(f'"{item}"' for item in default) + "]"
        elif isinstance(default, bool):
            shown = str(default).lower()
        else:
            shown = f"{default:g}" if isinstance(default, float) else str(default)
        note = f" Also read from `{one.metadata['also']}`." if one.metadata["also"] else ""
        note += " Secret." if one.metadata["secret"] else ""
        shown = f"`{shown}`" if shown else ""
        lines.append(f"| `{one.name}` | {shown} | {one.metadata['help']}{note} |")
    return "\n".join(lines) + "\n"
