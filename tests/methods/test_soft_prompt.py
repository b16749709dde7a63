"""Prompts really trained on the shipped model, folded in as tokens, merged and judged as a user would."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from merge_adapter.checkpoint.folder import Folder
from merge_adapter.errors import AccountingError, BaseModelError, MethodError, ShapeError
from merge_adapter.hub import Hub
from merge_adapter.methods.refuse import check_method
from merge_adapter.methods.soft_prompt import NewRows, VirtualTokens
from merge_adapter.packaging.soft_prompt import with_tokens
from merge_adapter.pipeline import Merged, MergeRequest, merge_to_folder, plan_merge
from merge_adapter.report import document
from merge_adapter.resolve import SourceRequest
from merge_adapter.types import MergeSettings, Silent, SoftPrompt, Verdict, Verification
from merge_adapter.verify import VerifySettings, verify

TOKENS = 6
TEXT = "Return the name of the item, or None."
SETTINGS = MergeSettings(soft_prompt=SoftPrompt.TOKENS)
QUICK = VerifySettings(isolated=False, probe_tokens=128, greedy_tokens=6)


@contextmanager
def quietly() -> Iterator[None]:
    """PEFT's advice to people who train."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module")
def trained(lm_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`trained("prompt")` or `trained("p-tuning")`: a prompt after some steps on sentences of the base's own kind."""
    import peft
    from transformers import AutoModelForCausalLM, AutoTokenizer

    configs = {
        "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=TOKENS),
        "p-tuning": lambda: peft.PromptEncoderConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=TOKENS, encoder_hidden_size=32
        ),
    }
    made: dict[str, Path] = {}

    def train(kind: str) -> Path:
        if kind in made:
            return made[kind]
        with quietly():
            torch.manual_seed(0)
            tokenizer = AutoTokenizer.from_pretrained(lm_base)
            model = AutoModelForCausalLM.from_pretrained(lm_base, dtype=torch.float32)
            model = peft.get_peft_model(model, configs[kind]())
            texts = [
                "Return the number of items, which is never negative.",
                "Raise ValueError for an empty list.",
            ]
            batch = tokenizer(texts, return_tensors="pt", padding=True)
            labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
            losses = []
            for _ in range(15):
                loss = model(**batch, labels=labels).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(float(loss))
            assert losses[-1] < losses[0] - 0.2
            made[kind] = tmp_path_factory.mktemp(kind)
            model.save_pretrained(made[kind])
        return made[kind]

    return train


def _fold(
    adapter: Path,
    base: Path,
    output: Path,
    *,
    settings: MergeSettings = SETTINGS,
    gate: VerifySettings | None = QUICK,
) -> Merged:
    source = SourceRequest((str(adapter),), base_model=str(base), soft_prompt=SoftPrompt.TOKENS)
    return merge_to_folder(MergeRequest(source, settings, gate), output, hub=Hub(), progress=Silent())


