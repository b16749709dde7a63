"""What the outputs part makes of the distances."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from merge_adapter.types import Verdict
from merge_adapter.verify.answers import Batch
from merge_adapter.verify.findings import verdict
from merge_adapter.verify.kept import Answers
from merge_adapter.verify.outputs import OutputsPart, judge_outputs
from merge_adapter.verify.reading import Reader

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
