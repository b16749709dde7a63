"""What stands beside merged weights: chosen from lists, edited only where needed, and nothing foreign run."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from merge_adapter.checkpoint.folder import Folder
from merge_adapter.errors import MalformedError, PolicyError
from merge_adapter.merge import merge
from merge_adapter.package import Packaged, package
from merge_adapter.plan import make_plan
from merge_adapter.resolve import SourceRequest, resolve
from merge_adapter.types import (
    Adapter,
    BaseModel,
    DType,
    FileOrigin,
    MergeSettings,
    QuantizedBase,
    Resolved,
    Silent,
    Verdict,
)
from merge_adapter.verify import verify
from merge_adapter.verify.settings import VerifySettings

Copy = Callable[..., Path]


def sources_of(adapter: Path, base: Path) -> Resolved:
    return resolve(SourceRequest((str(adapter),), base_model=str(base)), hub=None)  # type: ignore[arg-type]


def bare_sources(adapter: Path, base: Path, tokenizer: Path | None) -> Resolved:
    """Sources of folders that hold no weights."""
    config = json.loads((base / "config.json").read_text())
    return Resolved(
        adapters=(Adapter(Folder(adapter), {}, "LORA"),),
        base=BaseModel(Folder(base), config),
        tokenizer=Folder(tokenizer) if tokenizer else None,
    )


def plan_of(**changes: Any) -> Any:
    """The part of a plan that packaging looks at."""
    return SimpleNamespace(
        config_changes=changes, outputs=(SimpleNamespace(path="model.safetensors"),), index=None
    )


def run(sources: Resolved, destination: Path, plan: Any = None, **settings: Any) -> Packaged:
    destination.mkdir(exist_ok=True)
    return package(sources, plan or plan_of(), destination, settings=MergeSettings(**settings))


def folder_with(place: Path, **files: Any) -> Path:
    """A folder with a minimal Llama config and the files named (`__` stands for a dot, `_` for itself)."""
    place.mkdir(parents=True)
    files.setdefault("config__json", {"model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    for name, content in files.items():
        path = place / name.replace("__", ".")
        text = content if isinstance(content, str) else json.dumps(content, indent=2)
        path.write_text(text)
    return place


def test_every_file_is_hashed_and_copied_byte_for_byte(
    lm_adapter: Path, lm_base: Path, tmp_path: Path
) -> None:
    """What needs no edit is the source's own bytes, and the record says whose."""
    sources = sources_of(lm_adapter, lm_base)
    packaged = run(sources, tmp_path / "out", make_plan(sources, MergeSettings()))
    assert {file.path: (file.origin, file.source) for file in packaged.files} == {
        "chat_template.jinja": (FileOrigin.COPIED, "adapter"),
        "config.json": (FileOrigin.COPIED, "base"),
        "generation_config.json": (FileOrigin.COPIED, "base"),
        "tokenizer.json": (FileOrigin.COPIED, "adapter"),
        "tokenizer_config.json": (FileOrigin.COPIED, "adapter"),
    }
    for file in packaged.files:
        content = (tmp_path / "out" / file.path).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (file.bytes, file.sha256)
        assert content == ((lm_adapter if file.source == "adapter" else lm_base) / file.path).read_bytes()
    assert packaged.notes == ()


def test_adapters_chat_template_wins(lm_adapter: Path, lm_base: Path, tmp_path: Path) -> None:
    """The merged tokenizer renders a chat as the adapter was trained, not as its base does."""
    from transformers import AutoTokenizer

    run(sources_of(lm_adapter, lm_base), tmp_path / "out")
    chat = [{"role": "user", "content": "What does os.walk do?"}]
    rendered = [
        AutoTokenizer.from_pretrained(folder).apply_chat_template(chat, tokenize=False)
        for folder in (tmp_path / "out", lm_adapter, lm_base)
    ]
    assert rendered[0] == rendered[1] != rendered[2]


