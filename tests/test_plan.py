"""The plan: every adapter tensor accounted for, sizes foretold, nothing heavy imported, nothing but headers read."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from merge_adapter.accounting import account
from merge_adapter.checkpoint.folder import Folder
from merge_adapter.errors import (
    AccountingError,
    BaseModelError,
    MalformedError,
    MethodError,
    NotFoundError,
    ShapeError,
)
from merge_adapter.merge import merge
from merge_adapter.methods.change import Kind, ModuleChange, Replacement, TensorSpec
from merge_adapter.plan import make_plan
from merge_adapter.types import Adapter, BaseModel, FileOrigin, MergeSettings, Resolved, Silent, Strategy

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8, "intermediate_size": 16,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 30,
    "tie_word_embeddings": False,
}  # fmt: skip
ADAPTER: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
Q = "model.layers.0.self_attn.q_proj"
V = "model.layers.0.self_attn.v_proj"


def base_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "model.embed_tokens.weight": (30, 8), "lm_head.weight": (30, 8), "model.norm.weight": (8,),
        "model.layers.0.input_layernorm.weight": (8,), "model.layers.0.post_attention_layernorm.weight": (8,),
        **{f"model.layers.0.self_attn.{name}_proj.weight": (8, 8) for name in "qkvo"},
        **{f"model.layers.0.mlp.{name}_proj.weight": (16, 8) for name in ("gate", "up")},
        "model.layers.0.mlp.down_proj.weight": (8, 16),
    }  # fmt: skip
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def lora(*modules: str, rank: int = 2, seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for module in modules:
        made[f"base_model.model.{module}.lora_A.weight"] = torch.randn(rank, 8, generator=generator)
        made[f"base_model.model.{module}.lora_B.weight"] = torch.randn(8, rank, generator=generator)
    return made


class Counting(Folder):
    """A folder that knows how much of it was read."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.bytes_read = 0

    def read(self, path: str, *, offset: int = 0, length: int | None = None) -> bytes:
        content = super().read(path, offset=offset, length=length)
        self.bytes_read += len(content)
        return content

    def folder(self, paths: Iterable[str]) -> Path:
        raise AssertionError("the fast path needs no folder")


@pytest.fixture
def place(tmp_path: Path) -> Any:
    """`place(tensors, config)`: sources on disk; `adapters` adds further adapters."""
    (tmp_path / "base").mkdir()
    save_file(base_tensors(), tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})

    def make(
        tensors: Mapping[str, torch.Tensor], *more: Mapping[str, torch.Tensor],
        base: Mapping[str, Any] | None = None, weights: tuple[float, ...] = (), **config: Any,
    ) -> Resolved:  # fmt: skip
        (tmp_path / "base" / "config.json").write_text(json.dumps({**CONFIG, **(base or {})}))
        adapters = []
        for number, content in enumerate((tensors, *more)):
            folder = tmp_path / f"adapter{number}"
            folder.mkdir(exist_ok=True)
            save_file(dict(content), folder / "adapter_model.safetensors")
            weight = weights[number] if weights else 1.0
            targets = sorted({found for name in content for found in re.findall(r"(\w+)\.lora_", name)})
            adapters.append(
                Adapter(Folder(folder), {**ADAPTER, "target_modules": targets, **config}, "LORA", weight)
            )
        return Resolved(
            tuple(adapters), BaseModel(Counting(tmp_path / "base"), {**CONFIG, **(base or {})}), None
        )

    return make


def test_a_plan_says_what_will_change(place: Any) -> None:
    """Names, kinds, sizes; every adapter tensor consumed."""
    plan = make_plan(place(lora(Q, V)), MergeSettings())
    assert plan.strategy is Strategy.STREAM
    assert (plan.method, plan.adapter_tensors, plan.consumed) == ("LORA", 4, 4)
    assert [(change.tensors, change.kind, change.shape) for change in plan.changes] == [
        ((f"{Q}.weight",), Kind.ADDITIVE, (8, 8)),
        ((f"{V}.weight",), Kind.ADDITIVE, (8, 8)),
    ]
    assert plan.bytes_changed == 2 * 8 * 8 * 4
    assert [(shard.path, shard.origin) for shard in plan.outputs] == [
        ("model.safetensors", FileOrigin.MERGED)
    ]
    assert plan.config_changes == {}


def test_a_plan_reads_headers_only(place: Any) -> None:
    """A few hundred bytes for a checkpoint of any size."""
    sources = place(lora(Q))
    plan = make_plan(sources, MergeSettings())
    header = plan.outputs[0].bytes - sum(tensor.nbytes for tensor in base_tensors().values())
    assert 0 < sources.base.repository.bytes_read <= header + 8


