"""The process of the merged arm: fresh, offline, without PEFT or secrets; it may be started before it is asked.

Its imports take seconds, in which the verifying process has one thing to do after another: started early, it uses the
time of the cores that would idle.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

_KEPT = ("PATH", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "SYSTEMROOT")
"""What a process needs to start and to see the same devices. Tokens and proxies are not among them."""

_LEAVING = 10.0
"""Seconds that a process gets to end once it is not needed."""


class Stopped(Exception):
    """The machine, or a limit, ended the process: that says nothing of the model."""


class Died(Exception):
    """The process ended by itself and left no result."""


class OwnProcess:
    """One process, asked once at most; a context manager, at whose end it is gone with its folder.

    Its folder is its only argument: the job is written there before `ask`, and the answers are found there after.
    """

    def __init__(self) -> None:
        self._room = tempfile.TemporaryDirectory(prefix="merge-adapter-arm-")
        self.folder = Path(self._room.name)
        environment = {key: os.environ[key] for key in _KEPT if key in os.environ}
        environment |= {
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
            "HF_HOME": str(self.folder / "home"),
            "HOME": str(self.folder),
            "TRANSFORMERS_VERBOSITY": "error",
            "TOKENIZERS_PARALLELISM": "false",
            # threads that wait for each other give their core away: where others need it too, spinning costs the most
            "OMP_WAIT_POLICY": "PASSIVE",
        }
        self._said = (self.folder / "stderr").open("wb")
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-m", "merge_adapter.verify.outputs.arm", str(self.folder)],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=self._said,
            )
        except BaseException:
            self._said.close()
            self._room.cleanup()
            raise

    def ask(self, timeout: float) -> None:
        """Let it do the job in its folder, `timeout` seconds at most.

        Raises Stopped when it was killed or took too long, Died when it ended by itself without a result.
        """
        try:
            self._process.communicate(b"go\n", timeout=timeout)
        except subprocess.TimeoutExpired as error:
            raise Stopped(f"no answer within {timeout:.0f} s") from error
        if (self.folder / "result.json").exists():
            return
        status = self._process.returncode
        if status < 0:
            why = " (as a system does that runs out of memory)" if -status == signal.SIGKILL else ""
            raise Stopped(f"its process was stopped by signal {-status}{why}")
        said = (self.folder / "stderr").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        tail = said[-1] if said else "no message"
        raise Died(f"its process ended with status {status}: {tail[:300]}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait(_LEAVING)
        if self._process.stdin is not None and not self._process.stdin.closed:
            self._process.stdin.close()
        self._said.close()
        self._room.cleanup()
