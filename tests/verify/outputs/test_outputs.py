"""What the outputs part makes of the distances."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from merge_adapter.types import Verdict
from merge_adapter.verify.findings import verdict
from merge_adapter.verify.memory.kept import Answers
from merge_adapter.verify.outputs.judging import OutputsPart, judge_outputs
from merge_adapter.verify.outputs.reading import Reader
from merge_adapter.verify.probes.batch import Batch
from merge_adapter.verify.probes.batches import FEWEST, random_ids

DOCUMENTS, TOLD, LENGTH, CLASSES = 6, 3, 4, 5


def judged(place: Path, *, spoilt: str = "", by: float = torch.nan) -> OutputsPart:
    """A right merge, of which M reads the first half; one arm's answer to the last document is spoilt."""
    generator = torch.Generator().manual_seed(0)
    batch = Batch(
        torch.zeros(DOCUMENTS, LENGTH, dtype=torch.int64), torch.ones(DOCUMENTS, LENGTH, dtype=torch.int64)
    )
    reference = torch.randn(DOCUMENTS, LENGTH, CLASSES, generator=generator)
    arms = {
        "reference": reference,
        "base": reference + torch.randn(reference.shape, generator=generator),
        "oracle": reference + 1e-3 * torch.randn(reference.shape, generator=generator),
    }
    told = Answers((arms["oracle"][:TOLD].clone(),))
    if spoilt:
        arms[spoilt][-1] = by
    reader = Reader("causal-lm", batch, kept=TOLD, place=place)
    reader.add(batch, arms["reference"], arms["base"], arms["oracle"])
    names = [str(at) for at in range(DOCUMENTS)]
    return judge_outputs(
        reader.reading(), told, "causal-lm", batch, names=names, confidence=0.99, seed=0, settled=True
    )


def test_a_right_merge_passes(tmp_path: Path) -> None:
    """Nothing is found."""
    assert judged(tmp_path).findings == []


@pytest.mark.parametrize("by", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("arm", ["reference", "base", "oracle"])
def test_what_is_not_a_number_decides_nothing(tmp_path: Path, arm: str, by: float) -> None:
    """Also on a document that the merged model does not read: every comparison with it would be false."""
    assert verdict(judged(tmp_path, spoilt=arm, by=by).findings) is Verdict.INCONCLUSIVE


def compared(place: Path, off: torch.Tensor) -> OutputsPart:
    """A merge that is not the oracle to the bit; `off`: how far M's logits are from R, document by document."""
    generator = torch.Generator().manual_seed(1)
    count = len(off)
    batch = Batch(torch.zeros(count, LENGTH, dtype=torch.int64), torch.ones(count, LENGTH, dtype=torch.int64))
    shape = (count, LENGTH, CLASSES)
    reference, base, near, nearer, change = torch.randn(5, *shape, generator=generator)
    merged = Answers((reference + off[:, None, None] * change,))
    reader = Reader("causal-lm", batch, kept=count, place=place)
    reader.add(batch, reference, reference + base, reference + 1e-3 * near, reference + 1.5e-3 * nearer)
    names = [str(at) for at in range(count)]
    return judge_outputs(reader.reading(), merged, "causal-lm", batch, names=names, confidence=0.99, seed=0)


@pytest.mark.parametrize(
    ("off", "expected"),
    [
        pytest.param([1e-3] * 9, Verdict.PASS, id="as far as rounding"),
        pytest.param([1e-1] * 9, Verdict.FAIL, id="further in each"),
        pytest.param([1e-1] * FEWEST, Verdict.FAIL, id="further in each of the fewest"),
        pytest.param([1e-3] * 8 + [2e-2], Verdict.INCONCLUSIVE, id="further in one"),
    ],
)
def test_one_document_of_many_decides_nothing(tmp_path: Path, off: list[float], expected: Verdict) -> None:
    """E is a mean over documents as C is, and has bounds as well."""
    part = compared(tmp_path, torch.tensor(off))
    assert verdict(part.findings) is expected, part.findings
    if expected is Verdict.INCONCLUSIVE:
        assert "a few documents account for it" in str(part.findings[0])


def test_a_mean_with_bounds_takes_several_documents(good: Callable[[str], Any]) -> None:
    """`--probe-tokens 16` is one document, whose bounds are itself: a right merge failed by a hair in fp32."""
    result = good("lm-fp32").judge(outputs=True, isolated=False, probe_tokens=16, greedy_tokens=0)
    assert result.verdict is Verdict.PASS, result.reasons
    assert result.evidence["outputs"]["documents"] == FEWEST
    assert len(random_ids(budget=16, vocabulary=9, limit=99, seed=0).batch) == FEWEST
