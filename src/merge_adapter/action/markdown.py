"""Text of others in Markdown that GitHub renders: it stays text, whatever it holds.

Names and messages come from adapters, configs, branches and cards. `code` suits names and values, `prose` suits
sentences that have such text in them.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

_MARKUP = re.compile(r"([\\`*_\[\]<>|&~$:@#])")
"""What means something inside a line. The colon is that of an address, which would become a link."""
_LINE_START = re.compile(r"^(\d*)([-+=.)])")
"""What makes a list or a heading of a line."""
_WWW = re.compile(r"(www)\.", re.IGNORECASE)
_MENTION = re.compile(r"([@#]|\bGH-)(?=[\w-])", re.IGNORECASE)
"""GitHub links `@name`, `#1` and `GH-1` in rendered text, after every escape is gone."""
_JOINER = "\u200b"
"""Zero-width space: unseen, and enough to end a mention."""


def code(text: str) -> str:
    """`text` as a code span, on one line."""
    line = one_line(text) or " "
    longest = max((len(run) for run in re.findall(r"`+", line)), default=0)
    fence = "`" * (longest + 1)
    pad = " " if line[0] == "`" or line[-1] == "`" or not line.strip() else ""
    return f"{fence}{pad}{line}{pad}{fence}"


def prose(text: str) -> str:
    """`text` as plain words on one line: no markup, no HTML, no links, no mentions."""
    escaped = _MARKUP.sub(r"\\\1", _MENTION.sub(rf"\1{_JOINER}", one_line(text)))
    return _WWW.sub(r"\1\\.", _LINE_START.sub(r"\1\\\2", escaped))


def one_line(text: str) -> str:
    """`text` with line ends as spaces and without what is unseen or turns the direction of writing."""
    return "".join(_shown(character) for character in " ".join(text.split()))


def table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A table of cells that are Markdown already."""
    lines = [_row(header), _row(("---",) * len(header)), *(_row(row) for row in rows)]
    return "\n".join(lines)


def _row(cells: tuple[str, ...]) -> str:
    # A pipe ends a cell even in a code span; `\|` is a plain pipe again once the row is cut.
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def _shown(character: str) -> str:
    # Cc, Cf: control and format characters, bidirectional overrides among them; Cs, Co, Cn: no character at all.
    if character == "\t":
        return " "
    return "\ufffd" if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn") else character
