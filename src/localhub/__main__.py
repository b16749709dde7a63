"""`python -m localhub`: serve a Hub on 127.0.0.1 until it is stopped."""

from __future__ import annotations

import argparse
import asyncio
import errno
import os
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from localhub.accounts import TokenRole
from localhub.errors import RefusedError
from localhub.hub import Hub, Options, open_hub
from localhub.oidc import parse_client, parse_publisher
from localhub.process import TOKENS_VARIABLE

_BACKLOG = 2048
"""Connections that wait until the server takes them."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m localhub",
        description="A Hugging Face Hub on 127.0.0.1: set HF_ENDPOINT to the URL it prints.",
    )
    parser.add_argument("--port", type=int, default=0, help="port to listen on; 0 (default) takes a free one")
    parser.add_argument(
        "--wait-for-port",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="how long to try again when the port is taken; 0 (default) gives up at once",
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="folder that keeps everything; made if missing"
    )
    parser.add_argument(
        "--token",
        action="append",
        default=[],
        metavar="NAME=TOKEN[:read]",
        help="a user and a token of theirs, which may write unless it ends in :read; repeatable; "
        f"more are read from {TOKENS_VARIABLE}, which process lists do not show",
    )
    parser.add_argument(
        "--organization",
        action="append",
        default=[],
        metavar="NAME=USER[:ROLE],...",
        help="an organisation and its members; roles are admin (default), write, contributor, read; repeatable",
    )
    parser.add_argument(
        "--run-jobs",
        action="store_true",
        help="run jobs as processes on this machine instead of recording them",
    )
    parser.add_argument(
        "--trusted-publisher",
        action="append",
        default=[],
        metavar="JSON",
        help='{"resource": "owner/name", "issuer": URL, "jwks_uri": URL, "claims": {"repository": "org/ci"}, '
        '"user": NAME}: a CI workflow that may exchange its id token; repeatable',
    )
    parser.add_argument(
        "--oauth-client",
        action="append",
        default=[],
        metavar="ID[:SECRET]=REDIRECT_URI,...",
        help="an application that signs users in here; without a secret it must use PKCE; repeatable",
    )
    return parser


def add_accounts(hub: Hub, tokens: Sequence[str], organizations: Sequence[str]) -> None:
    """Create what `--token` and `--organization` say.

    Raises:
        ValueError: one of them is not of the documented form.
    """
    for item in tokens:
        name, _, token = item.partition("=")
        token, _, role = token.partition(":")
        if not name or not token or role not in ("", "read", "write"):
            raise ValueError("--token: expected NAME=TOKEN or NAME=TOKEN:read")
        hub.accounts.add(name)
        hub.accounts.add_token(name, token, role=TokenRole(role or "write"))
    for item in organizations:
        name, _, members = item.partition("=")
        hub.accounts.add(name, type="org")
        for member in filter(None, members.split(",")):
            user, _, role = member.partition(":")
            hub.accounts.add(user)
            hub.accounts.join(name, user, role or "admin")


async def _serve(hub: Hub, listener: socket.socket) -> None:
    import uvicorn

    from localhub.app import make_app

    config = uvicorn.Config(
        make_app(hub),
        log_level="warning",
        access_log=False,
        date_header=False,
        timeout_graceful_shutdown=2,
        timeout_keep_alive=30,
    )
    server = uvicorn.Server(config)

    async def announce() -> None:
        while not server.started:
            await asyncio.sleep(0.005)
        port = listener.getsockname()[1]
        sys.stdout.write(f"http://127.0.0.1:{port}\n")
        sys.stdout.flush()

    announcing = asyncio.create_task(announce())
    await server.serve(sockets=[listener])
    announcing.cancel()


def _listen(port: int, patience: float) -> socket.socket:
    """A socket on a port of 127.0.0.1; tried for `patience` seconds while the port is taken.

    Raises:
        OSError: it stayed taken, or may not be used.
    """
    deadline = time.monotonic() + patience
    while True:
        # asyncio turns Nagle's algorithm off only where the protocol is named; with it each answer waits 40 ms.
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port))
            # Two sockets may share a port until one of them listens: only this shows that it is free.
            listener.listen(_BACKLOG)
        except OSError as error:
            listener.close()
            if error.errno != errno.EADDRINUSE or time.monotonic() >= deadline:
                raise
            time.sleep(0.1)
        else:
            return listener


def main(arguments: Sequence[str] | None = None) -> int:
    """Run until SIGINT or SIGTERM; the exit code."""
    options = parser().parse_args(arguments)
    try:
        listener = _listen(options.port, options.wait_for_port)
    except OSError as error:
        sys.stderr.write(f"localhub: cannot listen on 127.0.0.1:{options.port}: {error.strerror}\n")
        return 2
    try:
        choices = Options(
            run_jobs=options.run_jobs,
            publishers=[parse_publisher(text) for text in options.trusted_publisher],
            clients=[parse_client(text) for text in options.oauth_client],
        )
        hub = open_hub(options.data, choices)
        tokens = [*options.token, *os.environ.get(TOKENS_VARIABLE, "").split()]
        add_accounts(hub, tokens, options.organization)
    except (ValueError, RefusedError) as error:
        sys.stderr.write(f"localhub: {error}\n")
        return 2
    try:
        asyncio.run(_serve(hub, listener))
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