def test_a_plain_plan_imports_nothing_heavy(place: Any, tmp_path: Path) -> None:
    """No torch, no transformers, no peft: the command answers at once."""
    place(lora(Q))
    script = f"""
import json, sys
from pathlib import Path
from merge_adapter.checkpoint.folder import Folder
from merge_adapter.plan import make_plan
from merge_adapter.types import Adapter, BaseModel, MergeSettings, Resolved
base, adapter = Folder(Path({str(tmp_path / "base")!r})), Folder(Path({str(tmp_path / "adapter0")!r}))
config = json.loads(base.read("config.json"))
plan = make_plan(Resolved((Adapter(adapter, {ADAPTER!r}, "LORA"),), BaseModel(base, config), None), MergeSettings())
assert plan.consumed == 2
print(sorted(name for name in ("torch", "transformers", "peft", "huggingface_hub") if name in sys.modules))
"""
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


# ---------------------------------------------------------------------------------- what is not accounted for


def test_a_tensor_that_belongs_to_nothing_is_named(place: Any) -> None:
    """Left over: a file with something else in it."""
    strange = {"base_model.model.model.layers.0.self_attn.q_proj.lora_C.weight": torch.ones(2, 2)}
    with pytest.raises(AccountingError, match="lora_C") as caught:
        make_plan(place({**lora(Q), **strange}), MergeSettings())
    assert caught.value.tensors == tuple(strange)


def test_half_a_pair_is_named(place: Any) -> None:
    """A without B changes nothing, and is not dropped in silence."""
    tensors = lora(Q, V)
    del tensors[f"base_model.model.{V}.lora_B.weight"]
    with pytest.raises(AccountingError, match="lora_B missing") as caught:
        make_plan(place(tensors), MergeSettings())
    assert caught.value.tensors == (f"base_model.model.{V}.lora_A.weight",)


def test_an_adapter_that_matches_nothing_names_every_tensor(place: Any) -> None:
    """The classic: a merge that returns the base."""
    tensors = lora("model.decoder.block.0.q", "model.decoder.block.1.q")
    sources = place(tensors)
    sources = Resolved(
        sources.adapters, BaseModel(Folder(sources.base.repository.origin.folder), CONFIG), None
    )
    with pytest.raises(AccountingError) as caught:
        make_plan(sources, MergeSettings())
    assert set(caught.value.tensors) == set(tensors)


def test_two_names_for_one_tensor_are_refused(place: Any) -> None:
    """With and without the adapter's own name: two adapters in one file."""
    twice = {key.replace("lora_A.", "lora_A.default."): value for key, value in lora(Q, seed=2).items()}
    with pytest.raises(AccountingError, match="the same one"):
        make_plan(place({**lora(Q), **twice}), MergeSettings())


def test_a_tensor_used_twice_is_found_out() -> None:
    """Whatever a planner does."""
    spec = TensorSpec("w", "F32", (2,))
    one = Replacement(spec, "w", "a")
    two = Replacement(TensorSpec("v", "F32", (2,)), "v", "a")
    with pytest.raises(AccountingError, match="more than once: a"):
        account({"a": spec}, [one, two])


def test_two_replacements_of_one_tensor_are_found_out() -> None:
    """Neither may win by chance."""
    spec = TensorSpec("w", "F32", (2,))
    one, two = Replacement(spec, "w", "a"), ModuleChange("w", ("w",), (spec,), ("b",), Kind.REPLACE, 0, None)  # type: ignore[arg-type]
    with pytest.raises(AccountingError, match="exclude each other"):
        account({"a": spec, "b": spec}, [one, two])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {f"base_model.model.{Q}.lora_A.weight": torch.ones(2, 9)},
            r"expected \[8, 8\] to fit the base, got \[8, 9\]",
        ),
        ({f"base_model.model.{Q}.lora_B.weight": torch.ones(8, 3)}, "expected lora_B of rank 2"),
        ({f"base_model.model.{Q}.lora_A.weight": torch.ones(0)}, "gather them"),
        ({"base_model.model.model.norm.weight": torch.ones(9)}, r"expected \[8\]"),
    ],
)
def test_shapes_that_do_not_fit_say_so(place: Any, changed: dict[str, torch.Tensor], message: str) -> None:
    """Module, expected, found, and what to do."""
    with pytest.raises(ShapeError) as caught:
        make_plan(place({**lora(Q), **changed}), MergeSettings())
    import re

    assert re.search(message, f"{caught.value.message} {caught.value.hint}")
    assert caught.value.hint


def test_an_adapter_file_that_is_broken_or_empty(place: Any, tmp_path: Path) -> None:
    """Truncated, without tensors, not there."""
    sources = place(lora(Q))
    file = tmp_path / "adapter0" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(MalformedError, match="truncated"):
        make_plan(Resolved((fresh(sources),), sources.base, None), MergeSettings())
    save_file({}, file)
    with pytest.raises(MalformedError, match="holds no tensors"):
        make_plan(Resolved((fresh(sources),), sources.base, None), MergeSettings())
    file.unlink()
    with pytest.raises(NotFoundError, match="adapter_model"):
        make_plan(Resolved((fresh(sources),), sources.base, None), MergeSettings())


