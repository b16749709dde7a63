"""The evidence as rows, Markdown, page and picture."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from merge_adapter.report.charts import picture
from merge_adapter.report.evidence import escape, verdict_markdown, verdict_rows
from merge_adapter.report.page import page, write_page
from merge_adapter.types import Verdict

MEASURE = {
    "mean": 1e-5,
    "lower": 9e-6,
    "upper": 2e-5,
    "p99": 1e-4,
    "p999": 2e-4,
    "largest": 3e-4,
    "agreement": 0.99,
}
HOSTILE = "<script>alert(1)</script> @everyone ![x](http://evil.example/p.png) | `x` \u202e\x01 #1"


def verification(tensors: int = 3, name: str = "model.layers.{}.q_proj.weight") -> dict[str, Any]:
    per_tensor = [
        {
            "name": name.format(at),
            "kind": "update",
            "agreement": "wrong" if at == tensors - 1 else "exact",
            "alpha": 0.0 if at == tensors - 1 else 1.0,
            "retained": 0.99,
            "effect": 0.01,
            "worst_error": 0.5,
            "diagnosis": "not merged" if at == tensors - 1 else "",
        }
        for at in range(tensors)
    ]
    span = {"min": 0.0, "median": 1.0, "max": 1.0}
    return {
        "verdict": "fail",
        "reasons": [f"{per_tensor[-1]['name']}: not merged"],
        "files": {"verdict": "pass", "tensors": tensors, "bytes": 1000, "dtypes": ["BF16"]},
        "weights": {
            "verdict": "fail",
            "tensors": tensors,
            "agreement": {"exact": tensors - 1, "wrong": 1},
            "alpha": span,
            "retained": span,
            "per_tensor": per_tensor,
        },
        "outputs": {
            "verdict": "pass",
            "kind": "causal-lm",
            "metric": "KL divergence from base + adapter, nats per position",
            "tokens": 512,
            "noise": MEASURE,
            "error": MEASURE,
            "effect": MEASURE | {"mean": 0.5},
            "histogram": {
                "log10_low": -8,
                "log10_high": 1,
                "counts": {"noise": [0, 5, 2], "error": [0, 4, 3], "effect": [0, 0, 9]},
            },
        },
        "greedy": {
            "tokens": 8,
            "equal": 0,
            "of": 1,
            "texts": [
                {
                    "prompt": name,
                    "base": "b",
                    "reference": "r",
                    "merged": HOSTILE,
                    "equal_tokens": 2,
                    "gap": 0.5,
                    "noise": 0.1,
                    "explained": False,
                }
            ],
        },
        "tokenizer": {
            "verdict": "pass",
            "texts": 38,
            "conversations": 5,
            "size": 512,
            "template": True,
            "findings": [],
        },
        "mutants": [{"fault": "no-op: the base itself", "caught_by": ["weights"]}],
    }


def test_every_part_that_ran_has_one_row_with_its_own_result() -> None:
    """A failed weights part stands beside an outputs part that passed."""
    rows = {row.check: row for row in verdict_rows(verification())}
    assert list(rows) == ["files", "weights", "outputs", "greedy text", "tokenizer", "injected faults"]
    assert rows["weights"].result is Verdict.FAIL
    assert "1 wrong" in rows["weights"].evidence
    assert rows["outputs"].result is Verdict.PASS
    assert rows["greedy text"].result is Verdict.INCONCLUSIVE


def test_a_merge_nobody_verified_has_no_rows() -> None:
    """`--no-verify` leaves a verdict and its reason, nothing to tabulate."""
    empty = {"verdict": "inconclusive", "reasons": ["not verified"]}
    assert verdict_rows(empty) == ()
    assert "not verified" in verdict_markdown(empty)


def test_markdown_shows_hostile_text_as_text() -> None:
    """No tag, image, mention or extra column comes out of a tensor's name or a model's text."""
    text = verdict_markdown(verification(name=HOSTILE))
    assert "<script" not in text
    assert not re.search(r"(?<!\\)!\[", text)
    assert "@everyone" not in text
    assert "http://" not in text
    table = [line for line in text.splitlines() if line.startswith("| ")]
    assert all(len(re.findall(r"(?<!\\)\|", line)) in (4, 5) for line in table)


def test_escaping_removes_direction_marks_and_newlines() -> None:
    """A name cannot turn the line round or start a new one."""
    assert "\u202e" not in escape(HOSTILE)
    assert "\n" not in escape("a\n# b")


@pytest.mark.parametrize("text", ["# large", "+ inner", "- inner", "#1"])
def test_a_reason_starts_no_block_of_its_own(text: str) -> None:
    """No heading and no list within the list, whatever a tensor or a file is called."""
    shown = verdict_markdown({"verdict": "fail", "reasons": [text]})
    assert f"- \\{text[0]}" in shown


def test_the_page_is_self_contained_and_escaped(tmp_path: Path) -> None:
    """No script, no request, both colour schemes, and a hostile name as text."""
    written = write_page(tmp_path / "merge_report.html", {"verification": verification(name=HOSTILE)})
    html = (tmp_path / "merge_report.html").read_text(encoding="utf-8")
    assert written.bytes == len(html.encode())
    assert "<script" not in html
    assert not re.search(r"(src|href)\s*=", html)
    assert "prefers-color-scheme:dark" in html
    assert "default-src 'none'" in html
    assert not {"\u202e", "\x01"} & set(html)


@pytest.mark.parametrize("width", [360, 1200])
def test_the_page_does_not_scroll_sideways(width: int, browser: Any) -> None:
    """Names of folders and tensors have no spaces to break lines at, and no end; wide tables scroll on their own."""
    name = "a_long_name." * 30
    section = verification(name=name + "{}")
    section["reasons"] = [f"{name}: not merged"]
    section["tokenizer"]["findings"] = [name]
    tab = browser.new_page(viewport={"width": width, "height": 800})
    tab.set_content(page({"adapter": {"id": name}, "verification": section}))
    assert tab.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("tensors", [1, 5000])
def test_the_page_stays_small(tensors: int) -> None:
    """Thousands of tensors make a plot and a table of a few hundred, the wrong one among them."""
    html = page({"verification": verification(tensors)})
    assert len(html.encode()) < 300_000
    assert f"layers.{tensors - 1}.q_proj" in html


def test_the_picture_is_one_well_formed_svg() -> None:
    """It parses as XML, carries the verdict, and refers to nothing outside itself."""
    section = verification(name=HOSTILE)
    section["tokenizer"]["findings"] = [f"vocabulary: {HOSTILE}"]
    rows = [(row.check, row.result.value, row.evidence) for row in verdict_rows(section)]
    svg = picture(section, rows)
    root = ElementTree.fromstring(svg)
    assert root.tag.endswith("svg")
    assert "fail" in "".join(root.itertext())
    assert "href" not in svg
