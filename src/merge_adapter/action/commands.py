"""Workflow commands, and a log in which only our own are commands.

The runner obeys lines that start with `::name` and, in an older form, `##[name]` anywhere in a line, on stdout and
stderr alike. While other people's text can reach the log, `Log.foreign` holds both streams, makes each line
harmless, and writes it to the one stream that the runner reads in order; commands are stopped as well meanwhile.
"""

from __future__ import annotations

import os
import re
import secrets
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path

from merge_adapter.errors import InputError

MESSAGE_LIMIT = 4000
"""Characters of an annotation; GitHub shows 4,096 bytes at most."""
SUMMARY_LIMIT = 1 << 20
"""Bytes of a step's summary. The runner drops a larger one whole."""
HIDDEN = "***"
_NEUTRAL = "\u200b"
_LINE_END = re.compile(rb"[\r\n]+")
_OLD_FORM = "##["
_LONGEST_LINE = 1 << 16
"""Bytes kept back while a line has no end."""


class Level(StrEnum):
    """Of an annotation."""

    NOTICE = "notice"
    WARNING = "warning"
    ERROR = "error"


def escape_data(text: str) -> str:
    """The message of a command: percent sign and line ends as the runner decodes them."""
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def escape_property(text: str) -> str:
    """The value of a command's property, which ends at a comma or colon."""
    return escape_data(text).replace(":", "%3A").replace(",", "%2C")


def harmless(line: str) -> str:
    """`line` (without its end) so that the runner takes it for text, looking the same."""
    line = line.replace(_OLD_FORM, f"##{_NEUTRAL}[")
    text = line.lstrip()
    if text.startswith("::"):
        line = f"{line[: len(line) - len(text)]}:{_NEUTRAL}{text[1:]}"
    return line


class Log:
    """The step's log: stdout as it was when the log was made."""

    def __init__(self) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self._descriptor = os.dup(1)
        self._lock = threading.Lock()
        self._secrets: tuple[str, ...] = ()

    def hide(self, values: Iterable[str]) -> None:
        """Have the runner mask these values, and mask them ourselves. Before anything can print them."""
        fresh = tuple(dict.fromkeys(value for value in values if value and value not in self._secrets))
        self._secrets = (*self._secrets, *fresh)
        for value in fresh:
            for line in value.splitlines():
                self._write(f"::add-mask::{escape_data(line)}")

    def masked(self, text: str) -> str:
        """`text` without the hidden values."""
        for secret in self._secrets:
            text = text.replace(secret, HIDDEN)
        return text

    def line(self, text: str) -> None:
        """Plain text, a line or several; never a command."""
        for line in text.splitlines() or [""]:
            self._write(self.masked(harmless(line)))

    def annotate(self, level: Level, message: str, *, title: str) -> None:
        """An annotation: shown at the top of the run and in the log."""
        text = escape_data(self.masked(_shortened(message)))
        self._write(
            f"::{level} title={escape_property(self.masked(title))}::{text.replace(_OLD_FORM, '## [')}"
        )

    @contextmanager
    def group(self, title: str) -> Iterator[None]:
        """Lines that the log shows folded."""
        self._write(f"::group::{escape_data(self.masked(title)).replace(_OLD_FORM, '## [')}")
        try:
            yield
        finally:
            self._write("::endgroup::")

    @contextmanager
    def foreign(self) -> Iterator[None]:
        """Everything that this process and its children print meanwhile reaches the log as text, never as a command."""
        token = secrets.token_hex(16)
        self._write(f"::stop-commands::{token}")
        try:
            with self._captured():
                yield
        finally:
            self._write(f"::{token}::")

    @contextmanager
    def _captured(self) -> Iterator[None]:
        reading, writing = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        before = {number: os.dup(number) for number in (1, 2)}
        for number in before:
            os.dup2(writing, number)
        os.close(writing)
        reader = threading.Thread(target=self._relay, args=(reading,), name="log", daemon=True)
        reader.start()
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, original in before.items():
                os.dup2(original, number)
                os.close(original)
            # A child that outlives us holds the pipe open; its words may be lost, but not our exit.
            reader.join(timeout=5)

    def _relay(self, reading: int) -> None:
        pending = b""
        with open(reading, "rb", buffering=0) as stream:
            while chunk := stream.read(1 << 16):
                *lines, pending = _LINE_END.split(pending + chunk)
                if len(pending) > _LONGEST_LINE:
                    lines, pending = [*lines, pending], b""
                for line in lines:
                    self._write(self.masked(harmless(line.decode(errors="replace"))))
        if pending:
            self._write(self.masked(harmless(pending.decode(errors="replace"))))

    def _write(self, line: str) -> None:
        data = f"{line}\n".encode(errors="replace")
        with self._lock:
            while data:
                data = data[os.write(self._descriptor, data) :]


def write_outputs(file: Path, outputs: Iterable[tuple[str, str]]) -> None:
    """Append step outputs to the runner's file. A random delimiter keeps any value from ending itself."""
    with file.open("a", encoding="utf-8", newline="\n") as stream:
        for name, value in outputs:
            delimiter = f"end-{secrets.token_hex(16)}"
            if delimiter in value or delimiter in name:
                raise InputError(f"the output {name} holds the delimiter drawn for it; run again")
            stream.write(f"{name}<<{delimiter}\n{value}\n{delimiter}\n")


def write_summary(file: Path, markdown: str, *, room: int = 0) -> bool:
    """Append to the step's summary. False, and nothing written, when it would leave less than `room` bytes.

    The runner drops a summary that is too large as a whole.
    """
    data = f"{markdown}\n".encode(errors="replace")
    there = file.stat().st_size if file.exists() else 0
    if there + len(data) + room > SUMMARY_LIMIT:
        return False
    with file.open("ab") as stream:
        stream.write(data)
    return True


def _shortened(message: str) -> str:
    return message if len(message) <= MESSAGE_LIMIT else f"{message[: MESSAGE_LIMIT - 1]}…"