@pytest.fixture(scope="module")
def folded(trained: Callable[[str], Path], lm_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Merged:
    """The trained prompt folded in, not judged."""
    return _fold(trained("prompt"), lm_base, tmp_path_factory.mktemp("folded") / "merged", gate=None)


@pytest.fixture
def copy(folded: Merged, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(folded.folder, tmp_path / "copy"))


def _judge(folded: Merged, folder: Path) -> Verification:
    """The gate's answer, whose report keeps to its schema whatever it is."""
    verification = verify(folder, folded.sources, settings=QUICK)
    document.validate_judgement(document.verdict_only(folded.sources, verification), place=folder.name)
    return verification


# ----------------------------------------------------------------------------------------------- what is made


@pytest.mark.parametrize("kind", ["prompt", "p-tuning"])
def test_a_prompt_becomes_tokens_and_passes_the_gate(
    kind: str, trained: Callable[[str], Path], lm_base: Path, tmp_path: Path
) -> None:
    """Plain transformers answers as PEFT's prompted model does, once in a process of its own."""
    gate = VerifySettings(probe_tokens=256, isolated=kind == "prompt")
    merged = _fold(trained(kind), lm_base, tmp_path / "merged", gate=gate)
    assert merged.verification.verdict is Verdict.PASS, merged.verification.reasons
    greedy = merged.verification.evidence["greedy"]
    assert greedy["equal"] == greedy["of"] > 1
    assert all(row["prompt"][-1] in '.!?"' for row in greedy["texts"]), "whole sentences and turns"
    outputs = merged.verification.evidence["outputs"]
    assert outputs["effect"]["mean"] > 1000 * outputs["error"]["mean"]
    assert outputs["prompt_tokens"]["chosen"] == 0
    assert outputs["prompt_tokens"]["mass"] <= outputs["prompt_tokens"]["limit"] == TOKENS / 2048
    assert merged.report["settings"]["soft_prompt"] == "tokens"
    assert (merged.plan.consumed, merged.plan.adapter_tensors) == (1, 1)
    assert r"soft\_prompt\_0" in (merged.folder / "README.md").read_text()


def test_the_user_of_the_folder_needs_to_know_nothing(
    folded: Merged, trained: Callable[[str], Path], lm_base: Path
) -> None:
    """Same logits over the base's vocabulary, same text from generate, with and without the chat template."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quietly():
        base = AutoModelForCausalLM.from_pretrained(lm_base, dtype=torch.float32)
        theirs = PeftModel.from_pretrained(base, trained("prompt")).eval()
        ours = AutoModelForCausalLM.from_pretrained(folded.folder, dtype=torch.float32).eval()
        plain, fronted = (AutoTokenizer.from_pretrained(place) for place in (lm_base, folded.folder))
        prompt = theirs.prompt_encoder[theirs.active_adapter].embedding.weight
        prompt.data = prompt.data.bfloat16().float()
        before, after = plain(TEXT, return_tensors="pt"), fronted(TEXT, return_tensors="pt")
        assert after["input_ids"][0].tolist() == [
            *range(2048, 2048 + TOKENS),
            *before["input_ids"][0].tolist(),
        ]
        with torch.no_grad():
            torch.testing.assert_close(
                ours(**after).logits[..., :2048], theirs(**before).logits, rtol=1e-4, atol=1e-4
            )
            written = ours.generate(**after, max_new_tokens=12)[0].tolist()
            expected = theirs.generate(**before, max_new_tokens=12)[0].tolist()
    assert written[TOKENS:] == expected
    assert fronted.decode(written, skip_special_tokens=True) == plain.decode(
        expected, skip_special_tokens=True
    )
    turns = [{"role": "user", "content": "Hello"}]
    chat = fronted.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    assert chat[TOKENS:] == plain.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    assert chat[:TOKENS] == list(range(2048, 2048 + TOKENS))


def test_the_files_say_what_the_weights_are(folded: Merged, lm_base: Path) -> None:
    """Rows, config and generation config; every row of the base kept bit for bit, the tie undone."""
    before, after = load_file(lm_base / "model.safetensors"), load_file(folded.folder / "model.safetensors")
    config = json.loads((folded.folder / "config.json").read_text())
    assert (config["vocab_size"], config["tie_word_embeddings"]) == (2048 + TOKENS, False)
    generation = json.loads((folded.folder / "generation_config.json").read_text())
    assert generation["suppress_tokens"] == list(range(2048, 2048 + TOKENS))
    table, head = after["model.embed_tokens.weight"], after["lm_head.weight"]
    assert torch.equal(table[:2048], before["model.embed_tokens.weight"])
    assert torch.equal(head[:2048], before["model.embed_tokens.weight"])
    mean = before["model.embed_tokens.weight"].double().mean(0).to(torch.bfloat16)
    torch.testing.assert_close(head[2048:], mean.expand(TOKENS, -1), rtol=2**-8, atol=0)
    others = set(before) - {"model.embed_tokens.weight"}
    assert all(torch.equal(after[name], before[name]) for name in others)


def test_rows_that_the_base_left_free_are_used(
    trained: Callable[[str], Path], lm_base: Path, tmp_path: Path
) -> None:
    """A vocabulary padded beyond the tokenizer, as many are: the tokens take the free rows, nothing grows."""
    base = Path(shutil.copytree(lm_base, tmp_path / "padded"))
    tensors = load_file(base / "model.safetensors")
    table = tensors["model.embed_tokens.weight"]
    tensors["model.embed_tokens.weight"] = torch.cat(
        (table, torch.full((16, table.shape[1]), 0.25).to(table))
    )
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "vocab_size": 2064}))
    merged = _fold(trained("prompt"), base, tmp_path / "merged")
    assert merged.verification.verdict is Verdict.PASS, merged.verification.reasons
    assert json.loads((merged.folder / "config.json").read_text())["vocab_size"] == 2064


SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 2048, "max_position_embeddings": 128,
         "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
OTHERS = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128, "vocab_size": 2048},
    "qwen2": {**SMALL, "tie_word_embeddings": False},
    "phi": SMALL,
    "gemma": SMALL,
}
"""Learned positions and a base-model prefix; an untied head; a head with a bias; an embedding with a factor."""


@pytest.mark.parametrize("model_type", OTHERS)
def test_other_architectures_pass_too(model_type: str, lm_base: Path, tmp_path: Path) -> None:
    """The same tokens in front, whatever holds and reads them."""
    import peft
    import transformers

    base, adapter = tmp_path / "base", tmp_path / "adapter"
    with quietly():
        torch.manual_seed(1)
        config = transformers.CONFIG_MAPPING[model_type](**OTHERS[model_type])
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        model.to(torch.bfloat16).save_pretrained(base)
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(lm_base / name, base)
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        model = peft.get_peft_model(
            model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
        )
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.3)
        model.save_pretrained(adapter)
    merged = _fold(adapter, base, tmp_path / "merged")
    assert merged.verification.verdict is Verdict.PASS, merged.verification.reasons


@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_the_mean_of_all_rows_is_never_chosen(scale: float) -> None:
    """For any hidden state: below the largest logit, and at most 1 / vocabulary of the others' probability."""

    class Held:
        specs: Mapping[str, Any] = {}

        def __init__(self, table: torch.Tensor) -> None:
            from merge_adapter.methods.change import TensorSpec

            self.table = table
            self.specs = {"head": TensorSpec("head", "F32", tuple(table.shape))}

        def read(self, name: str) -> torch.Tensor:
            return self.table

        def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
            return self.table[start:stop]

    torch.manual_seed(0)
    held = Held(torch.randn(50, 8) * scale + torch.randn(8))
    ((_, grown),) = NewRows("head", "head", 53, (50, 51, 52), "F32", None).run(held, held)
    logits = torch.randn(1000, 8).double() @ grown.double().T
    assert (logits[:, 50:] < logits[:, :50].max(1, keepdim=True).values).all()
    assert (logits[:, 50].exp() <= logits[:, :50].exp().mean(1) * (1 + 1e-6)).all()


# ------------------------------------------------------------------------------------------- what the gate sees


@pytest.mark.parametrize(
    "fault", ["order", "zeros", "strength", "base row", "other layer", "missing", "all", "no rows"]
)
def test_wrong_weights_fail(fault: str, folded: Merged, copy: Path) -> None:
    """The prompt's rows are the prompt's, every other row the base's."""
    tensors = load_file(copy / "model.safetensors")
    table = tensors["model.embed_tokens.weight"]
    rows = table[2048:].clone()
    if fault == "order":
        table[2048:] = rows.flip(0)
    elif fault == "zeros":
        table[2048:] = 0
    elif fault == "strength":
        table[2048:] = rows * 1.01
    elif fault == "base row":
        table[7] += 0.01
    elif fault == "other layer":
        tensors["model.layers.0.mlp.up_proj.weight"][0, 0] += 1
    elif fault == "all":
        for tensor in tensors.values():
            tensor += 1
    elif fault == "no rows":
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = tensors[name][:2048].clone()
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps({**config, "vocab_size": 2048}))
    else:
        table[2048] = table[5]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    verification = _judge(folded, copy)
    assert verification.verdict is Verdict.FAIL
    weights = verification.evidence["weights"]
    assert weights["agreement"]["wrong"] > 0
    assert sum(weights["agreement"].values()) == weights["tensors"]