@pytest.mark.parametrize("name", ["tokenizer.json", "special_tokens_map.json", "tokenizer_config.json"])
def test_a_tokenizer_that_was_cut_is_refused(
    lm_base: Path, lm_adapter: Path, copy_of: Copy, tmp_path: Path, name: str
) -> None:
    """Copied as it is, it would be found when the model is published, or by whoever loads it."""
    adapter = copy_of(lm_adapter)
    (adapter / name).write_text('{"version": "1.0", "added')
    with pytest.raises(MalformedError, match=f"{name} of .* is not readable JSON") as caught:
        run(sources_of(adapter, lm_base), tmp_path / "out")
    assert caught.value.hint


def test_base_tokenizer_with_adapters_template_is_said(lm_base: Path, tmp_path: Path) -> None:
    """Tokenizer and template from two repositories are a mixture, and a note says so."""
    adapter = folder_with(tmp_path / "adapter", chat_template__jinja="{{ 'adapter' }}")
    packaged = run(bare_sources(adapter, lm_base, lm_base), tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ 'adapter' }}"
    assert any("the chat template the adapter's" in note for note in packaged.notes)


def test_base_template_completes_adapters_tokenizer(lm_adapter: Path, copy_of: Copy, tmp_path: Path) -> None:
    """A tokenizer saved without a template gets the base's, also out of an old tokenizer_config.json."""
    adapter = copy_of(lm_adapter)
    (adapter / "chat_template.jinja").unlink()
    base = folder_with(
        tmp_path / "base",
        tokenizer__json="{}",
        tokenizer_config__json={
            "chat_template": [
                {"name": "default", "template": "{{ 'one' }}"},
                {"name": "tool_use", "template": "{{ 'two' }}"},
                {"name": "../../escape", "template": "{{ 'three' }}"},
            ]
        },
    )
    packaged = run(bare_sources(adapter, base, adapter), tmp_path / "out")
    out = tmp_path / "out"
    assert (out / "chat_template.jinja").read_text() == "{{ 'one' }}"
    assert (out / "additional_chat_templates" / "tool_use.jinja").read_text() == "{{ 'two' }}"
    assert not list(tmp_path.rglob("escape*"))
    assert any("the chat template the base's" in note for note in packaged.notes)


def test_gate_agrees_on_a_template_from_the_other_repository(
    lm_adapter: Path, lm_base: Path, copy_of: Copy, tmp_path: Path
) -> None:
    """The gate expects the template that packaging puts there, and fails a folder without it."""
    adapter = copy_of(lm_adapter)
    (adapter / "chat_template.jinja").unlink()
    sources = sources_of(adapter, lm_base)
    settings = MergeSettings()
    plan = make_plan(sources, settings)
    out = tmp_path / "out"
    out.mkdir()
    merge(plan, sources, out, settings=settings, progress=Silent(), threads=1)
    run(sources, out, plan)
    gate = VerifySettings(probe_tokens=64, greedy_tokens=0, isolated=False)
    assert verify(out, sources, settings=gate, progress=Silent()).verdict is Verdict.PASS
    (out / "chat_template.jinja").unlink()
    rejected = verify(out, sources, settings=gate, progress=Silent())
    assert rejected.verdict is Verdict.FAIL
    assert any("chat template" in reason for reason in rejected.reasons)


