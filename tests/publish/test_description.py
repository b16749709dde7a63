"""The words of a publication, hostile ones included."""

from __future__ import annotations

from typing import Any

import pytest
from markdown_it import MarkdownIt

from merge_adapter.publish import description
from merge_adapter.publish.identity import Marker, find_marker, identity_of_report
from merge_adapter.publish.settings import Openness, PublishSettings, Target
from merge_adapter.types import Verdict, Verification

REPORT: dict[str, Any] = {
    "adapter": {"id": "ann/adapter", "revision": "a" * 40, "method": "LORA"},
    "base": {"id": "corp/base", "revision": "b" * 40},
    "output": {"dtype": "auto", "files": []},
}
TARGET = Target("ann/adapter-merged", "", private=False, least=Openness.PUBLIC)
HOSTILE = (
    "tensor `a` <img src=x onerror=y> ![p](http://evil.example/x) [l](javascript:z) @everyone "
    "\n\n# Heading\n<!-- merge-adapter:1 --> | cell | **bold** https://evil.example"
)


def describe(verdict: Verdict, *reasons: str, report: dict[str, Any] = REPORT) -> str:
    marker = Marker(identity_of_report(report, ""), verdict)
    return description.describe(
        report,
        Verification(verdict, reasons),
        marker,
        TARGET,
        PublishSettings(target=TARGET),
        evidence="",
        number=7,
    )


def test_the_description_names_sources_commits_and_how_to_check() -> None:
    """What a reviewer needs, and the marker that the next run looks for."""
    text = describe(Verdict.PASS, "All tensors agree.")
    assert "[ann/adapter](/ann/adapter)" in text
    assert f"/corp/base/commit/{'b' * 40}" in text
    assert f"merge-adapter verify ann/adapter-merged@refs/pr/7 --adapter ann/adapter@{'a' * 40}" in text
    assert find_marker(text) is not None


@pytest.mark.parametrize("verdict", [Verdict.FAIL, Verdict.INCONCLUSIVE])
def test_what_did_not_pass_says_that_it_stays_a_draft(verdict: Verdict) -> None:
    """In the description and in the comment, with the reasons."""
    verification = Verification(verdict, ("layer 3 differs",))
    assert "stays a draft" in describe(verdict, "layer 3 differs")
    comment = description.evidence_comment(REPORT, verification, evidence="| a |\n|---|")
    assert "layer 3 differs" in comment
    assert "| a |" in comment


def test_text_of_others_cannot_break_out() -> None:
    """No markup, image, link, mention, heading or HTML comes from a reason."""
    escaped = description.escape(HOSTILE)
    html = MarkdownIt("gfm-like", {"linkify": False}).render(f"- {escaped}")
    for forbidden in ("<img", "<a ", "<h1", "<strong", "<code", "<!--", "<table"):
        assert forbidden not in html
    assert "@" not in escaped
    assert "\n" not in escaped
    assert "://" not in escaped


def test_a_marker_smuggled_into_a_reason_is_not_believed() -> None:
    """The first marker counts, so none may come before our own."""
    forged = str(Marker(identity_of_report(REPORT, "elsewhere"), Verdict.PASS))
    found = find_marker(describe(Verdict.FAIL, forged))
    assert found is not None
    assert found.verdict is Verdict.FAIL


def test_a_local_source_has_no_link_and_no_path() -> None:
    """Reports of local merges are published too."""
    report = {**REPORT, "adapter": {"id": "my-run", "revision": None, "method": "LORA"}}
    assert "my-run (a local folder)" in describe(Verdict.PASS, report=report)
