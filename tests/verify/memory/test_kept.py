"""Answers that wait for the merged model's: in memory when small, in files when large."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from merge_adapter.errors import StorageError
from merge_adapter.verify.memory.kept import SMALL, Answers, keep
from merge_adapter.verify.probes.batch import BATCH_LOGITS, Batch


def test_small_answers_stay_and_large_ones_lie_in_a_file(tmp_path: Path) -> None:
    """What lies in a file is the same, and outlives the folder."""
    small, large = torch.ones(3), torch.arange(SMALL // 4, dtype=torch.float32)
    assert keep(small, tmp_path, "small") is small
    held = keep(large, tmp_path, "large")
    assert [path.name for path in tmp_path.iterdir()] == ["large.safetensors"]
    shutil.rmtree(tmp_path)
    assert torch.equal(held, large)


def test_a_full_disk_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what to do about it."""

    class Full:
        free = 1000

    monkeypatch.setattr(shutil, "disk_usage", lambda _place: Full())
    with pytest.raises(StorageError, match=r"has 1\.0 kB free") as raised:
        keep(torch.zeros(SMALL), tmp_path, "large")
    assert "TMPDIR" in str(raised.value.hint)
    assert not list(tmp_path.iterdir())


def test_answers_are_read_a_document_at_a_time() -> None:
    """Pieces of any size."""
    answers = Answers((torch.zeros(2, 5, 7), torch.ones(1, 5, 7)))
    assert len(answers) == 3
    assert answers.shape == (5, 7)
    assert [tuple(document.shape) for document in answers] == [(1, 5, 7)] * 3
    assert answers.whole().shape == (3, 5, 7)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, [64, 36]),
        ({"cuts": (9,)}, [9, 64, 27]),
        ({"classes": BATCH_LOGITS // 16 // 50}, [50, 50]),
        ({"classes": BATCH_LOGITS}, [1] * 100),
    ],
)
def test_passes_end_at_cuts_and_where_logits_would_fill_the_memory(
    fields: dict[str, Any], expected: list[int]
) -> None:
    """A part of a batch keeps the cuts inside it."""
    ids = torch.zeros(100, 16, dtype=torch.int64)
    batch = Batch(ids, torch.ones_like(ids), **fields)
    assert [len(part) for part in batch.parts()] == expected
    assert len(next(batch.part(0, 9).parts())) == min(9, expected[0])
