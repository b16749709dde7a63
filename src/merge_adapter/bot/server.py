"""The whole bot, started and stopped: HTTP, look-up, housekeeping, and worker processes that are kept alive."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import uvicorn

from merge_adapter.bot.app import Parts, make_app
from merge_adapter.bot.housekeeping import Housekeeping
from merge_adapter.bot.inbox import Inbox
from merge_adapter.bot.intake import Intake
from merge_adapter.bot.logs import log, logging_to
from merge_adapter.bot.queue import Queue
from merge_adapter.bot.settings import BotSettings
from merge_adapter.bot.store import Store
from merge_adapter.bot.vault import open_vault
from merge_adapter.bot.worker import queue_for, runner_for, settings_to_line
from merge_adapter.errors import InputError, StorageError
from merge_adapter.hub import Hub
from merge_adapter.hub.session import Patience

_START_SECONDS = 30.0
_WORKER_GRACE = 40.0
"""Seconds that workers may take to stop their jobs and hand the leases back."""
_LOOKUP_PATIENCE = Patience(attempts=2, first_wait=0.5)
"""The inbox tries again by itself, and other repositories wait behind a slow one."""
_WANTED = {
    "token": "private repositories are not seen, and nothing is published",
    "webhook_secret": "no webhook is accepted",
    "watch": "no push and no comment starts a job",
}
"""Settings without which a bot runs, but hardly as its owner meant it."""


@dataclass(frozen=True)
class RunningBot:
    """A bot that runs."""

    url: str
    """`http://HOST:PORT`, reachable from this machine."""
    settings: BotSettings
    queue: Queue
    inbox: Inbox

    @property
    def webhook_url(self) -> str:
        """What the Hub's webhook is set to."""
        return f"{self.url}/webhook"


@contextmanager
def start(settings: BotSettings) -> Iterator[RunningBot]:
    """Run the bot for as long as the `with` block; at its end leases are handed back.

    Raises InputError for settings it cannot run with, StorageError when the data folder is unusable or another bot
    has it.
    """
    if settings.workers:
        runner_for(settings)  # its own settings are checked before anything starts
    with contextlib.ExitStack() as stack:
        stack.enter_context(_only_server(settings))
        stack.enter_context(logging_to(settings.log_file))
        stack.callback(log, "stopped")
        store = stack.enter_context(Store(settings.database))
        queue, inbox = queue_for(store, settings), Inbox(store)
        listener = _listen(settings)
        stack.callback(listener.close)
        port = listener.getsockname()[1]
        url = f"http://{_reachable(settings.host)}:{port}"
        settings = replace(settings, port=port, public_url=settings.public_url or url)
        hub = Hub(settings.endpoint or None, settings.token or None, patience=_LOOKUP_PATIENCE)
        intake = Intake(inbox, hub, settings)
        workers = WorkerProcess(settings)
        parts = Parts(
            settings,
            queue,
            inbox,
            open_vault(settings),
            wake=intake.wake.set,
            workers_alive=workers.alive,
            intake_alive=lambda: intake.alive,
        )
        for part in (intake, Housekeeping(queue, hub, settings), workers):
            part.start()
            stack.callback(part.stop)
        stack.enter_context(_serving(parts, listener))
        log("serving", url=url, public_url=settings.public_url, watch=list(settings.watch))
        for name, follows in _WANTED.items():
            if not getattr(settings, name):
                log("not-set", setting=name, follows=follows)
        yield RunningBot(url, settings, queue, inbox)
        log("stopping")


def serve(settings: BotSettings) -> None:
    """Run the bot until SIGTERM or Ctrl-C."""
    stop = threading.Event()
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda *_: stop.set())
    with start(settings) as bot:
        print(bot.url, flush=True)  # noqa: T201  # the one result of this command: where it listens
        stop.wait()


@contextmanager
def _only_server(settings: BotSettings) -> Iterator[None]:
    """One server per data folder: two would look every event up twice."""
    try:
        settings.data.mkdir(parents=True, exist_ok=True)
        opened = (settings.data / "server.lock").open("w")
    except OSError as error:
        raise StorageError(
            f"the data folder {settings.data} cannot be used: {error.strerror}",
            hint="Name a folder that can be written: --data DIR",
        ) from error
    with opened as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise StorageError(
                f"another bot serves from {settings.data}",
                hint="Stop it first, or give this one its own data folder.",
            ) from None
        yield


def _reachable(host: str) -> str:
    """The address at which this machine reaches a server that listens on `host`, as a URL has it."""
    everywhere = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104  # compared
    address = everywhere.get(host, host)
    return f"[{address}]" if ":" in address else address


def _listen(settings: BotSettings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
    except OSError as error:
        listener.close()
        raise InputError(
            f"cannot listen on {settings.host}:{settings.port}: {error.strerror}",
            hint="Choose another host or port.",
        ) from error
    listener.listen(1024)
    return listener


@contextmanager
def _serving(parts: Parts, listener: socket.socket) -> Iterator[None]:
    """Answer HTTP in a thread of its own."""
    config = uvicorn.Config(
        make_app(parts),
        log_config=None,
        access_log=False,
        lifespan="off",
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=5,
        limit_concurrency=2000,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: server.run(sockets=[listener]), name="http", daemon=True)
    thread.start()
    deadline = time.monotonic() + _START_SECONDS
    while not server.started:
        if not thread.is_alive() or time.monotonic() > deadline:
            raise InputError("the HTTP server did not start", hint="The lines above say why.")
        time.sleep(0.01)
    try:
        yield
    finally:
        server.should_exit = True
        thread.join()


class WorkerProcess:
    """The worker process, started again when it dies, slower each time it dies soon."""

    def __init__(self, settings: BotSettings) -> None:
        self._settings = settings
        self._stopped = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._keep_alive, name="worker-keeper", daemon=True)

    def alive(self) -> int:
        process = self._process
        return int(process is not None and process.poll() is None)

    def start(self) -> None:
        if self._settings.workers:
            self._process = self._spawn()
            self._thread.start()

    def stop(self) -> None:
        """End it gently; its leases are handed back."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()
        process = self._process
        if process is None:
            return
        assert process.stdin is not None
        with contextlib.suppress(OSError):
            process.stdin.close()  # again, where it had died
        try:
            process.wait(_WORKER_GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _spawn(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-m", "merge_adapter.bot.worker"],
            stdin=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for the server
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        assert process.stdin is not None
        process.stdin.write(settings_to_line(self._settings).encode() + b"\n")
        process.stdin.flush()
        return process

    def _keep_alive(self) -> None:
        wait = 0.5
        begun = time.monotonic()
        while not self._stopped.wait(0.2):
            if self.alive():
                continue
            assert self._process is not None
            log("worker-died", code=self._process.returncode)
            if self._process.stdin is not None:
                with contextlib.suppress(OSError):
                    self._process.stdin.close()
            wait = 0.5 if time.monotonic() - begun > 60 else min(30.0, wait * 2)
            if self._stopped.wait(wait):
                return
            begun = time.monotonic()
            try:
                self._process = self._spawn()
            except OSError as error:  # no memory for a process, or it died before it read its settings
                log("worker-not-started", error=str(error))