def test_output_rows_that_could_be_chosen_do_not_pass(folded: Merged, copy: Path) -> None:
    """A head whose new rows are those of a frequent token writes the prompt's tokens."""
    tensors = load_file(copy / "model.safetensors")
    head = tensors["lm_head.weight"]
    head[2048:] = head[291] * 2
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    verification = _judge(folded, copy)
    assert verification.verdict is Verdict.FAIL
    assert any("probability" in reason or "first choice" in reason for reason in verification.reasons)


@pytest.mark.parametrize("fault", ["post-processor", "template"])
def test_a_tokenizer_that_forgets_the_prompt_fails(
    fault: str, folded: Merged, copy: Path, lm_base: Path
) -> None:
    """Tokens that nobody puts in front are no prompt."""
    if fault == "template":
        shutil.copy(lm_base / "chat_template.jinja", copy)
    else:
        document = json.loads((copy / "tokenizer.json").read_text())
        document["post_processor"] = json.loads((lm_base / "tokenizer.json").read_text())["post_processor"]
        (copy / "tokenizer.json").write_text(json.dumps(document))
    assert _judge(folded, copy).verdict is Verdict.FAIL


def test_a_generation_config_that_suppresses_nothing_is_told(folded: Merged, copy: Path) -> None:
    """Lawful, since the rows are never the likeliest, but sampling could find one."""
    path = copy / "generation_config.json"
    config = json.loads(path.read_text())
    del config["suppress_tokens"]
    path.write_text(json.dumps(config))
    verification = _judge(folded, copy)
    assert verification.verdict is Verdict.PASS
    assert any("does not suppress" in reason for reason in verification.reasons)


# ---------------------------------------------------------------------------------------------------- refusals