def test_leftovers_of_training_are_never_published(
    lm_adapter: Path, lm_base: Path, copy_of: Copy, tmp_path: Path
) -> None:
    """Files are chosen from what a model needs: nothing of a training run comes along."""
    adapter = copy_of(lm_adapter)
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"):
        (adapter / name).write_bytes(b"x")
    for name in (
        "checkpoint-10/adapter_config.json",
        "other/adapter_model.safetensors",
        "runs/events.out.tfevents",
        ".env",
    ):
        (adapter / name).parent.mkdir(exist_ok=True)
        (adapter / name).write_text("{}")
    packaged = run(sources_of(adapter, lm_base), tmp_path / "out", trust_remote_code=True)
    assert [file.path for file in packaged.files] == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_config_follows_plan_and_settings(tmp_path: Path) -> None:
    """The plan's edits, the dtype, a removed quantisation, and no path of anybody's machine."""
    base = folder_with(
        tmp_path / "base",
        config__json={
            "_name_or_path": "/home/ada/models/llama",
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "torch_dtype": "float16",
            "tie_word_embeddings": True,
            "quantization_config": {"quant_method": "bitsandbytes"},
            "text_config": {"dtype": "float16", "hidden_size": 8},
            "vocab_size": 100,
        },
    )
    adapter = folder_with(tmp_path / "adapter")
    plan = plan_of(architectures=["LlamaForSequenceClassification"], vocab_size=104, tie_word_embeddings=None)
    packaged = run(
        bare_sources(adapter, base, None),
        tmp_path / "out",
        plan,
        dtype=DType.BFLOAT16,
        quantized_base=QuantizedBase.DEQUANTIZE,
    )
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {
        "architectures": ["LlamaForSequenceClassification"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "text_config": {"dtype": "bfloat16", "hidden_size": 8},
        "vocab_size": 104,
    }
    assert packaged.files[0].origin is FileOrigin.WRITTEN


@pytest.mark.parametrize(
    ("config", "kept"),
    [
        (
            {"do_sample": False, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [2, 7]},
            {"do_sample": False, "eos_token_id": [2, 7]},
        ),
        ({"num_return_sequences": 4, "max_new_tokens": 9}, {"max_new_tokens": 9}),
        ({"cache_implementation": "imaginary", "bos_token_id": 1}, {"bos_token_id": 1}),
        ({"do_sample": True, "temperature": 0.6}, {"do_sample": True, "temperature": 0.6}),
    ],
)
def test_generation_config_is_repaired(config: dict[str, Any], kept: dict[str, Any], tmp_path: Path) -> None:
    """What transformers refuses to save is repaired without switching sampling on, and said."""
    from transformers import GenerationConfig

    base = folder_with(tmp_path / "base", generation_config__json=config)
    packaged = run(bare_sources(folder_with(tmp_path / "adapter"), base, None), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == kept
    assert (kept != config) == any("generation_config.json was refused" in note for note in packaged.notes)
    GenerationConfig.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "saved")


def test_embedding_model_loads_with_sentence_transformers(
    embedding_adapter: Path, embedding_base: Path, tmp_path: Path
) -> None:
    """modules.json, pooling and their configs come along, so that the folder is a SentenceTransformer."""
    from sentence_transformers import SentenceTransformer

    run(sources_of(embedding_adapter, embedding_base), tmp_path / "out")
    (tmp_path / "out" / "model.safetensors").symlink_to(embedding_base / "model.safetensors")
    texts = ["Return a list of the lines.", "Close the file."]
    packaged = SentenceTransformer(str(tmp_path / "out"), device="cpu").encode(texts)
    original = SentenceTransformer(str(embedding_base), device="cpu").encode(texts)
    assert packaged == pytest.approx(original, abs=1e-6)


def test_reranker_loads_with_cross_encoder(embedding_base: Path, tmp_path: Path) -> None:
    """A CrossEncoder's own settings come along: prompts, activation, and one score per pair."""
    from sentence_transformers import CrossEncoder
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, num_labels=1
    )
    plain = tmp_path / "plain"
    BertForSequenceClassification(config).save_pretrained(plain)
    AutoTokenizer.from_pretrained(embedding_base).save_pretrained(plain)
    base = tmp_path / "base"
    CrossEncoder(str(plain), device="cpu", activation_fn=torch.nn.Tanh()).save_pretrained(str(base))
    run(bare_sources(folder_with(tmp_path / "adapter"), base, base), tmp_path / "out")
    (tmp_path / "out" / "model.safetensors").symlink_to(base / "model.safetensors")
    packaged = CrossEncoder(str(tmp_path / "out"), device="cpu")
    pairs = [("What closes a file?", "Close the file."), ("What closes a file?", "Return the sine.")]
    assert isinstance(packaged.activation_fn, torch.nn.Tanh)
    assert packaged.predict(pairs) == pytest.approx(
        CrossEncoder(str(base), device="cpu").predict(pairs), abs=1e-6
    )


