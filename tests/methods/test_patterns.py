"""Patterns of strangers: what is quick is matched, what hangs Python's `re` is refused before it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from merge_adapter.errors import MalformedError
from merge_adapter.methods import patterns
from merge_adapter.methods.patterns import check_lengths, check_patterns, is_cheap, patterns_of
from merge_adapter.verify.models.adapters import read_adapter
from merge_adapter.verify.models.loading import adapt

PATHS = [f"model.layers.{number}.self_attn.q_proj" for number in range(32)]
UNSLOTH = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
    r"(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj).*?)|"
    r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp)\.(?:(?:q_proj|k_proj|v_proj|o_proj)))"
)
HOSTILE = r"(([a-z0-9_.]+)*)*!"


@pytest.mark.parametrize(
    ("pattern", "cheap"),
    [
        ("q_proj", True), (r".*\.(q|v)_proj", True), (r"model\.layers\.\d+\.(?!mlp).*_proj", True), ("a?(b|c)?", True),
        (r"[*+{(]+\)*", True), (UNSLOTH, False), (HOSTILE, False), (r"(a|a)*b", False), (r"(x+){2,}", False),
        (".*.*.*x", False), ("(q|k|v|o|gate|up|down)_proj", True), (".?" * 40 + "!", False),
        ("(?:.|..)" * 40 + "!", False), (f"(?#[){HOSTILE}(?#])", False), (f"(?x)#[\n{HOSTILE}#]", False),
    ],
)  # fmt: skip
def test_what_may_be_costly_is_told_apart(pattern: str, *, cheap: bool) -> None:
    assert is_cheap(pattern) is cheap


def test_costly_patterns_that_end_in_time_are_accepted() -> None:
    check_patterns({"target_modules": UNSLOTH, "rank_pattern": {r"(layers\.\d+\.)*self_attn": 4}}, PATHS)
    check_patterns({"target_modules": r"(?i)(.*)(layers)(.*)(.*)"}, PATHS)


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": HOSTILE}, {"exclude_modules": HOSTILE}, {"rank_pattern": {"q_proj": 4, HOSTILE: 8}},
        {"layers_pattern": ["layers", HOSTILE]}, {"modules_to_save": [HOSTILE]}, {"feedforward_modules": HOSTILE},
        {"target_modules": ".*" * 14 + "!"}, {"target_modules": ".?" * 60 + "!"},
    ],
    ids=["target", "exclude", "rank", "layers", "saved", "feedforward", "polynomial", "choices"],
)  # fmt: skip
def test_a_pattern_that_hangs_is_refused(config: dict[str, Any]) -> None:
    (key,) = config
    with pytest.raises(MalformedError, match=key) as caught:
        check_patterns(config, PATHS, limit=1)
    assert "list" in caught.value.hint


def test_other_values_are_no_patterns() -> None:
    assert not list(
        patterns_of({"task_type": HOSTILE, "r": 8, "target_modules": None, "layers_to_transform": [1]})
    )


def test_a_pattern_without_end_is_not_compiled() -> None:
    with pytest.raises(MalformedError, match="characters"):
        check_lengths({"target_modules": "(a|b)" * 20_000})


@pytest.mark.parametrize("peft_type", ["LORA", "LOHA"])
def test_a_hostile_adapter_hangs_neither_plan_nor_gate(
    peft_type: str, bench: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Really saved, then given a pattern that would match for longer than anyone lives."""
    limited = patterns.check_patterns.__kwdefaults__
    assert limited is not None
    monkeypatch.setitem(limited, "limit", 1)
    made = bench(peft_type, r=4, target_modules=["q_proj"])
    path = made.adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target_modules": HOSTILE}))
    with pytest.raises(MalformedError, match="processor time"):
        made.plan()
    with pytest.raises(MalformedError, match="processor time"):
        adapt(made.load_base(), made.sources, (read_adapter(made.sources.adapter),))
