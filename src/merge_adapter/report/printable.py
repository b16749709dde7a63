"""Text that strangers chose, such as names of files and tensors, for terminals and pages."""

from __future__ import annotations

from html import escape


def printable(text: str) -> str:
    """`text` with every character that could steer a terminal, or turn the writing round, replaced by a mark.

    Line feeds stay.
    """
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)


def markup(text: str) -> str:
    """The same as the text of an HTML or SVG element or attribute; SVG would not be read with other characters."""
    return escape(printable(text))
