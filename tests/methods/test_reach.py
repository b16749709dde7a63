"""Modules that adapter_config.json targets are those that the file holds factors of, or the merge is refused.

PEFT's own rule says which modules a config targets; paths alone must give the same answer, without PEFT.
"""

from __future__ import annotations

import itertools
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from merge_adapter.errors import AccountingError, MalformedError, UnmergeableError
from merge_adapter.methods.config import check_config
from merge_adapter.methods.reach import reaches
from merge_adapter.plan import make_plan
from merge_adapter.types import Combination, CombinationType, MergeSettings, Resolved, Strategy

PATHS = (
    "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.11.mlp.experts.3.down_proj",
    "layers.0.self_attn.q_proj", "h.2.attn.c_attn", "q_proj", "lm_head", "model.norm", "classifier.dense", "score",
    "encoder.block.1.layer.0.SelfAttention.q", "model.visual.blocks.0.attn.qkv", "model.embed_tokens", "xq_proj",
)  # fmt: skip
TARGETS: tuple[Any, ...] = (
    ["q_proj"], ["self_attn.q_proj", "down_proj"], ["q_proj", "dense", "lm_head", "score"], [], "q_proj",
    r".*\.(q_proj|down_proj)", r"^(?!.*visual).*(?:q_proj|qkv|c_attn).*", ["q", "qkv", "c_attn", "embed_tokens"],
    ["model.norm"],
)  # fmt: skip
EXCLUDED: tuple[Any, ...] = (
    None,
    [],
    "",
    ["layers.0.self_attn.q_proj"],
    ["q_proj"],
    r".*layers\.1\..*",
    "lm_head",
)
SAVED: tuple[Any, ...] = (None, ["score"], ["classifier", "norm"], ["self_attn"], ["lm.*"])
LAYERS: tuple[Any, ...] = (
    {}, {"layers_to_transform": []}, {"layers_to_transform": 1}, {"layers_to_transform": [0, 3]},
    {"layers_to_transform": [1, 11], "layers_pattern": "layers"}, {"layers_to_transform": [2], "layers_pattern": []},
    {"layers_to_transform": [0, 2], "layers_pattern": ["h", "layers"]},
    {"layers_to_transform": 1, "layers_pattern": "block"}, {"layers_to_transform": [3], "layers_pattern": ""},
)  # fmt: skip


def test_paths_are_taken_in_as_peft_takes_them_in() -> None:
    from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists

    counts = {True: 0, False: 0}
    for targets, excluded, saved, layers in itertools.product(TARGETS, EXCLUDED, SAVED, LAYERS):
        if isinstance(targets, str) and layers:  # PEFT refuses to have both
            continue
        config = {"target_modules": targets, "exclude_modules": excluded, "modules_to_save": saved, **layers}
        theirs = SimpleNamespace(**config)
        for path in PATHS:
            found = check_target_module_exists(theirs, path)
            expected = bool(found) and not isinstance(found, _ExcludedModule)
            assert reaches(config, path) is expected, (config, path)
            counts[expected] += 1
    assert min(counts.values()) > 1000


LLAMA: dict[str, Any] = {"r": 2, "target_modules": ["q_proj", "down_proj"]}
UNREACHED: dict[str, tuple[dict[str, Any], str]] = {
    "a target removed": ({"target_modules": ["q_proj"]}, "down_proj"),
    "a pattern of less": ({"target_modules": r".*\.q_proj"}, "down_proj"),
    "no target": ({"target_modules": []}, "q_proj"),
    "the default targets": ({"target_modules": None}, "down_proj"),
    "less layers": ({"layers_to_transform": [0]}, r"layers\.1"),
    "layers by another name": ({"layers_to_transform": [0, 1], "layers_pattern": "blocks"}, "layers"),
    "excluded": ({"exclude_modules": ["layers.1.mlp.down_proj"]}, r"layers\.1\.mlp\.down_proj"),
    "trained whole": ({"modules_to_save": ["mlp"]}, "down_proj"),
}


