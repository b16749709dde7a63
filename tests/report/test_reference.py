"""The page of the report's fields is that of its schema."""

from __future__ import annotations

from pathlib import Path

import pytest

from merge_adapter.report.document import schema
from merge_adapter.report.reference import filled, main, reference

PAGE = Path(__file__).parents[2] / "docs" / "report.md"


def test_the_page_is_in_step_with_the_schema() -> None:
    """Make it anew with: python -m merge_adapter.report.reference docs/report.md"""
    assert "<!-- fields -->\n\n### The report\n" in PAGE.read_text(encoding="utf-8")
    assert main(["--check", str(PAGE)]) == 0


def test_every_field_of_the_schema_is_in_it() -> None:
    """Those of definitions too, and every link has its heading."""
    text = reference()
    fields = set(schema()["properties"])
    for definition in schema()["$defs"].values():
        fields |= set(definition.get("properties", {})) | set(
            definition.get("items", {}).get("properties", {})
        )
    missing = [name for name in fields if f"`{name}`" not in text and f".{name}`" not in text]
    assert not missing
    for part in text.split("](#")[1:]:
        assert f"### `{part.split(')')[0]}`" in text


def test_a_page_that_is_behind_is_named_and_made_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- fields -->\nold\n<!-- /fields -->\nafter\n")
    assert main(["--check", str(page)]) == 1
    assert "page.md" in capsys.readouterr().err
    assert main([str(page)]) == 0
    made = page.read_text()
    assert made == filled(made)
    assert made.startswith("before\n<!-- fields -->\n\n### The report")
    assert made.endswith("\n<!-- /fields -->\nafter\n")
