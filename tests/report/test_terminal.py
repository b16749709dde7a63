"""What is written to a terminal."""

from __future__ import annotations

import io

from rich.console import Console

from merge_adapter.report.lines import LineProgress
from merge_adapter.report.progress import LiveProgress, LogProgress
from merge_adapter.report.terminal import show_mutants, show_notes, show_verdict

HOSTILE = "layers.0\x1b]0;title\x07\x1b[2J\x9b31m\u202e[bold]tail"
SHOWN = "layers.0\ufffd]0;title\ufffd\ufffd[2J\ufffd31m\ufffd[bold]tail"


def test_names_that_strangers_chose_cannot_steer_the_terminal() -> None:
    """Escape sequences, marks of direction and markup are shown, not obeyed."""
    stream = io.StringIO()
    console = Console(file=stream, width=200)
    verification = {
        "verdict": "fail",
        "reasons": [HOSTILE],
        "tokenizer": {
            "verdict": "fail",
            "texts": 1,
            "conversations": 0,
            "size": 512,
            "template": False,
            "findings": [HOSTILE],
        },
        "mutants": [{"fault": HOSTILE, "caught_by": []}],
    }
    show_verdict(console, verification)
    show_mutants(console, verification)
    show_notes(console, (HOSTILE,))
    for progress in (LineProgress(stream), LogProgress(stream), LiveProgress(console)):
        progress.note(HOSTILE)
    written = stream.getvalue()
    assert written.count(SHOWN) == 7
    assert all(character.isprintable() or character == "\n" for character in written)
