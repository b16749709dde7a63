"""Text to train on: what every Python installation carries, read in a fixed order.

Nothing is downloaded. The language reference comes from `pydoc_data.topics`, docstrings and source code from
the standard library's files, parsed and never imported. All of it is under the Python Software Foundation
License. Another patch release of Python gives slightly other text, and so slightly other models.
"""

from __future__ import annotations

import ast
import os
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

STANDARD_LIBRARY = Path(os.__file__).parent
SKIPPED_FOLDERS = frozenset(
    (
        "__pycache__",
        "ensurepip",
        "idlelib",
        "lib2to3",
        "pydoc_data",
        "site-packages",
        "test",
        "tests",
        "turtledemo",
    )
)
ANSWER_CHARACTERS = range(16, 121)
"""Lengths of a first sentence that make an answer worth learning."""


@dataclass(frozen=True)
class Documented:
    """A module, class or function of the standard library with its docstring."""

    name: str
    """Dotted, for example `textwrap.dedent`."""
    docstring: str

    @property
    def summary(self) -> str:
        """The first sentence on one line, without a trailing full stop."""
        first = " ".join(self.docstring.split("\n\n")[0].split())
        return re.split(r"(?<=[a-z)])\. ", first)[0].rstrip(".")


@dataclass(frozen=True)
class Question:
    """A question about the standard library with its one-line answer."""

    question: str
    answer: str


def modules() -> list[tuple[str, str]]:
    """(dotted name, source) of every public module of the standard library, sorted by path."""
    found = []
    for path in sorted(STANDARD_LIBRARY.rglob("*.py")):
        relative = path.relative_to(STANDARD_LIBRARY)
        if SKIPPED_FOLDERS & set(relative.parts) or relative.parts[0].startswith("_sysconfigdata"):
            continue
        parts = relative.with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found.append((name, path.read_text(encoding="utf-8", errors="replace")))
    return found


def documented() -> list[Documented]:
    """Everything in the standard library that has a docstring, in the order of the files."""
    found = []
    for module, source in modules():
        tree = ast.parse(source)
        for name, node in _definitions(tree, module):
            docstring = ast.get_docstring(node)
            if docstring:
                found.append(Documented(name, docstring))
    return found


def _definitions(
    node: ast.Module | ast.ClassDef, name: str
) -> list[tuple[str, ast.Module | ast.ClassDef | ast.FunctionDef]]:
    found: list[tuple[str, ast.Module | ast.ClassDef | ast.FunctionDef]] = [(name, node)]
    for child in node.body:
        if isinstance(child, ast.ClassDef):
            found += _definitions(child, f"{name}.{child.name}")
        elif isinstance(child, ast.FunctionDef):
            found.append((f"{name}.{child.name}", child))
    return found


def reference_documents() -> list[str]:
    """What the base model learns: the language reference, and help pages as pydoc lays them out."""
    pages = [f"{item.name}\n    " + item.docstring.replace("\n", "\n    ") for item in documented()]
    sections = [text.strip() for _, text in sorted(topics.items())]
    return sections + pages


def questions() -> list[Question]:
    """What the adapter learns: one short question about each public function, answered in one line."""
    found: dict[str, Question] = {}
    for item in documented():
        short = ".".join(item.name.split(".")[-2:])
        public = not any(part.startswith("_") for part in item.name.split("."))
        if public and len(item.summary) in ANSWER_CHARACTERS and item.summary[0].isupper():
            answer = f"In short: {item.summary[0].lower()}{item.summary[1:]}. That is all."
            found.setdefault(short, Question(f"What does {short} do?", answer))
    return list(found.values())


@dataclass(frozen=True)
class Passage:
    """A short text and whether it is source code."""

    text: str
    is_code: bool


def passages(count: int, *, seed: int, lines: int = 6) -> list[Passage]:
    """`count` passages of `lines` lines, half of them code and half prose, shuffled by `seed`."""
    chooser = random.Random(seed)
    code = _cut(("\n".join(_code_lines(source)) for _, source in modules()), lines)
    prose = _cut((text for _, text in sorted(topics.items())), lines) + _cut(
        (item.docstring for item in documented() if "\n" in item.docstring), lines
    )
    half = count // 2
    chosen = [Passage(text, is_code=True) for text in chooser.sample(code, half)]
    chosen += [Passage(text, is_code=False) for text in chooser.sample(prose, half)]
    chooser.shuffle(chosen)
    return chosen


def _code_lines(source: str) -> list[str]:
    """The lines of a module that belong to no docstring and no comment."""
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            docstrings.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return [
        line
        for number, line in enumerate(source.splitlines(), 1)
        if number not in docstrings and line.strip() and not line.lstrip().startswith("#")
    ]


def _cut(texts: Iterable[str], lines: int) -> list[str]:
    found = []
    for text in texts:
        kept = [line for line in text.splitlines() if line.strip()]
        found += ["\n".join(kept[at : at + lines]) for at in range(0, len(kept) - lines + 1, lines)]
    return found