def test_dense_module_with_pickled_weights_becomes_safetensors(tmp_path: Path) -> None:
    """A head in a pickle keeps its tensors and loses its pickle."""
    from safetensors.torch import load_file

    base = folder_with(tmp_path / "base", modules__json=[{"path": ""}, {"path": "2_Dense"}])
    dense = folder_with(base / "2_Dense", config__json={"in_features": 2})
    weight = torch.arange(4.0).reshape(2, 2)
    torch.save({"linear.weight": weight}, dense / "pytorch_model.bin")
    packaged = run(bare_sources(folder_with(tmp_path / "adapter"), base, None), tmp_path / "out")
    assert torch.equal(load_file(tmp_path / "out" / "2_Dense" / "model.safetensors")["linear.weight"], weight)
    assert not list((tmp_path / "out").rglob("*.bin"))
    assert any("was a pickle" in note for note in packaged.notes)


def test_adapters_trained_module_overrides_the_bases(tmp_path: Path) -> None:
    """A head trained beside the adapter is the one that counts."""
    modules = [{"path": ""}, {"path": "2_Dense"}]
    base = folder_with(tmp_path / "base", modules__json=modules)
    adapter = folder_with(tmp_path / "adapter", modules__json=modules)
    folder_with(base / "2_Dense", model__safetensors="old", config__json={})
    folder_with(adapter / "2_Dense", model__safetensors="new")
    run(bare_sources(adapter, base, None), tmp_path / "out")
    assert (tmp_path / "out" / "2_Dense" / "model.safetensors").read_text() == "new"


