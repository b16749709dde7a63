"""An adapter judged with a base that it was not trained on: each thing that gives it away, through the whole gate.

The merges are right, as far as adding goes: what is wrong is what they were made from.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from merge_adapter.errors import MethodError
from merge_adapter.types import Origin, Verdict

OUTPUTS: dict[str, Any] = {"outputs": True, "isolated": False, "probe_tokens": 128, "greedy_tokens": 0}


class Pinned:
    """A local base under the name and commit that it has on a Hub."""

    def __init__(self, repository: Any, revision: str) -> None:
        self._repository = repository
        self.origin = Origin(repo_id="demo/pydoc-llama", revision=revision)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._repository, name)


def adapter_with(good: Any, tmp_path: Path, **changes: Any) -> Path:
    """A copy of the trained adapter whose config says something else."""
    folder = Path(shutil.copytree(good.sources.adapter.repository.origin.folder, tmp_path / "adapter"))
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def test_shapes_of_another_base_are_refused_with_advice(
    good: Callable[[str], Any], sources_of: Any, silence: Any, tmp_path: Path
) -> None:
    """An adapter of a wider model: no verdict can be had, and the message says what to look at."""
    import peft
    import transformers

    right = good("lm-bf16")
    base = right.sources.base.repository.origin.folder
    config = transformers.AutoConfig.from_pretrained(base)
    config.hidden_size, config.head_dim = (
        2 * config.hidden_size,
        config.hidden_size // config.num_attention_heads,
    )
    with silence():
        wide = peft.get_peft_model(
            transformers.AutoModelForCausalLM.from_config(config),
            peft.LoraConfig(r=2, target_modules=["q_proj"]),
        )
        wide.save_pretrained(tmp_path / "adapter")
    with pytest.raises(MethodError, match="cannot put this adapter on its base") as caught:
        right.with_sources(right.merged, adapter=tmp_path / "adapter").judge()
    assert "another base" in caught.value.hint


@pytest.mark.parametrize("recorded", ["b" * 40, "a" * 40, "main", None])
def test_a_recorded_revision_is_held_against_the_bases(
    recorded: str | None, good: Callable[[str], Any], tmp_path: Path
) -> None:
    """Another commit than the adapter's config records is told; a branch's name says nothing."""
    right = good("lm-bf16")
    adapter = adapter_with(right, tmp_path, revision=recorded, base_model_name_or_path="demo/pydoc-llama")
    right = right.with_sources(right.merged, adapter=adapter)
    base = replace(right.sources.base, repository=Pinned(right.sources.base.repository, "a" * 40))
    result = replace(right, sources=replace(right.sources, base=base)).judge()
    told = [reason for reason in result.reasons if "trained on revision" in reason]
    assert told == (
        [
            "warning: base model: the adapter was trained on revision bbbbbbbbbbbb, it was judged on aaaaaaaaaaaa"
        ]
        if recorded == "b" * 40
        else []
    )


def test_a_vocabulary_that_reads_nothing_alike_is_told(good: Callable[[str], Any], tmp_path: Path) -> None:
    """The adapter brings a tokenizer of the same size that gives every token another id."""
    right = good("lm-bf16")
    adapter = adapter_with(right, tmp_path)
    document = json.loads((adapter / "tokenizer.json").read_text())
    special = {token["content"] for token in document["added_tokens"]}
    words = sorted(set(document["model"]["vocab"]) - special, key=document["model"]["vocab"].__getitem__)
    ids = [document["model"]["vocab"][word] for word in words]
    document["model"]["vocab"] |= dict(zip(words, (*ids[1:], ids[0]), strict=True))
    (adapter / "tokenizer.json").write_text(json.dumps(document))
    merged = Path(shutil.copytree(right.merged, tmp_path / "merged"))
    shutil.copy(adapter / "tokenizer.json", merged)
    result = right.with_sources(merged, adapter=adapter).judge()
    assert any("encodes every probe differently from the base's" in reason for reason in result.reasons)
    untouched = good("lm-bf16").judge()
    assert not any("encodes every probe" in reason for reason in untouched.reasons)


def test_an_update_that_drowns_the_base_is_told(random_merge: Callable[..., Any]) -> None:
    """A scale that belongs to other weights: updates larger than what they change, text worse than chance."""
    drowned = {"lora_alpha": 4000, "target_modules": ["q_proj", "down_proj", "lm_head"], "untied": True}
    right = random_merge(drowned, "fp32")
    result = right.judge(**OUTPUTS)
    assert result.verdict is Verdict.PASS, "it is base + adapter, whatever that is worth"
    assert any("larger than the weights they change" in reason for reason in result.reasons), result.reasons
    assert any("worse than chance" in reason for reason in result.reasons), result.reasons


def test_the_right_base_raises_none_of_it(good: Callable[[str], Any]) -> None:
    result = good("lm-bf16").judge(**OUTPUTS)
    assert result.verdict is Verdict.PASS
    assert not [reason for reason in result.reasons if "base" in reason and reason.startswith("warning")]
