"""The bot's commands: `serve`, `webhook …`, `backfill`. Imports that cost something stand inside the functions."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from merge_adapter.errors import InputError, PolicyError

if TYPE_CHECKING:
    from merge_adapter.bot.settings import BotSettings
    from merge_adapter.hub import Hub

_NEEDED = ("fastapi", "uvicorn", "jinja2", "cryptography")
"""Modules of the extra `bot`."""

webhook_app = typer.Typer(
    name="webhook",
    help="Set up and test the Hub webhooks that call the bot.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        "-c",
        metavar="FILE",
        exists=True,
        dir_okay=False,
        envvar="MERGE_ADAPTER_BOT_CONFIG",
        help="TOML file with the bot's settings; MERGE_ADAPTER_BOT_* variables override it.",
        show_default=False,
    ),
]


def add_commands(app: typer.Typer) -> None:
    """Mount the bot's commands on the command line."""
    app.command(name="serve")(serve)
    app.command(name="backfill")(backfill)
    app.add_typer(webhook_app)


def serve(
    config: Config = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.", show_default=False)] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.", show_default=False)] = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder for the queue, logs and reports.", show_default=False),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Number of jobs to run at the same time.", show_default=False)
    ] = None,
) -> None:
    """Run the Hub bot: it merges what is pushed, and has a page to watch it."""
    settings = _settings(config, host=host, port=port, data=data, workers=workers)
    from merge_adapter.bot.server import serve as run

    run(settings)


@webhook_app.command()
def create(
    url: Annotated[str, typer.Argument(metavar="URL", help="Where the bot is reached: https://HOST/webhook")],
    config: Config = None,
) -> None:
    """Make the Hub call the bot when something is pushed or commented on in the repositories that it watches.

    A webhook that already calls this URL is updated: run the command again after changing the secret or the owners.
    """
    from merge_adapter.bot.probe import check_url
    from merge_adapter.hub.catalogue import set_webhook

    settings = _settings(config)
    if not settings.webhook_secret:
        raise InputError(
            "the bot has no webhook secret, and accepts nothing without one",
            hint="Set MERGE_ADAPTER_BOT_WEBHOOK_SECRET, for the bot and for this command; "
            "python -c 'import secrets; print(secrets.token_urlsafe(32))' makes one.",
        )
    watch = [name for name in settings.watch if name != "*"]
    if not watch:
        raise InputError(
            "no owner is watched",
            hint="Set MERGE_ADAPTER_BOT_WATCH=OWNER,OTHER/REPOSITORY, or give the bot's settings file: --config FILE.",
        )
    check_url(url)
    made = set_webhook(_hub(settings), url, watch, settings.webhook_secret)
    typer.echo(f"{made.id}  {made.url}  watches {', '.join(made.watched)}")


@webhook_app.command(name="list")
def list_(config: Config = None) -> None:
    """List the webhooks of the bot's account."""
    from merge_adapter.hub.catalogue import list_webhooks

    found = list_webhooks(_hub(_settings(config)))
    if not found:
        typer.echo("none yet; make one with: merge-adapter webhook create https://HOST/webhook", err=True)
    for one in found:
        state = "  (disabled)" if one.disabled else ""
        typer.echo(f"{one.id}  {one.url}  watches {', '.join(one.watched)}{state}")


@webhook_app.command()
def delete(
    webhook_id: Annotated[str, typer.Argument(metavar="ID", help="As `webhook list` shows it.")],
    config: Config = None,
) -> None:
    """Remove a webhook."""
    from merge_adapter.hub.catalogue import delete_webhook

    delete_webhook(_hub(_settings(config)), webhook_id)
    typer.echo(f"deleted {webhook_id}")


@webhook_app.command()
def test(
    url: Annotated[str, typer.Argument(metavar="URL", help="Where the bot is reached: https://HOST/webhook")],
    adapter: Annotated[
        str | None,
        typer.Option(
            metavar="ID",
            help="Also send the newest push of this adapter, which starts a real job.",
            show_default=False,
        ),
    ] = None,
    config: Config = None,
) -> None:
    """Send test events to a running bot: a forged one, a harmless one and, with --adapter, a real one."""
    from merge_adapter.bot.probe import probe

    settings = _settings(config)
    checks = probe(url, settings, adapter=adapter, hub=_hub(settings) if adapter else None)
    for check in checks:
        typer.echo(f"{'ok  ' if check.passed else 'FAIL'}  {check.what}: {check.found}")
    if not all(check.passed for check in checks):
        raise PolicyError("the bot does not answer as it should", hint="The lines above say where.")


def backfill(
    author: Annotated[
        list[str] | None, typer.Option(metavar="OWNER", help="All adapters of this owner (repeatable).")
    ] = None,
    collection: Annotated[
        list[str] | None, typer.Option(metavar="SLUG", help="All adapters in this collection (repeatable).")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            exists=True,
            dir_okay=False,
            help="File with adapter ids, one per line; # starts a comment.",
        ),
    ] = None,
    go: Annotated[
        bool, typer.Option("--go", help="Merge them. Without this, only the table is shown.")
    ] = False,
    parallel: Annotated[int, typer.Option(min=1, help="Number of jobs to run at the same time.")] = 2,
    config: Config = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder for the queue, logs and reports.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> None:
    """Find adapters without an up-to-date merge and show them; with --go, merge them.

    A run that was stopped continues when the same command is given again.
    """
    from merge_adapter.bot.backfill_command import run_backfill

    settings = _settings(config, data=data)
    code = run_backfill(
        settings,
        _hub(settings),
        authors=tuple(author or ()),
        collections=tuple(collection or ()),
        file=file,
        go=go,
        parallel=parallel,
        as_json=as_json,
    )
    if code:
        raise typer.Exit(code)


def _settings(config: Path | None, **overrides: Any) -> BotSettings:
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise InputError(
            f"the bot needs packages that are not installed: {', '.join(missing)}",
            hint="Install them: pip install 'merge-adapter[bot]'",
        )
    from merge_adapter.bot.settings import load_settings

    return load_settings(config, os.environ, **overrides)


def _hub(settings: BotSettings) -> Hub:
    from merge_adapter.hub import Hub

    return Hub(settings.endpoint or None, settings.token or None)
