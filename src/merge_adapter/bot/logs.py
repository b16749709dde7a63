"""One JSON object per line on stderr or in a file, with the job's id where there is one."""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

_lock = threading.Lock()
_file: Path | None = None


def log_to(path: str) -> None:
    """Write lines to the end of this file from now on; "" for stderr. For the process as a whole, as stderr is."""
    global _file  # where a process writes its log is a fact of the process
    _file = Path(path) if path else None


def log(event: str, **facts: Any) -> None:
    """Write one line: `time` in UTC, `event`, and the facts that are not None.

    JSON escapes control characters, so that names chosen by strangers cannot forge lines.
    """
    moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime())
    line = json.dumps(
        {"time": f"{moment}Z", "event": event, **{k: v for k, v in facts.items() if v is not None}},
        default=str,
    )
    with _lock:
        if _file is None:
            sys.stderr.write(line + "\n")
            sys.stderr.flush()
        else:
            with _file.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
