"""Several adapters in one merge, against PEFT's add_weighted_adapter and its merge, and under the gate."""

from __future__ import annotations

import itertools
import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from closeness import gaps
from safetensors.torch import load_file, save_file

from merge_adapter.checkpoint.folder import Folder
from merge_adapter.cli import run
from merge_adapter.errors import InputError, MethodError, ShapeError
from merge_adapter.merge import merge
from merge_adapter.methods.combinations.low_rank import check_combination
from merge_adapter.plan import MergePlan, make_plan
from merge_adapter.publish.identity import identity_of_report, identity_of_sources
from merge_adapter.report.document import build, validate_judgement, verdict_only
from merge_adapter.several import check_adapters, compare_revisions, compare_tokenizers
from merge_adapter.types import (
    Adapter,
    BaseModel,
    Combination,
    CombinationType,
    MajoritySign,
    MergeSettings,
    Origin,
    Resolved,
    Silent,
    Verdict,
    Verification,
)
from merge_adapter.verify import VerifySettings, verify

SEQUENTIAL = Combination()
WEIGHTS = (0.7, -0.4, 1.3)
ATTENTION = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
WIDE = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj", "embed_tokens"]}
"""The second adapter reaches modules that the first leaves alone."""
WEIGHTED = {
    "linear": Combination(CombinationType.LINEAR),
    "cat": Combination(CombinationType.CAT),
    "svd": Combination(CombinationType.SVD),
    "svd of rank 2": Combination(CombinationType.SVD, svd_rank=2),
    "ties": Combination(CombinationType.TIES, density=0.6),
    "ties by number": Combination(CombinationType.TIES, density=0.6, majority_sign=MajoritySign.FREQUENCY),
    "ties_svd": Combination(CombinationType.TIES_SVD, density=0.6),
    "dare_linear": Combination(CombinationType.DARE_LINEAR, density=0.5, seed=3),
    "dare_linear_svd": Combination(CombinationType.DARE_LINEAR_SVD, density=0.5, seed=3),
    "dare_ties": Combination(CombinationType.DARE_TIES, density=0.5, seed=3),
    "dare_ties_svd": Combination(CombinationType.DARE_TIES_SVD, density=0.5, seed=3),
    "magnitude_prune": Combination(CombinationType.MAGNITUDE_PRUNE, density=0.4),
    "magnitude_prune_svd": Combination(CombinationType.MAGNITUDE_PRUNE_SVD, density=0.4),
    "nothing pruned": Combination(CombinationType.TIES, density=1.0),
}
"""Every type, and the settings that change one."""


@contextmanager
def quietly() -> Iterator[None]:
    """PEFT's advice to people who train."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@dataclass(frozen=True)
class Several:
    """A base with some adapters on disk."""

    base: Path
    adapters: tuple[Path, ...]

    def sources(self, combination: Combination, weights: tuple[float, ...] = WEIGHTS) -> Resolved:
        adapters = tuple(
            Adapter(Folder(folder), config, config["peft_type"], weight)
            for folder, weight in zip(self.adapters, weights, strict=False)
            for config in [json.loads((folder / "adapter_config.json").read_text())]
        )
        config = json.loads((self.base / "config.json").read_text())
        return Resolved(adapters, BaseModel(Folder(self.base), config), None, combination=combination)

    def plan(self, combination: Combination, weights: tuple[float, ...] = WEIGHTS) -> MergePlan:
        with quietly():
            return make_plan(self.sources(combination, weights), MergeSettings())

    def merge(
        self, output: Path, combination: Combination, weights: tuple[float, ...] = WEIGHTS
    ) -> dict[str, torch.Tensor]:
        output.mkdir()
        sources = self.sources(combination, weights)
        plan = make_plan(sources, MergeSettings())
        merge(plan, sources, output, settings=MergeSettings(), progress=Silent())
        shutil.copy(self.base / "config.json", output)
        if plan.config_changes:
            config = {**json.loads((self.base / "config.json").read_text()), **plan.config_changes}
            (output / "config.json").write_text(json.dumps(config))
        return load_file(output / "model.safetensors")

    def expected(self, combination: Combination) -> dict[str, torch.Tensor]:
        """PEFT's own: all adapters loaded, combined by add_weighted_adapter, merged, in float32."""
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        names = [f"n{number}" for number in range(len(self.adapters))]
        with quietly():
            model = AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32)
            model = PeftModel.from_pretrained(model, self.adapters[0], adapter_name=names[0])
            for name, folder in zip(names[1:], self.adapters[1:], strict=True):
                model.load_adapter(folder, adapter_name=name)
            if combination.type.startswith("dare") and combination.type.endswith("svd"):
                for name, parameter in model.named_parameters():
                    if (
                        ".lora_" in name
                    ):  # the numbers that are drawn depend on the dtype, and ours is float64
                        parameter.data = parameter.data.double()
            _draw_from(combination, model.base_model)
            model.add_weighted_adapter(
                names,
                list(WEIGHTS[: len(names)]),
                "made",
                combination_type=combination.type.value,
                density=combination.density,
                majority_sign_method=combination.majority_sign.value,
                svd_rank=combination.svd_rank,
            )
            merged = model.merge_and_unload(adapter_names=["made"])
        return dict(merged.state_dict())


