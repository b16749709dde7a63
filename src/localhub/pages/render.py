"""Templates, Markdown and diffs to HTML. Everything that comes from a repository is escaped.

The content security policy allows nothing but this server's own style sheet, so that no page makes a
request elsewhere or runs a script, whatever a README holds.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any
from urllib.parse import quote

from fastapi.responses import HTMLResponse
from jinja2 import Environment, PackageLoader, StrictUndefined
from markdown_it import MarkdownIt
from markdown_it.token import Token
from markupsafe import Markup, escape

_POLICY = "default-src 'none'; style-src 'self'; img-src 'self'; base-uri 'none'; frame-ancestors 'none'"
MAX_DIFF_LINES = 4000
MAX_FILE_LINES = 200
"""A new tokenizer has tens of thousands, under which the files behind it would be lost."""
_HARMLESS = re.compile(r"(<!--.*?-->|</?(?:details|summary)>)", re.DOTALL)
_POINTER = "version https://git-lfs.github.com/spec/v1"


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("localhub.pages"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {
        "markdown": markdown,
        "bytes": human_bytes,
        "segment": lambda text: quote(text, safe=""),
        "path": lambda text: quote(text, safe="/"),
        "day": lambda text: str(text)[:16].replace("T", " "),
    }
    environment.tests["mapping"] = lambda value: isinstance(value, dict)
    return environment


@cache
def _markdown() -> MarkdownIt:
    # Raw HTML is recognised, so that it can be told from text, and rendered by `_raw`. Links are checked by the
    # library (no javascript:).
    rules = MarkdownIt("commonmark", {"html": True, "linkify": False}).enable(["table", "strikethrough"])
    rules.add_render_rule("html_block", _raw)
    rules.add_render_rule("html_inline", _raw)
    return rules


def _raw(_renderer: Any, tokens: Sequence[Token], index: int, *_: Any) -> str:
    """Raw HTML as the Hub shows it, as far as it is harmless: comments are hidden, bare folding tags stay, the rest
    comes out as text."""
    parts = _HARMLESS.split(tokens[index].content)
    return "".join(
        escape(part) if place % 2 == 0 else "" if part.startswith("<!--") else part
        for place, part in enumerate(parts)
    )


def markdown(text: str) -> Markup:
    """Markdown as safe HTML."""
    return Markup(_markdown().render(text))  # noqa: S704 - raw HTML is escaped by `_raw`


def human_bytes(size: int) -> str:
    """`1.5 MB`, as the Hub writes sizes."""
    value = float(size)
    for unit in ("Bytes", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "Bytes" else f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def render(
    template: str, *, status: int = 200, policy: str = "form-action 'self'", **values: Any
) -> HTMLResponse:
    """A page; `policy` adds to the content security policy."""
    page = _environment().get_template(template).render(**values)
    headers = {
        "Content-Security-Policy": f"{_POLICY}; {policy}",
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "same-origin",
    }
    return HTMLResponse(page, status_code=status, headers=headers)


@dataclass(frozen=True)
class DiffLine:
    """One line of a diff with the class it is styled by: file, hunk, add, del, same."""

    style: str
    text: str


def diff_lines(patch: str) -> list[DiffLine]:
    """The lines of a unified diff, at most MAX_FILE_LINES of each file and MAX_DIFF_LINES in all."""
    return list(_diff_lines(patch))


def _diff_lines(patch: str) -> Iterator[DiffLine]:
    header = False
    shown = in_file = 0
    for line in patch.splitlines():
        if line.startswith("diff --git "):
            header, in_file = True, 0
            yield DiffLine("file", line.removeprefix("diff --git a/").partition(" b/")[0])
            continue
        in_file += 1
        if in_file > MAX_FILE_LINES:
            if in_file == MAX_FILE_LINES + 1:
                yield DiffLine("hunk", "… the rest of this file's diff is not shown")
            continue
        shown += 1
        if shown > MAX_DIFF_LINES:
            yield DiffLine("hunk", "… the rest of this diff is not shown")
            return
        if line.startswith("@@"):
            header = False
            yield DiffLine("hunk", line)
        elif header:
            if line.startswith(("new file", "deleted", "rename", "similarity", "Binary")):
                yield DiffLine("hunk", line)
        elif line[1:] == _POINTER:
            yield DiffLine("hunk", "large file: its hash and size stand for its content")
        else:
            yield DiffLine({"+": "add", "-": "del"}.get(line[:1], "same"), line)
