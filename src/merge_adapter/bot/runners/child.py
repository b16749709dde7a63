"""The process in which a job's merge runs: `python -m merge_adapter.bot.runners.child [--result-line] run …`.

It is the command line, and two things more. While its standard input is open its parent lives; when that closes it
ends as Ctrl-C would end it, so that a killed worker leaves no merge behind that still publishes. With
`--result-line` the document is printed as one line, to be found in a log that mixes both streams.
"""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import threading
from contextlib import redirect_stdout

from merge_adapter.collecting import seldom_collected

_PATIENCE = 30.0
"""Seconds that clearing up may take once the parent is gone."""
RESULT = '{"result":'


def main(arguments: list[str]) -> int:
    """Run the command line; its exit code."""
    from merge_adapter.cli import run

    if arguments[:1] != ["--result-line"]:
        threading.Thread(target=_end_with_parent, daemon=True).start()
        return run(arguments)
    printed = io.StringIO()
    with redirect_stdout(printed):
        code = run(arguments[1:])
    try:
        document = json.loads(printed.getvalue())
    except ValueError:
        document = {}
    shown = {key: document[key] for key in ("error", "publication") if key in document}
    if isinstance(document.get("verification"), dict):
        kept = {key: document["verification"].get(key) for key in ("verdict", "reasons")}
        shown["verification"] = kept
    sys.stdout.write(json.dumps({"result": {"exit_code": code, **shown}}) + "\n")
    sys.stdout.flush()
    return code


def _end_with_parent() -> None:
    try:
        while os.read(sys.stdin.fileno(), 4096):
            pass
    except OSError:
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    threading.Event().wait(_PATIENCE)
    os._exit(1)


if __name__ == "__main__":
    with seldom_collected():
        code = main(sys.argv[1:])
    sys.exit(code)