class Payload:
    """Pickles to a call."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> Any:
        return Path.touch, (self.place,)


def test_code_in_a_pickled_module_never_runs(tmp_path: Path) -> None:
    """A pickle that is more than tensors is refused, and what it would do does not happen."""
    base = folder_with(tmp_path / "base", modules__json=[{"path": "2_Dense"}])
    dense = folder_with(base / "2_Dense")
    (dense / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(tmp_path / "ran"), protocol=2))
    with pytest.raises(MalformedError, match="not a plain state dict"):
        run(bare_sources(folder_with(tmp_path / "adapter"), base, None), tmp_path / "out")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("path", ["../outside", "/etc", "a/../../b", "a\\..\\b", "a\u202eb", "a//b", 7])
def test_hostile_module_paths_are_refused(path: Any, tmp_path: Path) -> None:
    """modules.json is untrusted: its paths stay inside or nothing is written."""
    base = folder_with(tmp_path / "base", modules__json=[{"path": path}])
    with pytest.raises(MalformedError, match=r"modules\.json"):
        run(bare_sources(folder_with(tmp_path / "adapter"), base, None), tmp_path / "out")


def test_code_is_left_out_where_transformers_has_its_own(tmp_path: Path) -> None:
    """A known model type loses its auto_map and its Python files, with a note."""
    config = {"model_type": "llama", "auto_map": {"AutoModel": "modeling.Mine"}}
    base = folder_with(tmp_path / "base", config__json=config, modeling__py="raise SystemExit")
    packaged = run(bare_sources(folder_with(tmp_path / "adapter"), base, None), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"model_type": "llama"}
    assert [file.path for file in packaged.files] == ["config.json"]
    assert any("no longer points at Python code" in note for note in packaged.notes)


def test_unknown_model_type_needs_trust(tmp_path: Path) -> None:
    """A model that only its own code can build is a matter of policy; with trust its code comes along."""
    config = {"model_type": "homemade", "auto_map": {"AutoModel": "modeling.Mine"}}
    base = folder_with(tmp_path / "base", config__json=config, modeling__py="pass")
    sources = bare_sources(folder_with(tmp_path / "adapter"), base, None)
    with pytest.raises(PolicyError, match="homemade") as caught:
        run(sources, tmp_path / "out")
    assert "--trust-remote-code" in caught.value.hint
    packaged = run(sources, tmp_path / "trusted", trust_remote_code=True)
    assert [file.path for file in packaged.files] == ["config.json", "modeling.py"]
    assert json.loads((tmp_path / "trusted" / "config.json").read_text()) == config


def test_modules_that_are_code_need_trust(tmp_path: Path) -> None:
    """A SentenceTransformer with a module of its own cannot load without that code."""
    modules = [
        {"path": "", "type": "custom_st.Transformer"},
        {"path": "1_P", "type": "sentence_transformers.models.P"},
    ]
    base = folder_with(tmp_path / "base", modules__json=modules)
    (base / "custom_st.py").write_text("pass")
    sources = bare_sources(folder_with(tmp_path / "adapter"), base, None)
    with pytest.raises(PolicyError, match="custom_st"):
        run(sources, tmp_path / "out")
    packaged = run(sources, tmp_path / "trusted", trust_remote_code=True)
    assert [file.path for file in packaged.files] == ["config.json", "custom_st.py", "modules.json"]


class Huge(Folder):
    """A folder that says its files are endless."""

    @property
    def files(self) -> Any:
        return dict.fromkeys(super().files, 1 << 40)


def test_files_beyond_reason_are_not_read(lm_base: Path, tmp_path: Path) -> None:
    """Sizes are looked at before content: a hostile repository fills neither memory nor disk."""
    sources = bare_sources(folder_with(tmp_path / "adapter", generation_config__json={}), lm_base, lm_base)
    adapter = replace(sources.adapter, repository=Huge(tmp_path / "adapter"))
    with pytest.raises(MalformedError, match=r"generation_config\.json .* has 1099511627776 bytes"):
        run(replace(sources, adapters=(adapter,)), tmp_path / "out")
    with pytest.raises(MalformedError, match="at most"):
        run(replace(sources, tokenizer=Huge(lm_base), adapters=sources.adapters), tmp_path / "out2")


def test_licences_of_both_come_along(tmp_path: Path) -> None:
    """The base's texts keep their names; an adapter's other text stands beside them."""
    base = folder_with(tmp_path / "base", LICENSE="base", NOTICE__txt="notice", LICENSE__exe="no")
    adapter = folder_with(tmp_path / "adapter", LICENSE="adapter", NOTICE__txt="notice")
    run(bare_sources(adapter, base, None), tmp_path / "out")
    written = {
        path.name: path.read_text() for path in (tmp_path / "out").iterdir() if path.name != "config.json"
    }
    assert written == {"LICENSE": "base", "NOTICE.txt": "notice", "adapter-LICENSE": "adapter"}


@pytest.mark.parametrize("owner", ["adapter", "base"])
def test_a_pointer_is_never_taken_for_the_file(owner: str, tmp_path: Path) -> None:
    """A checkout without Git LFS: what lies deeper than the weights would be published as three lines of text."""
    modules = [{"path": ""}, {"path": "2_Dense"}]
    base = folder_with(tmp_path / "base", modules__json=modules)
    adapter = folder_with(tmp_path / "adapter", modules__json=modules)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    folder_with(tmp_path / owner / "2_Dense", model__safetensors=pointer)
    with pytest.raises(
        MalformedError, match=rf"2_Dense/model\.safetensors of .*{owner} is a Git LFS pointer"
    ):
        run(bare_sources(adapter, base, None), tmp_path / "out")


def test_broken_json_names_file_and_repository(tmp_path: Path) -> None:
    """An unreadable config says which file of whom."""
    base = folder_with(tmp_path / "base", generation_config__json="{")
    with pytest.raises(MalformedError, match=r"generation_config\.json of .*base"):
        run(bare_sources(folder_with(tmp_path / "adapter"), base, None), tmp_path / "out")
