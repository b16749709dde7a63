"""Adapters and bases other than a LoRA on a plain decoder: what passes through, and what is refused by name."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from passing_world import WEIGHTS, World

from localhub.faults import FaultProxy
from merge_adapter.errors import BaseModelError, InputError
from merge_adapter.pipeline import MergeRequest, RunOutcome, run
from merge_adapter.publish import PublishSettings
from merge_adapter.resolve import SourceRequest
from merge_adapter.types import MergeSettings, Silent, Strategy, Verdict
from merge_adapter.verify.settings import VerifySettings


def passed(
    world: World,
    adapter: str,
    *,
    gate: VerifySettings | None = WEIGHTS,
    settings: MergeSettings | None = None,
    url: str | None = None,
    shards: float = 4,
) -> RunOutcome:
    return run(
        MergeRequest(SourceRequest((adapter,)), settings or MergeSettings(), gate=gate),
        PublishSettings(),
        hub=world.hub(url),
        progress=Silent(),
        disk_budget=world.budget(adapter, shards=shards),
    )


def save_adapter(base: Path, config: Any, place: Path, **changes: Any) -> Path:
    """An adapter of `base` with random weights, as PEFT saves it."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of PEFT, that a tied head comes out untied
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, mean=1.0 if "magnitude" in name else 0.0, std=0.2)
    model.save_pretrained(place, save_embedding_layers=False)
    (place / "README.md").unlink()  # it names the folder of the base, which the Hub refuses
    path = place / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return place


def weights_of(outcome: RunOutcome) -> dict[str, Any]:
    return dict(outcome.report["verification"]["weights"])


def test_what_pefts_own_layer_computes_is_judged_and_left_a_draft(
    world: World, base: str, sharded_base: Path, tmp_path: Path
) -> None:
    """LoHa: its outputs would need the oracle's tensors whole, and the reason says so."""
    from peft import LoHaConfig

    config = LoHaConfig(r=4, alpha=4, target_modules=["q_proj", "v_proj", "down_proj"])
    adapter = world.adapter(base, save_adapter(sharded_base, config, tmp_path / "loha"))
    outcome = passed(world, adapter, gate=VerifySettings(probe_tokens=64))
    assert weights_of(outcome)["verdict"] == "pass"
    assert outcome.verdict is Verdict.INCONCLUSIVE
    assert "the outputs were not compared" in outcome.reasons[0]
    assert "PEFT's own layer" in outcome.reasons[0]
    assert outcome.publication is not None
    assert outcome.publication.draft


def test_dora_passes_through_with_its_outputs(
    world: World, base: str, sharded_base: Path, tmp_path: Path
) -> None:
    from peft import LoraConfig

    config = LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=["q_proj", "o_proj"])
    adapter = world.adapter(base, save_adapter(sharded_base, config, tmp_path / "dora"))
    outcome = passed(world, adapter, gate=VerifySettings(probe_tokens=64))
    assert outcome.verdict is Verdict.PASS, outcome.reasons


def test_a_tied_head_that_comes_out_untied_brings_the_embedding_along(
    world: World, base: str, sharded_base: Path, tmp_path: Path
) -> None:
    """The head is a new tensor that starts from the embedding, which another shard holds."""
    from peft import LoraConfig

    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "lm_head"])
    adapter = world.adapter(base, save_adapter(sharded_base, config, tmp_path / "head"))
    outcome = passed(world, adapter)
    assert weights_of(outcome)["verdict"] == "pass", outcome.reasons
    assert outcome.publication is not None


def _mixtral(place: Path) -> Path:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(place, max_shard_size="200KB")
    return place


def test_a_base_whose_tensors_are_made_anew_is_refused_by_name_before_a_download(
    world: World, tmp_path: Path
) -> None:
    """Fused experts: what is in memory lies in no shard."""
    from peft import LoraConfig

    folder = _mixtral(tmp_path / "mixtral")
    base = world.push(folder, "experts")
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    adapter = world.adapter(base, save_adapter(folder, config, tmp_path / "lora"))
    with FaultProxy(world.url) as proxy:
        with pytest.raises(BaseModelError, match=r"experts.*makes this tensor anew") as refused:
            passed(world, adapter, url=proxy.url, shards=3)
        assert proxy.down.bytes < sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 2
    assert "Leave the disk budget out" in refused.value.hint
    outcome = passed(world, adapter, gate=None, shards=3)  # the merge itself can pass through
    assert outcome.publication is not None
    assert outcome.publication.draft


def test_what_is_merged_on_the_loaded_model_is_refused(world: World, base: str) -> None:
    adapter = world.adapter(base)
    with pytest.raises(InputError, match="merged on the loaded model"):
        passed(world, adapter, settings=MergeSettings(strategy=Strategy.MEMORY))
