"""One JSON object per line on stderr or in a file, with the job's id where there is one."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

from merge_adapter.errors import StorageError

_lock = threading.Lock()
_file: Path | None = None


def log_to(path: str) -> None:
    """Write lines to the end of this file from now on; "" for stderr. For the process as a whole, as stderr is.

    Raises StorageError for a file that cannot be written.
    """
    global _file  # where a process writes its log is a fact of the process
    if path:
        try:
            Path(path).open("a").close()
        except OSError as error:
            raise StorageError(
                f"the log {path} cannot be written: {error.strerror}", hint="Change the setting log_file."
            ) from error
    _file = Path(path) if path else None


def log(event: str, **facts: Any) -> None:
    """Write one line: `time` in UTC, `event`, and the facts that are not None.

    JSON escapes control characters, so that names chosen by strangers cannot forge lines. A line for which there is no
    room, or whose reader is gone, is lost: whoever logs must go on.
    """
    moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime())
    line = json.dumps(
        {"time": f"{moment}Z", "event": event, **{k: v for k, v in facts.items() if v is not None}},
        default=str,
    )
    with _lock, contextlib.suppress(OSError):
        if _file is None:
            sys.stderr.write(line + "\n")
            sys.stderr.flush()
        else:
            with _file.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
