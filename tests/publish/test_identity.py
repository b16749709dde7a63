"""How the same publication is recognised again."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from merge_adapter.publish.identity import Marker, find_marker, identity_of_report
from merge_adapter.types import Verdict

REPORT: dict[str, Any] = {
    "adapter": {"id": "ann/adapter", "revision": "a" * 40},
    "base": {"id": "corp/base", "revision": "b" * 40},
    "settings": {"strategy": "auto", "quantized_base": "refuse", "trust_remote_code": False},
    "output": {
        "dtype": "auto",
        "files": [{"path": "model.safetensors", "bytes": 1, "sha256": "c" * 64, "origin": "merged"}],
    },
}


def changed(*path: str, to: object) -> dict[str, Any]:
    report = copy.deepcopy(REPORT)
    place = report
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = to
    return report


@pytest.mark.parametrize(
    "path",
    [
        ("adapter", "revision"),
        ("base", "revision"),
        ("base", "id"),
        ("output", "dtype"),
        ("settings", "strategy"),
    ],
)
def test_other_sources_or_settings_are_another_publication_of_the_same_lane(path: tuple[str, ...]) -> None:
    """They update the open pull request."""
    old, new = identity_of_report(REPORT, ""), identity_of_report(changed(*path, to="d" * 40), "")
    assert old.key != new.key
    assert old.lane == new.lane


def test_another_adapter_or_folder_is_another_lane() -> None:
    """They get a pull request of their own."""
    lane = identity_of_report(REPORT, "").lane
    assert identity_of_report(REPORT, "merged").lane != lane
    assert identity_of_report(changed("adapter", "id", to="ann/other"), "").lane != lane
    assert identity_of_report(changed("adapter", "subfolder", to="v2"), "").lane != lane


def test_timings_and_tool_versions_do_not_make_it_another_publication() -> None:
    """The report differs with every run, what it is of does not."""
    report = {**REPORT, "merge": {"seconds": 3.0}, "tool": {"version": "9"}, "notes": ["x"]}
    assert identity_of_report(report, "") == identity_of_report(REPORT, "")


def test_local_sources_are_known_by_the_weights_they_gave() -> None:
    """A folder has no commit."""
    local = changed("adapter", "revision", to=None)
    other = copy.deepcopy(local)
    other["output"]["files"][0]["sha256"] = "e" * 64
    assert identity_of_report(local, "").key != identity_of_report(other, "").key
    assert identity_of_report(local, "").adapter == "local"


@pytest.mark.parametrize("verdict", list(Verdict))
def test_a_marker_is_read_back_from_the_text_around_it(verdict: Verdict) -> None:
    """The description may be edited around it."""
    marker = Marker(identity_of_report(REPORT, ""), verdict)
    assert find_marker(f"words\n\n{marker}\nmore") == marker


def test_a_broken_marker_is_none() -> None:
    """A text that only resembles a marker is not one."""
    marker = str(Marker(identity_of_report(REPORT, ""), Verdict.PASS))
    assert find_marker(marker.replace("lane=", "lane=x")) is None
    assert find_marker("") is None