@pytest.mark.parametrize("strategy", [Strategy.AUTO, Strategy.MEMORY])
@pytest.mark.parametrize(("edit", "said"), UNREACHED.values(), ids=UNREACHED)
def test_factors_that_peft_would_not_load_are_named(
    edit: dict[str, Any], said: str, strategy: Strategy, bench: Callable[..., Any]
) -> None:
    made = bench("LORA", **LLAMA)
    made.plan(strategy)
    _edit(made, edit)
    if strategy is Strategy.MEMORY:  # PEFT puts the layers on, or says that there are none
        with pytest.raises(UnmergeableError):
            made.plan(strategy)
        return
    with pytest.raises(AccountingError, match=said) as caught:
        made.plan(strategy)
    assert caught.value.hint
    assert caught.value.tensors


def test_each_of_several_adapters_is_asked(bench: Callable[..., Any], tmp_path: Path) -> None:
    """The targets of one must not stand in for those of another."""
    whole = bench("LORA", **LLAMA)
    cut = replace(whole, adapter=shutil.copytree(whole.adapter, tmp_path / "cut"))
    _edit(cut, {"target_modules": ["q_proj"]})
    adapters = (*whole.sources.adapters, *cut.sources.adapters)
    sources = Resolved(adapters, whole.sources.base, None)
    for kind in (CombinationType.SEQUENTIAL, CombinationType.CAT):
        with pytest.raises(AccountingError, match="down_proj"):
            make_plan(replace(sources, combination=Combination(kind)), MergeSettings())


LOST: dict[str, tuple[str, dict[str, Any], str]] = {
    "one of two layers": ("llama", LLAMA, r"layers\.1\.mlp"),
    "all of one target": ("llama", LLAMA, r"q_proj"),
    "an embedding": ("llama", {"r": 2, "target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens"),
    "of transposed layers": ("gpt2", {"r": 2, "target_modules": ["c_attn", "c_fc"]}, r"h\.0\.mlp\.c_fc"),
    "one of two parameters": (
        "qwen3_moe", {"r": 2, "target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
        r"layers\.1\.mlp\.experts\.base_layer",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("family", "config", "lost"), LOST.values(), ids=LOST)
def test_targets_without_factors_are_named(
    family: str, config: dict[str, Any], lost: str, bench: Callable[..., Any]
) -> None:
    made = bench("LORA", model_type=family, **config)
    made.plan()
    file = made.adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    kept = {name: tensor for name, tensor in tensors.items() if not re.search(lost, name)}
    assert 0 < len(kept) < len(tensors)
    save_file(kept, file, metadata={"format": "pt"})
    with pytest.raises(AccountingError, match=r"target_(modules|parameters)") as caught:
        made.plan()
    assert re.search(lost.removesuffix(r"\.base_layer"), caught.value.message)


def test_a_module_of_the_checkpoint_that_the_model_lacks_is_nobodys_target(
    bench: Callable[..., Any], tmp_path: Path
) -> None:
    """As of layers for predicting several tokens at once, which transformers leaves in the file."""
    made = bench("LORA", **LLAMA)
    made = replace(made, base=shutil.copytree(made.base, tmp_path / "base"))
    before = made.plan()
    [file] = made.base.glob("*.safetensors")
    extra = {"model.layers.2.self_attn.q_proj.weight": torch.ones(16, 16)}
    save_file({**load_file(file), **extra}, file, metadata={"format": "pt"})
    assert made.plan().consumed == before.consumed


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        ({"modules_to_save": ["(head"]}, "modules_to_save"),
        ({"layers_to_transform": [0], "layers_pattern": "(("}, "layers_pattern"),
        ({"layers_to_transform": [0], "layers_pattern": 3}, "layers_pattern"),
    ],
)
def test_patterns_that_are_none_are_malformed(
    edit: dict[str, Any], said: str, bench: Callable[..., Any]
) -> None:
    made = bench("LORA", **LLAMA)
    _edit(made, edit)
    with pytest.raises(MalformedError, match=said) as caught:
        check_config(made.sources.adapter)
    assert caught.value.hint


def _edit(made: Any, changes: dict[str, Any]) -> None:
    file = made.adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
