"""Strangers' text in Markdown: rendered, it is the text, and nothing but text."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from merge_adapter.action.markdown import code, one_line, prose, table

HOSTILE = (
    "<img src=x onerror=alert(1)>",
    "<script>alert(1)</script>",
    "</details></td></table><h1>x",
    "[click](https://evil.example)",
    "![p](https://evil.example/p.png)",
    "https://evil.example and www.evil.example",
    "<https://evil.example>",
    "**bold** _it_ ~~no~~ `code` ```",
    "# heading",
    "- list",
    "a | b | c",
    "a\n\n# heading\n\n| x |",
    "&lt;b&gt; &#60;b&#62;",
    "\\`\\<b>",
    "``` ` `` ",
    "$`math`$",
    "right\u202eto left, zero\u200bwidth, nul\x00, bell\x07",
)
"""Names, messages and card texts that try to be more than text."""
RENDERER = MarkdownIt("gfm-like", {"html": True, "linkify": False})
ALLOWED = {"p", "code", "table", "thead", "tbody", "tr", "th", "td"}


def tags(html: str) -> set[str]:
    return {name.lower() for name in re.findall(r"</?([a-zA-Z][\w-]*)", html)}


def words(html: str) -> str:
    import html as entities

    return entities.unescape(re.sub(r"<[^>]*>", "", html)).strip()


def plain(text: str) -> str:
    """`text` as it should be seen."""
    return one_line(text).strip()


@pytest.mark.parametrize("text", HOSTILE)
def test_names_stay_names(text: str) -> None:
    html = RENDERER.render(f"Adapter {code(text)} merged")
    assert tags(html) <= ALLOWED
    assert words(html) == f"Adapter {plain(text)} merged"


@pytest.mark.parametrize("text", HOSTILE)
def test_sentences_stay_sentences(text: str) -> None:
    html = RENDERER.render(f"It said: {prose(text)}.")
    assert tags(html) == {"p"}
    assert words(html).replace("\u200b", "") == f"It said: {plain(text)}."


@pytest.mark.parametrize("text", HOSTILE)
def test_cells_stay_in_their_column(text: str) -> None:
    html = RENDERER.render(table(("a", "b", "c"), [(code(text), prose(text), "end")]))
    assert tags(html) <= ALLOWED
    cells = re.findall(r"<td>(.*?)</td>", html, re.DOTALL)
    assert len(cells) == 3
    assert words(cells[0]) == plain(text)
    assert words(cells[1]).replace("\u200b", "") == plain(text)


@given(st.text(max_size=60))
@settings(max_examples=150, deadline=None)
def test_no_text_at_all_gets_out(text: str) -> None:
    """The same for whatever hypothesis can think of."""
    html = RENDERER.render(table(("a", "b"), [(code(text), prose(text))]))
    assert tags(html) <= ALLOWED
    assert len(re.findall(r"<td>", html)) == 2


def test_nobody_is_called_and_no_issue_is_linked() -> None:
    """GitHub looks for mentions in the rendered text, where escapes are gone; a word break stops it."""
    rendered = words(RENDERER.render(prose("ping @octocat, fixes #1, see acme/repo#2, GH-3 or gh-4")))
    assert not re.search(r"@\w", rendered)
    assert not re.search(r"(#|GH-)\d", rendered, re.IGNORECASE)


def test_what_turns_or_hides_text_is_made_visible() -> None:
    assert one_line("a\u202eb\u200bc\x1bd") == "a\ufffdb\ufffdc\ufffdd"
