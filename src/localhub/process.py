"""Run a Hub as a process of its own, for tests and the demo."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

TOKENS_VARIABLE = "LOCALHUB_TOKENS"
"""More `NAME=TOKEN[:read]`, separated by spaces, for `python -m localhub`."""
START_SECONDS = 120.0
"""How long the Hub may take until it is ready; normally about one second."""
STOP_SECONDS = 30.0
PORT_SECONDS = 90
"""How long a restarted Hub waits for its old port. A connection of somebody else may have been given the
number meanwhile, and the system keeps it a minute longer than that lasts."""


class LocalHubError(RuntimeError):
    """The Hub did not start."""


class LocalHub:
    """A Hub that lives as long as the `with` block:

        with LocalHub(tmp_path, tokens={"alice": "hf_alice"}) as hub:
            HfApi(endpoint=hub.url, token="hf_alice").create_repo("alice/model")

    Args:
        data: folder that keeps everything; a later Hub on it goes on where this one ended.
        tokens: user name -> token with write access (append `:read` for a reading one).
        organizations: name -> members, each `user` or `user:role`.
        port: 0 takes a free one, which `restart` keeps.
        options: further command-line options, such as `--run-jobs`.
    """

    def __init__(
        self,
        data: Path,
        tokens: Mapping[str, str] | None = None,
        organizations: Mapping[str, Sequence[str]] | None = None,
        *,
        port: int = 0,
        options: Sequence[str] = (),
    ) -> None:
        self.data = data
        # Through the environment: arguments are seen by everybody who lists processes.
        self._tokens = " ".join(f"{name}={token}" for name, token in (tokens or {}).items())
        self._arguments = [
            f"--organization={name}={','.join(members)}" for name, members in (organizations or {}).items()
        ]
        self._arguments += options
        self._port = port
        self._process: subprocess.Popen[str] | None = None
        self._url = ""

    @property
    def url(self) -> str:
        """`http://127.0.0.1:PORT`, what HF_ENDPOINT is set to."""
        return self._url

    @property
    def pid(self) -> int:
        assert self._process is not None, "the Hub is not running"
        return self._process.pid

    def start(self) -> None:
        """Start and wait until it answers.

        Raises:
            LocalHubError: it ended, or printed nothing in time; with what it wrote to stderr.
        """
        self.data.mkdir(parents=True, exist_ok=True)
        command = [
            sys.executable,
            "-m",
            "localhub",
            f"--port={self._port}",
            f"--data={self.data}",
            *self._arguments,
        ]
        if self._url:  # not the first start: others know the address
            command.append(f"--wait-for-port={PORT_SECONDS}")
        log = (self.data / "localhub.log").open("a")
        with log:
            self._process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, TOKENS_VARIABLE: self._tokens},
            )
        self._url = self._ready_line()
        self._port = int(self._url.rpartition(":")[2])

    def _ready_line(self) -> str:
        process = self._process
        assert process is not None
        assert process.stdout is not None
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if select.select([process.stdout], [], [], 0.1)[0]:
                line = process.stdout.readline().strip()
                if line:
                    return line
            if process.poll() is not None:
                break
        self.kill()
        written = (self.data / "localhub.log").read_text(errors="replace")[-2000:]
        raise LocalHubError(f"localhub did not start (exit code {process.returncode}):\n{written}")

    def stop(self) -> None:
        """End it as Ctrl-C would; nothing when it is not running."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End it at once (SIGKILL), as a crash would."""
        self._end(signal.SIGKILL)

    def _end(self, how: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(how)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()

    def restart(self) -> None:
        """Stop and start again on the same port and data."""
        self.stop()
        self.start()

    def __enter__(self) -> LocalHub:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()
