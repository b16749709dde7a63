"""The probe documents: enough of them, of many kinds, always the same; and a user's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from merge_adapter.errors import MalformedError, NotFoundError
from merge_adapter.verify.outputs.statistics import bounds
from merge_adapter.verify.probes import Probe, from_file, shipped
from merge_adapter.verify.probes.batches import random_ids
from merge_adapter.verify.repository.provenance import judge_likelihood


def test_the_shipped_set_is_broad_and_fixed() -> None:
    """At least 32 documents, conversations among them, no name twice, the same order each time."""
    probes = shipped()
    assert len(probes) >= 32
    assert len({probe.name for probe in probes}) == len(probes)
    assert sum(bool(probe.messages) for probe in probes) >= 4
    assert probes == shipped()
    kinds = {probe.name.split("-")[0] for probe in probes[:8]}
    assert len(kinds) >= 4, "a short run must still see several kinds"


def test_a_user_s_file_is_read_line_by_line(tmp_path: Path) -> None:
    """Plain text, and JSON lines with texts or conversations."""
    plain = tmp_path / "own.txt"
    plain.write_text("one\n\n two \n")
    assert [probe.text for probe in from_file(plain)] == ["one", "two"]
    lines = tmp_path / "own.jsonl"
    lines.write_text('{"text": "a"}\n{"messages": [{"role": "user", "content": "b"}]}\n')
    assert from_file(lines)[1] == Probe("own.jsonl:2", messages=({"role": "user", "content": "b"},))


@pytest.mark.parametrize(("name", "content"), [("own.txt", "a\n"), ("own.jsonl", '{"text": "a"}\n')])
def test_a_file_may_begin_with_a_mark(name: str, content: str, tmp_path: Path) -> None:
    """Some editors write a byte order mark: it is no part of the first document."""
    path = tmp_path / name
    path.write_text(content, encoding="utf-8-sig")
    assert [probe.text for probe in from_file(path)] == ["a"]


def test_a_json_document_is_no_text(tmp_path: Path) -> None:
    """An array would be read as one strange document."""
    path = tmp_path / "own.json"
    path.write_text('[{"text": "a"}]')
    with pytest.raises(MalformedError, match=r"own\.json, line 1 holds neither"):
        from_file(path)


@pytest.mark.parametrize("content", ["", "\n\n", '{"text": 3}', "[", '{"messages": []}'])
def test_a_file_without_probes_is_refused(tmp_path: Path, content: str) -> None:
    """With the line where there is one."""
    path = tmp_path / "own.jsonl"
    path.write_text(content)
    with pytest.raises(MalformedError):
        from_file(path)
    with pytest.raises(NotFoundError):
        from_file(tmp_path / "absent.txt")


def test_random_ids_are_seeded() -> None:
    """The same ids for a seed, others for another."""
    one, same, other = (
        random_ids(budget=64, vocabulary=99, limit=512, seed=seed).batch.ids for seed in (1, 1, 2)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert int(one.max()) < 99


def test_bootstrap_bounds_enclose_the_mean_and_repeat() -> None:
    """One-sided bounds by a seeded bootstrap."""
    values = torch.rand(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    lower, upper = bounds(values, confidence=0.99, seed=3)
    assert lower < float(values.mean()) < upper
    assert (lower, upper) == bounds(values, confidence=0.99, seed=3)


def test_an_adapter_worse_than_chance_on_a_good_base_is_pointed_out() -> None:
    """The sign of a foreign base; one that is itself no better than chance has to be left far behind."""
    assert list(judge_likelihood(12.0, 3.0, 1000))
    assert not list(judge_likelihood(4.0, 3.0, 1000))
    assert not list(judge_likelihood(12.0, 9.0, 1000))
    assert list(judge_likelihood(40.0, 9.0, 1000)), "far worse than a base that is no better than chance"