def _draw_from(combination: Combination, tuner: Any) -> None:
    """The one thing that PEFT leaves to chance: before each module, the seed that is the module's own."""
    paths = {id(module): path for path, module in tuner.model.named_modules()}
    for name in (
        "_generalized_task_arithmetic_weighted_adapter",
        "_svd_generalized_task_arithmetic_weighted_adapter",
    ):
        inner = getattr(tuner, name)

        def seeded(*arguments: Any, _inner: Any = inner, **options: Any) -> Any:
            (target,) = (one for one in (*arguments, *options.values()) if isinstance(one, torch.nn.Module))
            torch.manual_seed(combination.seed_of(paths[id(target)]))
            return _inner(*arguments, **options)

        setattr(tuner, name, seeded)


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory, base_of: Callable[..., Path]) -> Callable[..., Several]:
    """`several(ATTENTION, WIDE, model_type=…)`: adapters of non-zero effect, one per config, saved by PEFT."""
    import peft
    from transformers import AutoModelForCausalLM

    made: dict[str, Several] = {}

    def make(
        *configs: Mapping[str, Any],
        model_type: str = "llama",
        dtype: torch.dtype = torch.float32,
        method: str = "LoraConfig",
    ) -> Several:
        key = f"{configs} {model_type} {dtype} {method}"
        if key in made:
            return made[key]
        base = base_of(model_type, dtype)
        folders = []
        for number, config in enumerate(configs):
            folder = tmp_path_factory.mktemp("adapter")
            with quietly():
                model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
                torch.manual_seed(number)
                model = peft.get_peft_model(model, getattr(peft, method)(task_type="CAUSAL_LM", **config))
                with torch.no_grad():
                    for parameter in model.parameters():
                        if parameter.requires_grad:
                            parameter.add_(torch.randn_like(parameter) * 0.1)
                model.save_pretrained(folder)
            folders.append(folder)
        made[key] = Several(base, tuple(folders))
        return made[key]

    return make


# ---------------------------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize("name", WEIGHTED)
def test_combinations_are_those_of_peft(name: str, several: Callable[..., Several], tmp_path: Path) -> None:
    """Every type gives what PEFT's weighted adapter gives, merged, random pruning from the same seeds included."""
    made, combination = several(ATTENTION, WIDE), WEIGHTED[name]
    found = made.merge(tmp_path / "out", combination)
    expected = made.expected(combination)
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name", ["linear", "svd", "ties_svd", "dare_linear_svd"])
def test_transposed_layers_are_combined_too(
    name: str, several: Callable[..., Several], tmp_path: Path
) -> None:
    """GPT-2's Conv1D holds its weight as [in, out]; pruning and SVD see the update as PEFT holds it."""
    config = {"r": 4, "target_modules": ["c_attn", "wte"], "fan_in_fan_out": True}
    made = several(config, {**config, "lora_alpha": 16}, model_type="gpt2", dtype=torch.bfloat16)
    made.merge(tmp_path / "out", WEIGHTED[name])
    assert _judge(made, WEIGHTED[name], tmp_path / "out") is Verdict.PASS


