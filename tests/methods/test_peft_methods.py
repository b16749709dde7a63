"""Every method that PEFT can merge: a really saved adapter, streamed, equals PEFT's own merge bit for bit."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import gaps

from merge_adapter.errors import MethodError
from merge_adapter.methods.change import Kind
from merge_adapter.methods.table import METHODS, Way, find_method
from merge_adapter.plan import make_plan
from merge_adapter.types import MergeSettings, Strategy

LINEAR = ["q_proj", "v_proj", "down_proj", "up_proj"]
FUSED = ["c_attn", "c_proj"]
"""GPT-2's Conv1D layers, stored transposed."""

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "adalora": ("ADALORA", {"init_r": 6, "target_r": 4, "total_step": 10, "target_modules": LINEAR}),
    "adamss": ("ADAMSS", {"r": 8, "num_subspaces": 2, "subspace_rank": 1, "target_modules": LINEAR}),
    "beft": ("BEFT", {"target_modules": ["q_proj", "v_proj"]}),
    "boft": ("BOFT", {"boft_block_size": 4, "boft_n_butterfly_factor": 1, "target_modules": LINEAR}),
    "c3a": ("C3A", {"block_size": 8, "target_modules": LINEAR}),
    "deft": ("DEFT", {"r": 4, "target_modules": LINEAR}),
    "deft, qr": ("DEFT", {"r": 4, "target_modules": LINEAR, "decomposition_method": "qr"}),
    "delora": ("DELORA", {"r": 4, "target_modules": LINEAR}),
    "fourierft": ("FOURIERFT", {"n_frequency": 20, "target_modules": LINEAR}),
    "frod": ("FROD", {"target_modules": LINEAR, "progressbar": False}),
    "frod without factors": ("FROD", {"target_modules": LINEAR, "save_projection": False, "progressbar": False}),
    "glora": ("GLORA", {"r": 4, "target_modules": LINEAR}),
    "gralora": ("GRALORA", {"r": 4, "gralora_k": 2, "target_modules": LINEAR}),
    "gralora, hybrid": ("GRALORA", {"r": 4, "gralora_k": 2, "hybrid_r": 2, "target_modules": LINEAR}),
    "hira": ("HIRA", {"r": 4, "target_modules": LINEAR}),
    "hra": ("HRA", {"r": 4, "target_modules": LINEAR}),
    "hra, Gram-Schmidt": ("HRA", {"r": 4, "target_modules": LINEAR, "apply_GS": True}),
    "ia3": ("IA3", {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    "ln tuning": ("LN_TUNING", {"target_modules": ["input_layernorm", "post_attention_layernorm"]}),
    "loha": ("LOHA", {"r": 4, "alpha": 8, "target_modules": LINEAR}),
    "lokr": ("LOKR", {"r": 4, "alpha": 8, "target_modules": LINEAR}),
    "lokr, both decomposed": ("LOKR", {"r": 4, "alpha": 8, "decompose_both": True, "target_modules": LINEAR}),
    "miss": ("MISS", {"r": 4, "target_modules": LINEAR}),
    "miss, bat": ("MISS", {"r": 4, "target_modules": LINEAR, "init_weights": "bat"}),
    "miss, mini": ("MISS", {"r": 4, "mini_r": 4, "target_modules": LINEAR, "init_weights": "mini"}),
    "oft": ("OFT", {"r": 0, "oft_block_size": 4, "use_cayley_neumann": False, "target_modules": LINEAR}),
    "oft, Cayley-Neumann": ("OFT", {"r": 0, "oft_block_size": 4, "use_cayley_neumann": True, "target_modules": LINEAR}),
    "osf": ("OSF", {"effective_rank": 8, "target_modules": LINEAR}),
    "peanut": ("PEANUT", {"r": 4, "depth": 2, "target_modules": LINEAR}),
    "psoft": ("PSOFT", {"r": 4, "target_modules": LINEAR}),
    "pvera": ("PVERA", {"r": 4, "target_modules": LINEAR}),
    "pvera from seed": ("PVERA", {"r": 4, "target_modules": LINEAR, "save_projection": False}),
    "randlora": ("RANDLORA", {"r": 4, "target_modules": LINEAR}),
    "randlora from seed": ("RANDLORA", {"r": 4, "target_modules": LINEAR, "save_projection": False}),
    "road": ("ROAD", {"group_size": 8, "target_modules": LINEAR}),
    "road, variant 4": ("ROAD", {"variant": "road_4", "group_size": 8, "target_modules": LINEAR}),
    "shira": ("SHIRA", {"r": 4, "random_seed": 3, "target_modules": LINEAR}),
    "supertuning": ("SUPERTUNING", {"sparsity": 0.2, "r": 4, "lora_alpha": 8, "target_modules": LINEAR}),
    "supertuning without indices": (
        "SUPERTUNING", {"sparsity": 0.2, "save_precomputed_indices": False, "target_modules": LINEAR},
    ),
    "tinylora": ("TINYLORA", {"r": 2, "u": 8, "target_modules": LINEAR}),
    "tinylora from seed": ("TINYLORA", {"r": 2, "u": 8, "target_modules": LINEAR, "save_projection": False}),
    "trainable tokens": ("TRAINABLE_TOKENS", {"token_indices": [3, 5], "target_modules": ["embed_tokens"]}),
    "unilora": ("UNILORA", {"r": 4, "theta_d_length": 64, "target_modules": LINEAR}),
    "unilora from seed": ("UNILORA", {"r": 4, "theta_d_length": 64, "target_modules": LINEAR, "save_indices": False}),
    "vblora": ("VBLORA", {"r": 2, "num_vectors": 8, "vector_length": 4, "target_modules": LINEAR}),
    "vblora, top-k": (
        "VBLORA",
        {"r": 2, "num_vectors": 8, "vector_length": 4, "save_only_topk_weights": True, "target_modules": LINEAR},
    ),
    "vera": ("VERA", {"r": 4, "target_modules": LINEAR}),
    "vera from seed": ("VERA", {"r": 4, "target_modules": LINEAR, "save_projection": False}),
    "waveft": ("WAVEFT", {"n_frequency": 20, "target_modules": LINEAR}),
}  # fmt: skip

TRANSPOSED = [
    "adalora", "deft", "fourierft", "frod", "gralora", "hira", "ia3", "pvera", "randlora", "tinylora", "unilora",
    "vblora", "vera", "waveft",
]  # fmt: skip
"""Methods that PEFT lets target Conv1D."""

ROUNDED = ["adalora", "boft", "ia3", "loha", "oft", "psoft", "road", "trainable tokens", "vera", "ln tuning"]
"""A choice over additive, multiplicative and replacing methods for a bf16 base."""


def test_every_mergeable_method_has_a_case() -> None:
    covered = {peft_type for peft_type, _ in CASES.values()}
    assert covered == {method.peft_type for method in METHODS if method.kind} - {"LORA"}


@pytest.mark.parametrize("label", CASES)
def test_streaming_equals_peft(label: str, bench: Callable[..., Any], tmp_path: Path) -> None:
    """PEFT's merge in float32, as near as processors are to each other; only planned tensors changed, all were used."""
    peft_type, config = CASES[label]
    made = bench(peft_type, **config)
    plan = made.plan()
    entry = find_method(peft_type)
    assert entry is not None
    assert (plan.strategy is Strategy.MEMORY) == (entry.way is Way.MEMORY)
    assert plan.consumed == plan.adapter_tensors
    merged, expected, stored = made.merge(tmp_path / "out"), made.expected(), made.stored()
    assert list(merged) == list(stored)
    assert gaps(merged, expected) == {}
    changed = {name for name in merged if not torch.equal(merged[name], stored[name])}
    assert changed
    assert changed <= {name for change in plan.changes for name in change.tensors}


@pytest.mark.parametrize("label", ROUNDED)
def test_a_bf16_base_is_rounded_once(label: str, bench: Callable[..., Any], tmp_path: Path) -> None:
    """The bf16 output is PEFT's float32 merge, rounded once."""
    peft_type, config = CASES[label]
    made = bench(peft_type, dtype=torch.bfloat16, **config)
    merged, expected = made.merge(tmp_path / "out"), made.expected()
    assert {value.dtype for value in merged.values()} == {torch.bfloat16}
    assert gaps(merged, expected) == {}


@pytest.mark.parametrize("label", TRANSPOSED)
def test_transposed_layers(label: str, bench: Callable[..., Any], tmp_path: Path) -> None:
    """GPT-2's Conv1D, square ones included, where a missed transposition has the right shape."""
    peft_type, config = CASES[label]
    config = {**config, "target_modules": FUSED}
    if peft_type == "IA3":
        config["feedforward_modules"] = ["c_proj"]
    made = bench(peft_type, model_type="gpt2", **config)
    merged, expected, stored = made.merge(tmp_path / "out"), made.expected(), made.stored()
    assert gaps(merged, expected) == {}
    assert sum(not torch.equal(merged[name], stored[name]) for name in merged) >= 6


@pytest.mark.parametrize("label", ["ia3", "loha", "vera", "psoft", "ln tuning"])
def test_in_memory_equals_streamed(label: str, bench: Callable[..., Any], tmp_path: Path) -> None:
    """`--strategy memory` is said to be what ran, and gives the same weights."""
    peft_type, config = CASES[label]
    made = bench(peft_type, **config)
    assert made.plan(Strategy.MEMORY).strategy is Strategy.MEMORY
    streamed, loaded = made.merge(tmp_path / "stream"), made.merge(tmp_path / "memory", Strategy.MEMORY)
    assert gaps(loaded, streamed) == {}


def test_lora_in_memory_equals_peft(bench: Callable[..., Any], tmp_path: Path) -> None:
    made = bench("LORA", r=4, target_modules=LINEAR)
    merged, expected = made.merge(tmp_path / "out", Strategy.MEMORY), made.expected()
    assert gaps(merged, expected) == {}


def test_streaming_on_demand_is_refused_where_it_cannot_be(bench: Callable[..., Any]) -> None:
    made = bench("FROD", **CASES["frod"][1])
    assert "all layers together" in made.plan().strategy_reason
    with pytest.raises(MethodError, match="cannot be streamed") as caught:
        made.plan(Strategy.STREAM)
    assert "--strategy" in caught.value.hint


def weighted(made: Any, weight: float) -> Any:
    return replace(made.sources, adapters=(replace(made.sources.adapter, weight=weight),))


SCALED = [label for label, (peft_type, _) in CASES.items() if (find_method(peft_type) or METHODS[0]).scaled]


@pytest.mark.parametrize("label", SCALED)
def test_a_weight_is_a_part_of_the_update(label: str, bench: Callable[..., Any], tmp_path: Path) -> None:
    """Where PEFT's layer holds a scale, a weight multiplies it: W + w (PEFT's merge - W)."""
    from safetensors.torch import load_file

    from merge_adapter.merge import merge
    from merge_adapter.types import Silent

    peft_type, config = CASES[label]
    made = bench(peft_type, **config)
    part = weighted(made, -0.4)
    (tmp_path / "out").mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plan = make_plan(part, MergeSettings())
        merge(plan, part, tmp_path / "out", settings=MergeSettings(), progress=Silent())
    found, before, whole = load_file(tmp_path / "out" / "model.safetensors"), made.stored(), made.expected()
    changed = 0
    for name, value in before.items():
        expected = value - 0.4 * (whole[name] - value)
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-5)
        changed += not torch.equal(found[name], value)
    assert changed >= 2


