"""merge_report.json: checked against its schema when written and when read."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from merge_adapter.errors import MalformedError, NotFoundError
from merge_adapter.report import document
from merge_adapter.types import Origin

SHA = "a" * 40
REPORT: dict[str, Any] = {
    "schema": 1,
    "tool": document.tool_entry(),
    "adapter": {"id": "o/a", "revision": SHA, "method": "LORA", "tensors": 4, "consumed": 4},
    "base": {"id": "o/b", "revision": SHA},
    "settings": {"strategy": "auto", "quantized_base": "refuse", "trust_remote_code": False},
    "output": {
        "dtype": "auto",
        "files": [{"path": "model.safetensors", "bytes": 3, "sha256": "0" * 64, "origin": "merged"}],
    },
    "merge": {
        "seconds": 0.1,
        "bytes_read": 3,
        "bytes_written": 3,
        "bytes_changed": 3,
        "peak_rss_bytes": 9,
        "tensors_changed": 1,
        "tensors_copied": 0,
        "strategy": "stream",
    },
    "verification": {"verdict": "pass", "reasons": ["Every tensor equals the oracle."]},
    "notes": [],
}


def broken(*path: str | int, value: Any) -> dict[str, Any]:
    report = copy.deepcopy(REPORT)
    place: Any = report
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = value
    return report


def test_a_report_survives_writing_and_reading(tmp_path: Path) -> None:
    document.write(REPORT, tmp_path)
    assert document.read(tmp_path) == REPORT
    assert [path.name for path in tmp_path.iterdir()] == ["merge_report.json"]


@pytest.mark.parametrize(
    ("report", "field"),
    [
        (broken("schema", value=2), "schema"),
        (broken("adapter", "revision", value="main"), "adapter/revision"),
        (broken("output", "files", 0, "sha256", value="x"), "output/files/0/sha256"),
        (broken("output", "files", 0, "bytes", value=-1), "output/files/0/bytes"),
        (broken("verification", "verdict", value="good"), "verification/verdict"),
        (broken("merge", "seconds", value="1"), "merge/seconds"),
        ([], "the document"),
    ],
)
def test_what_breaks_the_schema_is_named(tmp_path: Path, report: Any, field: str) -> None:
    (tmp_path / "merge_report.json").write_text(json.dumps(report))
    with pytest.raises(MalformedError, match=field):
        document.read(tmp_path)


def test_a_folder_without_a_report_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError) as caught:
        document.read(tmp_path)
    assert "merge-adapter merge" in caught.value.hint


def test_numbers_that_json_lacks_are_refused() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        document.dump({"nan": float("nan")})


def test_a_local_source_is_told_by_its_name_alone() -> None:
    entry = document.source_entry(Origin(folder=Path("/home/someone/secret/adapter")))
    assert entry == {"id": "adapter", "revision": None}