def test_sums_do_not_depend_on_the_order(several: Callable[..., Several], tmp_path: Path) -> None:
    """Three adapters in all six orders give the same bytes, rounded once from W + all updates."""
    configs = [{**ATTENTION, "lora_alpha": alpha} for alpha in (8, 16, 4)]
    made = several(*configs, dtype=torch.bfloat16)
    pairs = list(zip(made.adapters, WEIGHTS, strict=True))
    results = []
    for number, order in enumerate(itertools.permutations(pairs)):
        shuffled = Several(made.base, tuple(folder for folder, _ in order))
        results.append(
            shuffled.merge(tmp_path / str(number), SEQUENTIAL, tuple(weight for _, weight in order))
        )
    for other in results[1:]:
        assert all(torch.equal(value, other[key]) for key, value in results[0].items())
    key = "model.layers.0.self_attn.q_proj.weight"
    expected = load_file(made.base / "model.safetensors")[key].double()
    for folder, weight in pairs:
        tensors = load_file(folder / "adapter_model.safetensors")
        a, b = (tensors[f"base_model.model.{key[:-7]}.lora_{part}.weight"].double() for part in "AB")
        alpha = json.loads((folder / "adapter_config.json").read_text())["lora_alpha"]
        expected += weight * alpha / 4 * (b @ a)
    off = (results[0][key].double() - expected).abs()
    assert (off <= expected.abs() * 2**-8 * 1.001).all()


def test_a_combination_is_the_same_in_every_run(several: Callable[..., Several], tmp_path: Path) -> None:
    """DARE draws from its seed and nothing else; another seed draws other numbers."""
    made, dare = several(ATTENTION, WIDE), WEIGHTED["dare_linear"]
    torch.manual_seed(1)
    first = made.merge(tmp_path / "one", dare)
    state = torch.random.get_rng_state()
    torch.manual_seed(2)
    again = made.merge(tmp_path / "two", dare)
    other = made.merge(tmp_path / "three", replace(dare, seed=4))
    key = "model.layers.0.self_attn.q_proj.weight"
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not torch.equal(first[key], other[key])
    torch.manual_seed(1)
    assert torch.equal(torch.random.get_rng_state(), state)  # nobody else's numbers were drawn


def test_ranks_may_differ_where_updates_are_added(several: Callable[..., Several], tmp_path: Path) -> None:
    """cat, svd and plain sums take any ranks, rsLoRA and patterns; PEFT's scale for rsLoRA is not repeated."""
    odd = {
        **WIDE,
        "r": 6,
        "use_rslora": True,
        "rank_pattern": {"down_proj": 3},
        "alpha_pattern": {"q_proj": 5},
    }
    made = several(ATTENTION, odd)
    plain = made.merge(tmp_path / "plain", SEQUENTIAL)
    cat = made.merge(tmp_path / "cat", WEIGHTED["cat"])
    whole = made.merge(tmp_path / "svd", Combination(CombinationType.SVD, svd_rank=10))
    for key, value in plain.items():
        torch.testing.assert_close(cat[key], value, rtol=1e-5, atol=2e-6)
        torch.testing.assert_close(whole[key], value, rtol=1e-5, atol=2e-6)
    with pytest.raises(MethodError, match="must be of one rank"):
        made.plan(WEIGHTED["linear"])


