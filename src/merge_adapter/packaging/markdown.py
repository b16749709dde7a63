"""Foreign text inside our Markdown: it may say anything, but it cannot look as if we said it."""

from __future__ import annotations

import re
import unicodedata

from markdown_it import MarkdownIt
from markdown_it.token import Token

_LONGEST = 120
"""Characters of a foreign name shown in a sentence or table."""
_QUOTED = 32 << 10
"""Characters of a quoted card kept at most."""
_LOWEST_HEADING = 6
_HEADING_SHIFT = 2
"""A quoted `# Title` becomes `### Title`, below the heading it stands under."""
_AUTOLINK = re.compile(r"<(?=https?://[^\s<>]+>)")
_DEFINITION = re.compile(r"^(\s*(?:[-*+>]\s*)*)\[")
"""The start of a link reference definition, which would count in the whole document."""


def code(text: str) -> str:
    """`text` as an inline code span on one line, whatever it contains; cut when long. Safe in tables."""
    shown = " ".join(_printable(text).split()) or " "
    if len(shown) > _LONGEST:
        shown = shown[: _LONGEST - 1] + "…"
    longest = max((len(run) for run in re.findall(r"`+", shown)), default=0)
    fence = "`" * (longest + 1)
    pad = " " if shown.startswith("`") or shown.endswith("`") else ""
    return f"{fence}{pad}{shown}{pad}{fence}".replace("|", "\\|")


def sentence(text: str) -> str:
    """`text` as one line of plain words: no markup in it is live."""
    shown = " ".join(_printable(text).split())
    return re.sub(r"([\\`*_\[\]<>#|~!$&])", r"\\\1", shown)


def quoted(text: str) -> str:
    """A foreign Markdown document as a block quote.

    Its front matter is gone, headings are lowered, HTML is shown instead of rendered, link definitions are
    inert, and whatever block it leaves open ends with the quote. Code blocks are kept as they are. The
    result is parsed again; a document that still is not contained is shown as plain text.
    """
    # A tab reaches to the next stop of four columns, which the quote's own "> " would shift.
    body = _printable(without_front_matter(text)).expandtabs(4).strip()
    if len(body) > _QUOTED:
        body = body[:_QUOTED] + "\n\n(cut here: the card is longer)"
    written = _block_quote(body)
    return written if _is_contained(written) else _fenced(body)


def _is_contained(written: str) -> bool:
    """Whether a Markdown reader sees one block quote without HTML, high headings or link definitions."""
    environment: dict[str, object] = {}
    tokens = MarkdownIt("commonmark").parse(written, environment)
    everything = [*tokens, *(child for token in tokens for child in token.children or ())]
    top = [token.type for token in tokens if token.level == 0]
    return (
        top == ["blockquote_open", "blockquote_close"]
        and not environment.get("references")
        and not any(token.type in ("html_block", "html_inline") for token in everything)
        and not any(token.type == "heading_open" and token.tag in ("h1", "h2") for token in tokens)
    )


def _fenced(body: str) -> str:
    longest = max((len(run) for run in re.findall(r"`+", body)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{body}\n{fence}"


def _block_quote(body: str) -> str:
    lines = body.split("\n")
    # Parsed without HTML, as it will be read once its tags are escaped: an HTML block hides headings.
    tokens = MarkdownIt("commonmark", {"html": False}).parse(body)
    in_code = _lines_of(tokens, {"fence", "code_block"})
    headings = {
        token.map[0]: (token.map[1], int(token.tag[1]))
        for token in tokens
        if token.type == "heading_open" and token.map is not None
    }
    written: list[str] = []
    at = 0
    while at < len(lines):
        if at in headings:
            end, level = headings[at]
            written.append(_lowered(lines[at:end], level))
            at = end
            continue
        written.append(lines[at] if at in in_code else _inert(lines[at]))
        at += 1
    return "\n".join(f"> {line}".rstrip() for line in written)


def without_front_matter(text: str) -> str:
    """The document below its YAML block, if it has one."""
    match = re.match(r"\s*---[ \t]*\r?\n.*?^(?:---|\.\.\.)[ \t]*(?:\r?\n|\Z)", text, re.DOTALL | re.MULTILINE)
    return text[match.end() :] if match else text


def _lines_of(tokens: list[Token], types: set[str]) -> set[int]:
    return {
        line
        for token in tokens
        if token.type in types and token.map
        for line in range(token.map[0], token.map[1])
    }


def _lowered(lines: list[str], level: int) -> str:
    """One ATX heading line for a heading of either form."""
    first = " ".join(line.strip() for line in lines)
    prefix = re.match(r"[>\s*+-]*(?=#|\S)", lines[0])
    text = re.sub(r"^[>\s]*#{1,6}\s*", "", first)
    if len(lines) > 1:  # underlined with === or ---
        text = re.sub(r"\s*(=+|-+)$", "", text)
    quote = ">" * (prefix.group().count(">") if prefix else 0)
    hashes = "#" * min(_LOWEST_HEADING, level + _HEADING_SHIFT)
    return f"{quote} {hashes} {_inert(text)}".strip()


def _inert(line: str) -> str:
    """The line without live HTML and without a link definition; autolinks stay."""
    placed = _AUTOLINK.sub("\0", line).replace("<", "&lt;").replace("\0", "<")
    return _DEFINITION.sub(r"\1\\[", placed) if re.match(r"^[\s>*+-]*\[[^\]]*\]:", placed) else placed


def _printable(text: str) -> str:
    """Without control, format (direction overrides, zero widths) and unassigned characters."""
    return "".join(
        character
        for character in text.replace("\r\n", "\n").replace("\r", "\n")
        if character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Co", "Cn")
    )