def test_it_is_asked_for(trained: Callable[[str], Path]) -> None:
    """Without the option it is refused, and the option named; other prompts stay refused with it."""
    config = json.loads((trained("prompt") / "adapter_config.json").read_text())
    with pytest.raises(MethodError) as caught:
        check_method(config)
    assert "--soft-prompt tokens" in caught.value.hint
    with pytest.raises(MethodError, match="Prefix tuning"):
        check_method({"peft_type": "PREFIX_TUNING"}, soft_prompt=SoftPrompt.TOKENS)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"task_type": "SEQ_2_SEQ_LM"}, MethodError, "only a causal language model"),
        ({"num_virtual_tokens": 5}, ShapeError, "expected"),
        ({"num_virtual_tokens": 0}, MethodError, "virtual tokens"),
    ],
)
def test_prompts_that_cannot_be_tokens_are_refused(
    change: Mapping[str, Any],
    error: type[Exception],
    match: str,
    trained: Callable[[str], Path],
    lm_base: Path,
    copy_of: Callable[..., Path],
) -> None:
    """Before anything is written."""
    adapter = copy_of(trained("prompt"), "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(error, match=match):
        _plan(adapter, lm_base)


def test_what_was_trained_beside_the_prompt_is_not_lost(
    trained: Callable[[str], Path], lm_base: Path, copy_of: Callable[..., Path]
) -> None:
    adapter = copy_of(trained("prompt"), "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({**tensors, "base_model.model.extra": torch.ones(2)}, adapter / "adapter_model.safetensors")
    with pytest.raises(AccountingError, match="one tensor"):
        _plan(adapter, lm_base)


def test_a_quantised_base_is_refused(
    trained: Callable[[str], Path], lm_base: Path, copy_of: Callable[..., Path]
) -> None:
    """Its rows are no plain numbers, or stand for others."""
    base = copy_of(lm_base, "quantised")
    config = json.loads((base / "config.json").read_text())
    quantised = {**config, "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    (base / "config.json").write_text(json.dumps(quantised))
    with pytest.raises((MethodError, BaseModelError)):
        _plan(trained("prompt"), base)


def test_a_prompt_is_not_folded_in_twice(
    folded: Merged, trained: Callable[[str], Path], lm_base: Path, copy_of: Callable[..., Path]
) -> None:
    """The names are taken; and a base without a tokenizer has no place for tokens at all."""
    with pytest.raises(MethodError, match="already has a token"):
        _plan(trained("prompt"), folded.folder)
    bare = copy_of(lm_base, "bare")
    (bare / "tokenizer.json").unlink()
    with pytest.raises(MethodError, match=r"has a tokenizer\.json"):
        _plan(trained("prompt"), bare)


def _plan(adapter: Path, base: Path) -> None:
    source = SourceRequest((str(adapter),), base_model=str(base), soft_prompt=SoftPrompt.TOKENS)
    plan_merge(MergeRequest(source, SETTINGS, None), hub=Hub())


@pytest.mark.parametrize(
    "processor",
    [
        None,
        {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True},
        {"type": "Sequence", "processors": [{"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True,
                                             "use_regex": True}]},
    ],
)  # fmt: skip
def test_every_usual_post_processor_gets_the_tokens(processor: Any, lm_base: Path) -> None:
    """GPT-2's, Llama 3's and Qwen's kinds; one and two texts."""
    from tokenizers import Tokenizer

    document = {**json.loads((lm_base / "tokenizer.json").read_text()), "post_processor": processor}
    plain = Tokenizer.from_str(json.dumps(document))
    tokens = VirtualTokens((2048, 2049), ("<|soft_prompt_0|>", "<|soft_prompt_1|>"))
    fronted = Tokenizer.from_str(json.dumps(with_tokens(document, tokens)))
    assert fronted.encode(TEXT).ids == [2048, 2049, *plain.encode(TEXT).ids]
    assert fronted.encode(TEXT, "more").ids == [2048, 2049, *plain.encode(TEXT, "more").ids]
    assert (
        fronted.encode(TEXT, add_special_tokens=False).ids == plain.encode(TEXT, add_special_tokens=False).ids
    )


def test_a_post_processor_without_a_place_is_refused() -> None:
    with pytest.raises(MethodError, match="BertProcessing"):
        with_tokens({"post_processor": {"type": "BertProcessing"}}, VirtualTokens((1,), ("x",)))


def test_folders_of_the_base_stay_as_they_are(folded: Merged, lm_base: Path) -> None:
    """Nothing of PEFT is left in the merged folder, and its tokenizer is whole."""
    assert "adapter_config.json" not in Folder(folded.folder).files
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= set(
        Folder(folded.folder).files
    )
