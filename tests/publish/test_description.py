"""The words of a publication, hostile ones included."""

from __future__ import annotations

import shlex
from typing import Any

import pytest
from markdown_it import MarkdownIt

from merge_adapter.publish import description
from merge_adapter.publish.identity import Marker, find_marker, identity_of_report
from merge_adapter.publish.settings import Openness, Target
from merge_adapter.types import Verdict

REPORT: dict[str, Any] = {
    "adapter": {"id": "ann/adapter", "revision": "a" * 40, "method": "LORA"},
    "base": {"id": "corp/base", "revision": "b" * 40},
    "output": {"dtype": "auto", "files": []},
    "settings": {"strategy": "auto", "quantized_base": "refuse", "trust_remote_code": False},
}
TARGET = Target("ann/adapter-merged", "", private=False, least=Openness.PUBLIC)
HOSTILE = (
    "tensor `a` <img src=x onerror=y> ![p](http://evil.example/x) [l](javascript:z) @everyone "
    "\n\n# Heading\n<!-- merge-adapter:1 --> | cell | **bold** https://evil.example"
)


def report_of(verdict: Verdict, *reasons: str) -> dict[str, Any]:
    return {**REPORT, "verification": {"verdict": verdict.value, "reasons": list(reasons)}}


def describe(report: dict[str, Any], *notes: str) -> str:
    marker = Marker(identity_of_report(report, ""), Verdict(report["verification"]["verdict"]))
    return description.describe(report, marker, TARGET, notes=notes, number=7)


def test_the_description_names_sources_commits_and_how_to_check() -> None:
    """What a reviewer needs, and the marker that the next run looks for."""
    text = describe(report_of(Verdict.PASS, "All tensors agree."))
    assert "[ann/adapter](/ann/adapter)" in text
    assert f"/corp/base/commit/{'b' * 40}" in text
    assert "merge-adapter verify ann/adapter-merged@refs/pr/7 " in text
    assert f"--adapter ann/adapter@{'a' * 40}" in text
    assert "All tensors agree" in text
    assert find_marker(text) is not None


def test_the_command_that_judges_again_expects_the_model_that_was_made() -> None:
    """Every adapter with its folder and weight, and every setting that decides what the merged model must be."""
    second = {
        "id": "ann/other",
        "revision": "c" * 40,
        "subfolder": "last one",
        "method": "LORA",
        "weight": -0.25,
    }
    several = {
        "adapters": [{**REPORT["adapter"], "weight": 0.1}, second],
        "combination": {"type": "dare_ties", "density": 0.5, "majority_sign": "total", "seed": 3},
        "output": {"dtype": "float16", "files": []},
        "settings": {"quantized_base": "dequantize", "trust_remote_code": True},
    }
    text = describe(report_of(Verdict.PASS) | several)
    command = shlex.split(text.split("```sh")[1].split("```")[0].replace("\\\n", " "))
    assert command[command.index("--adapter") :] == [
        "--adapter", f"ann/adapter@{'a' * 40}", "--adapter", f"ann/other@{'c' * 40}:last one",
        "--base-model", f"corp/base@{'b' * 40}", "--weight", "0.1", "--weight", "-0.25",
        "--combination", "dare_ties", "--density", "0.5", "--majority-sign", "total", "--seed", "3",
        "--dtype", "float16", "--quantized-base", "dequantize", "--trust-remote-code",
    ]  # fmt: skip


@pytest.mark.parametrize("verdict", [Verdict.FAIL, Verdict.INCONCLUSIVE])
def test_what_did_not_pass_says_that_it_stays_a_draft(verdict: Verdict) -> None:
    """In the description and in the comment, with the reasons."""
    report = report_of(verdict, "layer 3 differs")
    assert "stays a draft" in describe(report)
    comment = description.evidence_comment(report, verdict)
    assert "layer 3 differs" in comment
    assert verdict.value in comment


def test_text_of_others_cannot_break_out() -> None:
    """No markup, image, link, mention, heading or HTML comes from a reason or a note."""
    text = describe(report_of(Verdict.FAIL, HOSTILE), HOSTILE)
    html = MarkdownIt("gfm-like", {"linkify": False}).render(text)
    for forbidden in ("<img", "<strong>bold", "<h1", 'evil.example/x"', 'javascript:z"'):
        assert forbidden not in html
    assert "@everyone" not in text
    assert text.count("<!--") == 1


def test_evidence_that_the_hub_would_not_take_is_left_to_the_report() -> None:
    """Comments end at 65,536 characters."""
    report = report_of(Verdict.FAIL, *("x" * 5000 for _ in range(40)))
    assert len(describe(report)) < 65_536
    assert len(description.evidence_comment(report, Verdict.FAIL)) < 65_536


def test_a_marker_smuggled_into_a_reason_is_not_believed() -> None:
    """The first marker counts, so none may come before our own."""
    forged = str(Marker(identity_of_report(REPORT, "elsewhere"), Verdict.PASS))
    found = find_marker(describe(report_of(Verdict.FAIL, forged)))
    assert found is not None
    assert found.verdict is Verdict.FAIL


def test_a_local_source_has_no_link_and_no_path() -> None:
    """Reports of local merges are published too."""
    report = report_of(Verdict.PASS) | {"adapter": {"id": "my-run", "revision": None, "method": "LORA"}}
    assert "my-run (a local folder)" in describe(report)
