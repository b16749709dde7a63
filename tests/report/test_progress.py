"""Figures and lines as people read them."""

import io

import pytest
from rich.console import Console

from merge_adapter.report.progress import LogProgress, human_seconds, progress_for
from merge_adapter.types import Silent


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.42, "0.4 s"), (12, "12 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")]
)
def test_seconds(seconds: float, text: str) -> None:
    assert human_seconds(seconds) == text


def test_a_log_says_when_a_stage_is_done() -> None:
    stream = io.StringIO()
    with LogProgress(stream).task("merge", 10) as task:
        task.advance(4)
        task.advance(6)
    assert stream.getvalue().startswith("merge: done in ")


def test_a_stage_that_failed_is_not_called_done() -> None:
    stream = io.StringIO()
    with pytest.raises(RuntimeError), LogProgress(stream).task("merge", 10):
        raise RuntimeError
    assert stream.getvalue() == ""


def test_quiet_shows_nothing() -> None:
    assert isinstance(progress_for(Console(file=io.StringIO()), quiet=True), Silent)


@pytest.mark.parametrize("terminal", [True, False])
def test_where_nothing_is_counted_no_figure_is_shown(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage of unknown length has a clock alone, no "0 bytes" that never grow."""
    monkeypatch.setattr("merge_adapter.report.progress._LOG_INTERVAL", 0)
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=120)
    with progress_for(console, quiet=False).task("Writing text", None) as task:
        task.advance(0)
    assert "Writing text" in stream.getvalue()
    assert "0 B" not in stream.getvalue() and "bytes" not in stream.getvalue()


def test_a_terminal_gets_a_live_line() -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=120)
    with progress_for(console, quiet=False).task("merge", 2_000_000) as task:
        task.advance(2_000_000)
    assert "merge" in stream.getvalue()
    assert "2.0/2.0 MB" in stream.getvalue()
