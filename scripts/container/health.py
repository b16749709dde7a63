"""The image's health check: whether `merge-adapter serve` answers; other commands are well as long as they run."""

from __future__ import annotations

import argparse
import os
import sys
import urllib.request
from pathlib import Path

from merge_adapter.bot.settings import load_settings


def port_of(command: list[str]) -> int | None:
    """The port that the container's first process serves on, None when it is another command."""
    if "serve" not in command:
        return None
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--port", type=int)
    parser.add_argument("-c", "--config", default=os.environ.get("MERGE_ADAPTER_BOT_CONFIG"))
    given, _ = parser.parse_known_args(command)
    return load_settings(Path(given.config) if given.config else None, os.environ, port=given.port).port


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
