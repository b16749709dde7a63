"""Workflow commands: ours arrive whole, nobody else's arrive at all."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from merge_adapter.action.commands import (
    SUMMARY_LIMIT,
    Level,
    Log,
    harmless,
    write_outputs,
    write_summary,
)

HOSTILE = (
    "::set-output name=verdict::pass",
    "  ::error title=x::y",
    "\u00a0::add-mask::e",
    "\u2028::warning::w",
    "text ##[error]boom",
    "##[add-mask]e",
    "##[group]g",
    "::endgroup::",
    "::stop-commands::mine",
    "100%0A::notice::n",
)

Obeys = Callable[[str], list[Any]]


@pytest.mark.parametrize("line", HOSTILE)
def test_a_strangers_line_is_no_command(line: str, runner_obeys: Obeys) -> None:
    """It still looks the same: only what cannot be seen is put in."""
    made = harmless(line)
    assert runner_obeys(made) == []
    assert made.replace("\u200b", "") == line


PRINTING = {
    "stdout": "sys.stdout.write(text)",
    "stderr": "sys.stderr.write(text)",
    "child": "subprocess.run([sys.executable, '-c', 'import sys; sys.stderr.write(sys.argv[1])', text])",
    "descriptor": "os.write(2, text.encode())",
    "warning": "warnings.warn(text)",
}


@pytest.mark.parametrize("way", PRINTING)
def test_whatever_is_printed_during_the_work_is_text(way: str, runner_obeys: Obeys) -> None:
    """Python's streams, a child's, and bytes written past both: none of them is a command, all of them are seen."""
    text = "\n".join((*HOSTILE, "a bar\r::error::in it", "the token is hf_secret", "last, without an end"))
    script = f"""
import os, subprocess, sys, warnings
from merge_adapter.action.commands import Level, Log
log, text = Log(), {text!r}
log.hide(["hf_secret"])
with log.group("Work"), log.foreign():
    {PRINTING[way]}
log.annotate(Level.NOTICE, "done", title="Work")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    shown = done.stdout.decode()
    assert done.stderr == b"", "the runner reads two streams in no certain order, so there is one"
    assert [command.name for command in runner_obeys(shown)] == ["add-mask", "group", "endgroup", "notice"]
    assert "last, without an end" in shown
    assert shown.count("hf_secret") == 1
    for line in HOSTILE[:2]:
        assert line in shown.replace("\u200b", "")


def test_an_annotation_survives_every_character(
    capfd: pytest.CaptureFixture[str], runner_obeys: Obeys
) -> None:
    """Line ends, percent signs, commas and colons come back as they were."""
    title, message = "a,b:c%0A::error", "100 %\r\nnext::set-output name=x::y,z"
    Log().annotate(Level.ERROR, message, title=title)
    (command,) = runner_obeys(capfd.readouterr().out)
    assert command.name == "error"
    assert command.data == message
    assert command.properties == {"title": title}


def test_a_title_with_the_old_form_is_no_second_command(
    capfd: pytest.CaptureFixture[str], runner_obeys: Obeys
) -> None:
    log = Log()
    with log.group("##[error]a group"):
        log.line("##[error]a line\n::error::another")
    log.annotate(Level.WARNING, "##[error]a message", title="##[error]a title")
    names = [command.name for command in runner_obeys(capfd.readouterr().out)]
    assert names == ["group", "endgroup", "warning"]


def test_hidden_values_are_masked_first_and_never_printed(capfd: pytest.CaptureFixture[str]) -> None:
    """The runner hears of a secret before anything else, and we do not rely on it alone."""
    log = Log()
    log.hide(("hf_secret%", "", "hf_secret%"))
    log.line("the token is hf_secret%")
    log.annotate(Level.ERROR, "refused: hf_secret%", title="t")
    first, *rest = capfd.readouterr().out.splitlines()
    assert first == "::add-mask::hf_secret%25"
    assert "hf_secret" not in "\n".join(rest)
    assert log.masked("hf_secret%") == "***"


def test_long_messages_fit_an_annotation(capfd: pytest.CaptureFixture[str], runner_obeys: Obeys) -> None:
    Log().annotate(Level.ERROR, "x" * 9000, title="t")
    (command,) = runner_obeys(capfd.readouterr().out)
    assert len(command.data) == 4000


def test_an_output_cannot_end_itself(tmp_path: Path) -> None:
    """Values that look like the file's own syntax stay values; delimiters differ each time."""
    file = tmp_path / "outputs"
    value = "pass\nEOF\nverdict<<EOF\nfail\nEOF"
    write_outputs(file, [("verdict", value), ("verdict2", value)])
    lines = file.read_text().splitlines()
    delimiters = {line.split("<<end-")[1] for line in lines if "<<end-" in line}
    assert len(delimiters) == 2
    assert lines[1:6] == value.splitlines()


def test_a_summary_never_grows_past_what_the_runner_takes(tmp_path: Path) -> None:
    """The runner drops a summary that is too large as a whole, so the last piece is refused instead."""
    file = tmp_path / "summary"
    assert write_summary(file, "x" * (SUMMARY_LIMIT - 10))
    assert not write_summary(file, "y" * 10)
    assert write_summary(file, "y" * 8)
    assert file.stat().st_size == SUMMARY_LIMIT
