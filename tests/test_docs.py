"""README and docs held against the repository: what they name exists, and they can be found."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.main import get_command

from merge_adapter.cli import app

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
_FENCE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)


def _options(command: object) -> Iterator[str]:
    """Every option of a command and of those below it."""
    for parameter in getattr(command, "params", ()):
        yield from (*parameter.opts, *parameter.secondary_opts)
    for below in getattr(command, "commands", {}).values():
        yield from _options(below)


def _anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_link_leads_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", _FENCE.sub("", page.read_text(encoding="utf-8"))):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in _anchors(target), link


def test_the_readme_leads_to_every_page() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in PAGES[1:] if f"{page.relative_to(ROOT)})" not in readme] == []


def test_the_readme_names_every_extra() -> None:
    """All but those for work on this project."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    extras = set(project["optional-dependencies"]) - {"dev", "bench"}
    assert [extra for extra in sorted(extras) if f"`{extra}`" not in readme] == []


def test_contributing_shows_every_module_and_folder() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    package = ROOT / "src" / "merge_adapter"
    names = {path.name for path in package.glob("*.py")} | {
        path.parent.name + "/" for path in package.glob("**/__init__.py") if path.parent != package
    }
    assert [name for name in sorted(names) if name[0] != "_" and name not in text] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_option_of_ours_that_is_named_exists(page: Path) -> None:
    """In calls of merge-adapter, and wherever an option stands alone."""
    known = {*_options(get_command(app)), "--gpus", "--build-arg"}  # docker's
    text = page.read_text(encoding="utf-8")
    alone = re.findall(r"`(--[a-z][a-z-]+)", text)
    called = [
        option
        for line in re.findall(r"merge-adapter (?:[a-z]+) (.*)", text.replace("\\\n", " "))
        for option in re.findall(r"(--[a-z][a-z-]+)", line)
    ]
    assert sorted({*alone, *called} - known) == []
