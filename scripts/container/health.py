"""The image's health check: whether `merge-adapter serve` answers; other commands are well as long as they run."""

from __future__ import annotations

import os
import sys
import urllib.request
from pathlib import Path

DEFAULT_PORT = "7860"


def port_of(command: list[str]) -> str | None:
    """The port that the container's first process serves on, None when it is another command."""
    if "serve" not in command:
        return None
    for option, value in zip(command, [*command[1:], ""], strict=True):
        if option == "--port":
            return value
        if option.startswith("--port="):
            return option.removeprefix("--port=")
    return os.environ.get("MERGE_ADAPTER_BOT_PORT") or DEFAULT_PORT


def main() -> int:
    command = Path("/proc/1/cmdline").read_text(encoding="utf-8", errors="replace").split("\0")
    port = port_of(command)
    if port is None:
        return 0
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=4) as answer:
            return 0 if answer.status == 200 else 1
    except OSError:
        return 1


if __name__ == "__main__":
    sys.exit(main())
