"""One JSON object per line on stderr or in a file, with the job's id where there is one."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.utils import logging as hub_logging

from merge_adapter.errors import StorageError
from merge_adapter.hub.access import redact

_lock = threading.Lock()
_file: Path | None = None


@contextmanager
def logging_to(path: str) -> Iterator[None]:
    """Write lines to the end of this file during the block; "" for stderr. For the process as a whole, as stderr is.

    What libraries log and warn of becomes lines too: whoever reads JSON reads nothing else.
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
    before, _file = _file, Path(path) if path else None
    lines, hub = _LibraryLines(logging.WARNING), hub_logging.get_logger()
    own, hub.handlers = hub.handlers, []  # the client writes to stderr by itself
    logging.getLogger().addHandler(lines)
    logging.captureWarnings(capture=True)
    try:
        yield
    finally:
        logging.captureWarnings(capture=False)
        logging.getLogger().removeHandler(lines)
        hub.handlers, _file = own, before


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


class _LibraryLines(logging.Handler):
    """Python's log records as lines of ours, tracebacks included."""

    def emit(self, record: logging.LogRecord) -> None:
        text = redact(logging.Formatter().format(record))
        log("library", logger=record.name, level=record.levelname.lower(), text=text)