@pytest.mark.parametrize(
    ("method", "config", "model_type", "weights"),
    [
        ("LoHaConfig", {"r": 2, "target_modules": ["q_proj", "up_proj"]}, "llama", (1.0, 1.0, 1.0)),
        ("LoKrConfig", {"r": 2, "target_modules": ["q_proj", "up_proj"]}, "llama", (1.0, 1.0)),
        (
            "LoraConfig",
            {"r": 2, "target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]},
            "qwen3_moe",
            WEIGHTS[:2],
        ),
    ],
)
def test_other_sums_add_up_too(
    method: str,
    config: Mapping[str, Any],
    model_type: str,
    weights: tuple[float, ...],
    several: Callable[..., Several],
    tmp_path: Path,
) -> None:
    """Methods that PEFT's layers merge, and experts that are one tensor in memory and many on disk."""
    configs = [config] * len(weights)
    made = several(*configs, model_type=model_type, dtype=torch.bfloat16, method=method)
    found = made.merge(tmp_path / "out", SEQUENTIAL, weights)
    assert _judge(made, SEQUENTIAL, tmp_path / "out", weights) is Verdict.PASS
    turned = Several(made.base, made.adapters[::-1]).merge(tmp_path / "turned", SEQUENTIAL, weights[::-1])
    assert gaps(turned, found) == {}
    one = Several(made.base, made.adapters[:1]).merge(tmp_path / "one", SEQUENTIAL, weights[:1])
    assert any(not torch.equal(value, one[name]) for name, value in found.items())


# -------------------------------------------------------------------------------------------------- refusals


def test_sums_that_are_made_in_two_ways_are_refused(several: Callable[..., Several]) -> None:
    """Factors row by row beside a block-diagonal LoRA, which PEFT's own layer merges: neither may hide the other."""
    from peft import BdLoraConfig

    blocks = BdLoraConfig(target_modules_bd_a=["q_proj"], nblocks=2)
    made = several(
        {"r": 4, "target_modules": ["q_proj"]}, {"r": 4, "target_modules": ["q_proj"], "use_bdlora": blocks}
    )
    for pair in (made, Several(made.base, made.adapters[::-1])):
        with pytest.raises(
            MethodError, match=r"q_proj\.weight is changed by two adapters, one by its factors"
        ) as caught:
            pair.plan(SEQUENTIAL, (1.0, 1.0))
        assert "--base-model" in caught.value.hint


def test_what_a_combination_would_lose_is_refused(several: Callable[..., Several]) -> None:
    """DoRA's magnitudes and tensors trained whole have no weighted form; sequential says where it cannot either."""
    dora = several(ATTENTION, {**ATTENTION, "use_dora": True})
    with pytest.raises(MethodError, match="DoRA"):
        dora.plan(WEIGHTED["linear"])
    saved = several(ATTENTION, {**ATTENTION, "modules_to_save": ["lm_head"]})
    with pytest.raises(MethodError, match="trained whole"):
        saved.plan(WEIGHTED["linear"])
    assert saved.plan(SEQUENTIAL, (0.5, 1.0)).consumed == saved.plan(SEQUENTIAL, (0.5, 1.0)).adapter_tensors
    both = several({**ATTENTION, "modules_to_save": ["lm_head"]}, {**WIDE, "modules_to_save": ["lm_head"]})
    with pytest.raises(MethodError, match=r"lm_head\.weight is changed by two adapters"):
        both.plan(SEQUENTIAL, (1.0, 1.0))


@pytest.mark.parametrize(
    ("combination", "adapters", "match"),
    [
        (Combination(CombinationType.TIES), 2, "how many values"),
        (Combination(CombinationType.LINEAR, density=0.5), 2, "no effect"),
        (Combination(CombinationType.TIES, density=1.5), 2, "not above 0"),
        (Combination(CombinationType.LINEAR, svd_rank=4), 2, "no effect"),
        (Combination(CombinationType.LINEAR), 1, "single adapter"),
    ],
)
def test_settings_without_sense_are_refused(combination: Combination, adapters: int, match: str) -> None:
    """Each with what to give instead, before anything is read."""
    with pytest.raises(InputError, match=match):
        check_combination(combination, adapters)


def test_an_adapter_is_named_once_and_weighs_a_number(several: Callable[..., Several]) -> None:
    made = several(ATTENTION, WIDE)
    first, second = made.sources(SEQUENTIAL, (1.0, float("nan"))).adapters
    with pytest.raises(InputError, match="named twice"):
        check_adapters((first, first))
    with pytest.raises(InputError, match="not a finite number"):
        check_adapters((first, second))
    with pytest.raises(MethodError, match="LOHA and LORA") as caught:
        check_adapters((first, replace(second, method="LOHA", weight=1.0)))
    assert "--base-model" in caught.value.hint


def test_adapters_of_different_base_revisions_are_told(several: Callable[..., Several]) -> None:
    """One base is read; a person should know that one adapter was trained on another state of it."""
    first, second = several(ATTENTION, WIDE).sources(SEQUENTIAL).adapters
    told = [
        replace(one, config={**one.config, "revision": name}) for one, name in ((first, "a"), (second, "b"))
    ]
    assert not list(compare_revisions((first, second)))
    assert not list(compare_revisions((told[0], second)))
    (note,) = compare_revisions((told[0], told[1]))
    assert "different revisions" in note


def test_tokenizers_that_disagree_are_refused(
    several: Callable[..., Several], lm_base: Path, tmp_path: Path
) -> None:
    """The same token under two ids: one model cannot answer to both. Other differences are a note."""
    adapters = []
    for number, source in enumerate(several(ATTENTION, WIDE).adapters):
        folder = tmp_path / f"with-{number}"
        shutil.copytree(source, folder)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(lm_base / name, folder)
        adapters.append(Adapter(Folder(folder), {}, "LORA"))
    pair = (adapters[0], adapters[1])
    chosen = adapters[0].repository
    assert not list(compare_tokenizers(pair, chosen))
    (tmp_path / "with-1" / "tokenizer_config.json").write_text('{"chat_template": "other"}')
    (note,) = compare_tokenizers(_fresh(pair), chosen)
    assert "with-1" in note
    assert "tokenizer_config.json" in note
    path = tmp_path / "with-1" / "tokenizer.json"
    document = json.loads(path.read_text())
    vocabulary = document["model"]["vocab"]
    one, other = list(vocabulary)[-2:]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    path.write_text(json.dumps(document))
    with pytest.raises(ShapeError, match="different ids to 2 tokens"):
        list(compare_tokenizers(_fresh(pair), chosen))


def _fresh(adapters: tuple[Adapter, ...]) -> tuple[Adapter, ...]:
    """The same folders, their files listed anew."""
    return tuple(replace(one, repository=Folder(one.repository.origin.folder or Path())) for one in adapters)


# ------------------------------------------------------------------------------------------------------ gate


def _judge(
    made: Several, combination: Combination, folder: Path, weights: tuple[float, ...] = WEIGHTS
) -> Verdict:
    """The gate's verdict on the weights and layers: outputs cost a model run and decide nothing more here."""
    settings = VerifySettings(isolated=False, probe_tokens=64, greedy_tokens=0)
    with quietly():
        return verify(folder, made.sources(combination, weights), settings=settings).verdict


@pytest.mark.parametrize("name", ["sequential", *WEIGHTED])
def test_the_gate_passes_each_combination(name: str, several: Callable[..., Several], tmp_path: Path) -> None:
    """Against PEFT's own combination of the loaded adapters, bf16 as models are."""
    made = several(ATTENTION, WIDE, dtype=torch.bfloat16)
    combination = WEIGHTED.get(name, SEQUENTIAL)
    made.merge(tmp_path / "out", combination)
    assert _judge(made, combination, tmp_path / "out") is Verdict.PASS


def test_a_single_adapter_may_be_weighted(several: Callable[..., Several], tmp_path: Path) -> None:
    """Half an update is half an update; judged as a whole one it fails."""
    made = several(WIDE, dtype=torch.bfloat16)
    made.merge(tmp_path / "out", SEQUENTIAL, (0.5,))
    assert _judge(made, SEQUENTIAL, tmp_path / "out", (0.5,)) is Verdict.PASS
    assert _judge(made, SEQUENTIAL, tmp_path / "out", (1.0,)) is Verdict.FAIL


@pytest.mark.parametrize("name", ["linear", "svd", "ties_svd", "dare_ties"])
def test_the_gate_passes_what_peft_made(name: str, several: Callable[..., Several], tmp_path: Path) -> None:
    """A checkpoint that PEFT combined and merged itself, no code of ours behind it."""
    made, combination = several(ATTENTION, WIDE, dtype=torch.bfloat16), WEIGHTED[name]
    folder = tmp_path / "out"
    names = made.merge(folder, combination)
    expected = made.expected(combination)
    tensors = {key: expected[key].to(value.dtype).contiguous() for key, value in names.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert _judge(made, combination, folder) is Verdict.PASS


def test_rslora_is_scaled_once(several: Callable[..., Several], tmp_path: Path) -> None:
    """PEFT multiplies a combination that begins with an rsLoRA adapter by the square root of its rank; we do not."""
    made = several({**ATTENTION, "use_rslora": True}, {**ATTENTION, "lora_alpha": 3})
    key = "model.layers.0.self_attn.q_proj.weight"
    base = load_file(made.base / "model.safetensors")[key]
    ours = made.merge(tmp_path / "cat", WEIGHTED["cat"])[key] - base
    plain = made.merge(tmp_path / "plain", SEQUENTIAL)[key] - base
    theirs = made.expected(WEIGHTED["cat"])[key] - base
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=2e-6)
    torch.testing.assert_close(theirs, plain * 8**0.5, rtol=1e-4, atol=2e-6)
    assert _judge(made, WEIGHTED["cat"], tmp_path / "cat") is Verdict.PASS


@pytest.mark.parametrize("fault", ["weight", "adapter missing", "another combination"])
@pytest.mark.parametrize("name", ["sequential", "linear"])
def test_the_gate_fails_a_wrong_combination(
    name: str, fault: str, several: Callable[..., Several], tmp_path: Path
) -> None:
    """A weight that is a tenth off, an adapter left out, or another combination than the one asked for."""
    made = several(ATTENTION, WIDE, dtype=torch.bfloat16)
    combination = WEIGHTED.get(name, SEQUENTIAL)
    if fault == "another combination":
        made.merge(tmp_path / "out", WEIGHTED["svd of rank 2"])
    else:
        made.merge(tmp_path / "out", combination, (0.7, -0.44) if fault == "weight" else (0.7, 0.0))
    assert _judge(made, combination, tmp_path / "out") is Verdict.FAIL


# -------------------------------------------------------------------------------------------------- as a user


def test_the_command_line_takes_adapters_and_weights_in_order(
    several: Callable[..., Several], lm_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`merge`, `plan` and `verify` take the same options; report and card say what was merged with which weight."""
    made = several(ATTENTION, WIDE)
    first, second = map(str, made.adapters)
    base, out = str(made.base), tmp_path / "merged"
    several_options = ["--adapter", second, "--weight", "0.7", "--weight", "-0.4"]
    ties = ["--combination", "ties", "--density", "0.6", "--base-model", base, "--json"]
    assert run(["plan", first, *several_options, *ties]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["combination"] == {"type": "ties", "density": 0.6, "majority_sign": "total"}
    assert run(["merge", first, *several_options, *ties, "--no-verify", "--output", str(out)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [entry["weight"] for entry in report["adapters"]] == [0.7, -0.4]
    assert report["combination"] == planned["combination"]
    assert report["adapter"]["consumed"] == report["adapter"]["tensors"] == planned["adapter"]["consumed"]
    card = (out / "README.md").read_text()
    assert "weight 0.7" in card
    assert "weight -0.4" in card
    assert "`ties`, density 0.6, majority sign total" in card
    expected = made.expected(WEIGHTED["ties"])
    for name, value in load_file(out / "model.safetensors").items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=2e-6)
    judged = ["verify", str(out), "--adapter", first, "--probe-tokens", "64"]
    assert run([*judged, *several_options, *ties]) == 0
    assert run(["plan", first, *several_options, "--weight", "1", "--base-model", base]) == 2
    assert "3 weights were given" in capsys.readouterr().err


def test_a_judgement_says_what_a_single_adapter_was_multiplied_with(several: Callable[..., Several]) -> None:
    """Half of an update is another claim than the whole; 1 goes without saying."""
    made = several(ATTENTION)
    for weight, told in ((0.5, {"weight": 0.5}), (1.0, {})):
        judgement = verdict_only(made.sources(SEQUENTIAL, (weight,)), Verification(Verdict.PASS, ()))
        validate_judgement(judgement, place="the judgement")
        assert {key: judgement["adapter"][key] for key in ("weight",) if key in judgement["adapter"]} == told


def test_weights_and_combination_tell_publications_apart(several: Callable[..., Several]) -> None:
    """Two merges of the same adapters are one publication only when weights and combination agree."""
    made = several(ATTENTION, WIDE)

    def key(combination: Combination, weights: tuple[float, ...]) -> str:
        sources = made.sources(combination, weights)
        report: dict[str, Any] = {
            **verdict_only(sources, Verification(Verdict.PASS, ())),
            "output": {"dtype": "auto", "files": []},
        }
        return identity_of_report(report, "").key

    keys = {
        key(SEQUENTIAL, (1.0, 1.0)),
        key(SEQUENTIAL, (0.5, 1.0)),
        key(WEIGHTED["ties"], (1.0, 1.0)),
        key(WEIGHTED["linear"], (1.0, 1.0)),
        key(Combination(CombinationType.TIES, density=0.7), (1.0, 1.0)),
    }
    assert len(keys) == 5


@dataclass(frozen=True)
class Pinned:
    """A repository of the Hub at a commit, of which only the place is asked."""

    origin: Origin


def test_a_publication_is_found_again_before_anything_is_merged(several: Callable[..., Several]) -> None:
    """Sources and settings give the key that the finished report will have, weights and combination included."""
    made = several(ATTENTION, WIDE)
    for combination, weights in (
        (WEIGHTED["dare_ties"], (0.5, 0.5)),
        (SEQUENTIAL, (0.5, 1.0)),
        (SEQUENTIAL, (0.5,)),
    ):
        found = made.sources(combination, weights)
        adapters = tuple(
            replace(one, repository=cast("Any", Pinned(Origin(f"ada/{number}", f"{number}" * 40))))
            for number, one in enumerate(found.adapters, 1)
        )
        base = replace(found.base, repository=cast("Any", Pinned(Origin("ada/base", "f" * 40))))
        sources = replace(found, adapters=adapters, base=base)
        report = build(
            sources=sources,
            settings=MergeSettings(),
            adapter_tensors=1,
            consumed=1,
            files=(),
            merge={},
            verification=Verification(Verdict.PASS, ()),
            notes=(),
        )
        before = identity_of_sources(sources, MergeSettings(), "")
        assert before == identity_of_report(report, "")