def fresh(sources: Resolved) -> Adapter:
    """The adapter with its folder listed anew."""
    folder = sources.adapter.repository.origin.folder
    assert folder is not None
    return Adapter(Folder(folder), sources.adapter.config, "LORA")


def test_a_quantised_base_is_refused(place: Any) -> None:
    """With the way out."""
    with pytest.raises(BaseModelError, match="quantised") as caught:
        make_plan(
            place(lora(Q), base={"quantization_config": {"quant_method": "gptq", "bits": 4}}), MergeSettings()
        )
    assert "--base-model" in caught.value.hint


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_update_that_is_not_finite_is_refused(place: Any, tmp_path: Path, value: float) -> None:
    """A diverged training run is no model; nothing is left of the merge."""
    tensors = lora(Q, V)
    tensors[f"base_model.model.{V}.lora_B.weight"][3, 1] = value
    sources = place(tensors)
    plan = make_plan(sources, MergeSettings())
    (tmp_path / "out").mkdir()
    with pytest.raises(MalformedError, match=r"v_proj\.weight holds NaN or infinity"):
        merge(plan, sources, tmp_path / "out", settings=MergeSettings(), progress=Silent())
    assert not list((tmp_path / "out").iterdir())


# -------------------------------------------------------------------------------------------- names repaired


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("base_model.model.", "", "missing prefix"),
        ("base_model.model.", "base_model.model.base_model.model.", "doubled prefix"),
        ("lora_A.weight", "lora_A.default.weight", "own name"),
        ("lora_A.weight", "lora_A.default.default.weight", "own name"),
        ("lora_B.weight", "lora_B.my-adapter.weight", "own name"),
        ("self_attn.", "self_attn._fsdp_wrapped_module.", "wrappers"),
        ("model.layers", "_orig_mod.model.layers", "wrappers"),
    ],
)
def test_names_from_the_wild_are_repaired_and_it_is_said(place: Any, old: str, new: str, said: str) -> None:
    """Only what cannot mean anything else; the plan is that of the clean file."""
    clean = make_plan(place(lora(Q, V)), MergeSettings())
    wild = make_plan(
        place({key.replace(old, new): value for key, value in lora(Q, V).items()}), MergeSettings()
    )
    assert wild.changes == clean.changes
    assert any(said in note for note in wild.notes)
    assert not clean.notes


@pytest.mark.parametrize("new", ["model.model.", "wrapped.model."])
def test_a_component_too_many_is_dropped_when_only_that_fits(place: Any, new: str) -> None:
    """Saved from inside another module; the repair is complete and the note says so."""
    clean = make_plan(place(lora(Q, V)), MergeSettings())
    tensors = {
        key.replace("base_model.model.model.", f"base_model.model.{new}"): t for key, t in lora(Q, V).items()
    }
    sources = place(tensors)
    folder = sources.base.repository.origin.folder
    assert folder is not None
    wild = make_plan(Resolved(sources.adapters, BaseModel(Folder(folder), CONFIG), None), MergeSettings())
    assert wild.changes == clean.changes
    assert any("only so do they fit" in note for note in wild.notes)


# --------------------------------------------------------------------------------------------- several adapters


def test_adapters_are_added_with_their_weights(place: Any, tmp_path: Path) -> None:
    """W + w1 s B1 A1 + w2 s B2 A2, rounded once."""
    first, second = lora(Q, V), lora(Q, seed=5)
    sources = place(first, second, weights=(0.5, -2.0))
    plan = make_plan(sources, MergeSettings())
    assert (plan.adapter_tensors, plan.consumed) == (6, 6)
    (tmp_path / "out").mkdir()
    merge(plan, sources, tmp_path / "out", settings=MergeSettings(), progress=Silent())
    found = load_file(tmp_path / "out" / "model.safetensors")
    expected = base_tensors()[f"{Q}.weight"].double()
    for weight, tensors in ((0.5, first), (-2.0, second)):
        a, b = (tensors[f"base_model.model.{Q}.lora_{part}.weight"].double() for part in "AB")
        expected = expected + weight * 2 * (b @ a)
    torch.testing.assert_close(found[f"{Q}.weight"].double(), expected, rtol=1e-5, atol=1e-5)


def test_what_is_no_sum_cannot_be_weighted_or_stacked(place: Any) -> None:
    """A trained norm has no half, and of two trained norms neither may win by chance."""
    norm = {"base_model.model.model.norm.weight": torch.ones(8)}
    with pytest.raises(MethodError, match="only sums can be weighted"):
        make_plan(place({**lora(Q), **norm}, weights=(0.5,)), MergeSettings())
    with pytest.raises(MethodError, match="changed by two adapters"):
        make_plan(place({**lora(Q), **norm}, {**lora(V), **norm}), MergeSettings())
