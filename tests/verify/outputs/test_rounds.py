"""Documents are read until the effect is shown, and not further."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from merge_adapter.types import Verdict
from merge_adapter.verify.outputs.rounds import LOOKS, first_round, is_shown, rounds

CLEAR = torch.linspace(1, 2, 9)


def test_the_first_round_is_the_fewest_documents_that_can_show_an_effect() -> None:
    """At 99 %, looking three times: nine, since eight would all be above the noise by chance too often."""
    assert first_round(0.99) == 9
    assert 2.0**-9 <= 0.01 / LOOKS < 2.0**-8


@pytest.mark.parametrize(
    ("documents", "expected"), [(3, (3,)), (9, (9,)), (12, (9, 12)), (18, (9, 18)), (32, (9, 18, 32))]
)
def test_rounds_double_and_end_with_all_documents(documents: int, expected: tuple[int, ...]) -> None:
    """Never more than the looks that the level allows for."""
    assert rounds(documents, 0.99) == expected
    assert len(expected) <= LOOKS


def test_a_clear_effect_is_shown_by_nine_documents() -> None:
    """A hundred times the noise in each."""
    assert is_shown(CLEAR, CLEAR / 100, confidence=0.99, seed=0)


@pytest.mark.parametrize(
    ("effect", "noise"),
    [
        pytest.param(CLEAR, CLEAR, id="no effect"),
        pytest.param(CLEAR[:8], CLEAR[:8] / 100, id="too few documents"),
        pytest.param(torch.cat((CLEAR[:8], CLEAR[:1] / 1e3)), CLEAR / 100, id="one document without effect"),
        pytest.param(CLEAR, CLEAR * torch.tensor([0.9] * 9), id="bounds that overlap"),
    ],
)
def test_what_is_not_shown_goes_on_reading(effect: torch.Tensor, noise: torch.Tensor) -> None:
    """Neither the count of documents nor the bounds alone suffice."""
    assert not is_shown(effect, noise, confidence=0.99, seed=0)


def test_a_clear_adapter_needs_the_first_round_only(good: Callable[[str], Any]) -> None:
    """The merged model reads the same documents in the same pass, and answers as the oracle does to the bit."""
    result = good("lm-bf16").judge(outputs=True, isolated=False, greedy_tokens=2)
    assert result.verdict is Verdict.PASS, result.reasons
    outputs = result.evidence["outputs"]
    assert outputs["documents"] == outputs["documents_merged"] == 9
    exact = set(result.evidence["weights"]["agreement"]) == {"exact"}
    assert outputs["identical_to_oracle"] == exact
    assert result.evidence["probes"]["documents"] > 9


def test_a_number_of_tokens_asked_for_is_read_to_the_end(good: Callable[[str], Any]) -> None:
    """`--probe-tokens` is the cost, whatever the first documents show; M still needs the first ones only."""
    result = good("lm-bf16").judge(outputs=True, isolated=False, probe_tokens=512, greedy_tokens=0)
    outputs = result.evidence["outputs"]
    assert outputs["documents"] == result.evidence["probes"]["documents"]
    assert outputs["documents_merged"] == 9


def test_weights_that_leave_something_open_have_all_documents_read(good: Callable[[str], Any]) -> None:
    """In fp32 arithmetic is all the noise there is: O+ runs, and M reads what the others do."""
    result = good("lm-fp32").judge(outputs=True, isolated=False, greedy_tokens=0)
    assert result.verdict is Verdict.PASS, result.reasons
    outputs = result.evidence["outputs"]
    assert outputs["documents"] == outputs["documents_merged"] == result.evidence["probes"]["documents"]
