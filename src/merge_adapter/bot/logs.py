"""One JSON object per line on stderr, with the job's id where there is one."""

from __future__ import annotations

import json
import sys
import threading
import time
from typing import Any

_lock = threading.Lock()


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
        sys.stderr.write(line + "\n")
        sys.stderr.flush()
