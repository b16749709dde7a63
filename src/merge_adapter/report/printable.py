"""Text that strangers chose, such as names of files and tensors, for terminals and pages."""

from __future__ import annotations


def printable(text: str) -> str:
    """`text` with every character that could steer a terminal, or turn the writing round, replaced by a mark.

    Line feeds stay.
    """
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)