@pytest.mark.parametrize("label", ["loha", "shira"])
def test_the_gate_knows_a_weight(label: str, bench: Callable[..., Any], tmp_path: Path) -> None:
    import shutil

    from merge_adapter.merge import merge
    from merge_adapter.types import Silent, Verdict
    from merge_adapter.verify import verify
    from merge_adapter.verify.settings import VerifySettings

    peft_type, config = CASES[label]
    made = bench(peft_type, **config)
    part = weighted(made, 0.5)
    (tmp_path / "out").mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plan = make_plan(part, MergeSettings())
        merge(plan, part, tmp_path / "out", settings=MergeSettings(), progress=Silent())
        shutil.copy(made.base / "config.json", tmp_path / "out")
        settings = VerifySettings(isolated=False, probe_tokens=64, greedy_tokens=0)
        right = verify(tmp_path / "out", part, settings=settings, progress=Silent())
        wrong = verify(tmp_path / "out", made.sources, settings=settings, progress=Silent())
    assert right.verdict is Verdict.PASS, right.reasons
    assert wrong.verdict is Verdict.FAIL


@pytest.mark.parametrize("label", ["ia3", "vera", "oft"])
def test_a_weight_without_meaning_is_refused(label: str, bench: Callable[..., Any]) -> None:
    peft_type, config = CASES[label]
    made = bench(peft_type, **config)
    with pytest.raises(MethodError, match=r"weight 0\.5"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        make_plan(weighted(made, 0.5), MergeSettings())


def test_a_plan_runs_twice_alike(bench: Callable[..., Any], tmp_path: Path) -> None:
    """The layers return to what they were, so one plan can be run again."""
    from merge_adapter.merge import merge
    from merge_adapter.types import Silent

    made = bench("IA3", **CASES["ia3"][1])
    plan, files = made.plan(), []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        merge(plan, made.sources, tmp_path / name, settings=MergeSettings(), progress=Silent())
        files.append((tmp_path / name / "model.safetensors").read_bytes())
    assert files[0] == files[1]


@pytest.mark.parametrize("label", [label for label in CASES if label not in ("frod without factors",)])
def test_the_kind_is_true(label: str, bench: Callable[..., Any]) -> None:
    """Additive methods add the same to another base, multiplicative ones do not."""
    from peft import PeftModel

    peft_type, config = CASES[label]
    made = bench(peft_type, **config)
    kind = made.plan().changes[0].kind
    if kind is Kind.REPLACE:
        return
    deltas = []
    for shift in (0.0, 0.3):
        base = made.load_base()
        generator = torch.Generator().manual_seed(9)
        with torch.no_grad():
            for parameter in base.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * shift)
        before = {name: value.clone() for name, value in base.state_dict().items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's advice to people who train
            after = PeftModel.from_pretrained(base, made.adapter).eval().merge_and_unload().state_dict()
        deltas.append({name: after[name] - before[name] for name in before})
    gap = max(float((deltas[0][name] - deltas[1][name]).abs().max()) for name in deltas[0])
    assert (gap < 1e-5) == (kind is Kind.ADDITIVE), gap
