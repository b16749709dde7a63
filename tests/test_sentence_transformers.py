"""Models that sentence-transformers trained and saved itself, merged end to end: they answer as in training."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from merge_adapter.errors import BaseModelError, MethodError
from merge_adapter.hub import Hub
from merge_adapter.pipeline import Merged, MergeRequest, merge_to_folder, verify_merged
from merge_adapter.resolve import SourceRequest
from merge_adapter.types import Silent, Verdict
from merge_adapter.verify.settings import VerifySettings

TEXTS = ["A cat sat on the mat.", "Stocks fell sharply on Monday.", "The kitten slept on a rug."]
PAIRS = [("a cat", "the kitten slept"), ("what fell?", "stocks, on monday")]
GATE = VerifySettings(isolated=False, probe_tokens=128)
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """sentence-transformers and transformers advise people who train."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def bare_base(folder: Path, tokenizer: Path, model: Any = None) -> Path:
    """A transformer without anything of sentence-transformers, moved off its start."""
    import transformers

    torch.manual_seed(1)
    rows = len(transformers.AutoTokenizer.from_pretrained(tokenizer))
    if model is None:
        model = transformers.BertModel(
            transformers.BertConfig(**SIZES, vocab_size=rows, max_position_embeddings=128)
        )
    _move(model, "")
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, folder)
    return folder


def _move(model: Any, part: str) -> None:
    """Change every parameter with `part` in its name."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if part in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)


def trained(model: Any, folder: Path, **config: Any) -> Path:
    """Give the model an adapter as its own documentation does, move all that trains, save."""
    from peft import LoraConfig

    model.add_adapter(LoraConfig(r=3, target_modules=["query", "value"], **config))
    torch.manual_seed(2)
    _move(model, "lora_")
    _move(model, "modules_to_save")
    model.eval()
    model.save_pretrained(str(folder))
    return folder


def merged(adapter: Path, output: Path, **request: Any) -> Merged:
    source = SourceRequest((str(adapter),), **request)
    hub = Hub(endpoint="http://127.0.0.1:9", token=None)
    made = merge_to_folder(MergeRequest(source, gate=GATE), output, hub=hub, progress=Silent())
    assert made.verification.verdict is Verdict.PASS, made.verification.reasons
    return made


def embedder(base: Path, **keywords: Any) -> Any:
    from sentence_transformers import SentenceTransformer, models

    transformer = models.Transformer(str(base))
    width = transformer.get_embedding_dimension()
    modules = [transformer, models.Pooling(width, "cls"), models.Dense(width, 16), models.Normalize()]
    return SentenceTransformer(modules=modules, device="cpu", **keywords)


def in_a_folder(folder: Path) -> Path:
    """Move the transformer's files, as versions before 2.0 laid them out."""
    (folder / "0_Transformer").mkdir()
    for path in list(folder.iterdir()):
        if path.is_file() and path.name not in ("modules.json", "config_sentence_transformers.json"):
            path.rename(folder / "0_Transformer" / path.name)
    modules = json.loads((folder / "modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    (folder / "modules.json").write_text(json.dumps(modules))
    return folder


@pytest.mark.parametrize("named", ["whole", "folder"])
def test_modules_around_an_adapter_in_a_folder_of_its_own_come_along(
    embedding_base: Path, tmp_path: Path, named: str
) -> None:
    """A trained Dense, pooling and prompts lie beside the transformer's folder, not in it."""
    from sentence_transformers import SentenceTransformer

    model = embedder(bare_base(tmp_path / "base", embedding_base), prompts={"query": "find: "})
    adapter = in_a_folder(trained(model, tmp_path / "adapter"))
    merged(adapter, tmp_path / "out", subfolder="0_Transformer" if named == "folder" else "")
    loaded = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    assert loaded.prompts["query"] == "find: "
    torch.testing.assert_close(loaded.encode(TEXTS), model.encode(TEXTS), rtol=1e-4, atol=1e-5)


def test_a_part_of_several_is_not_taken_for_the_whole(embedding_base: Path, tmp_path: Path) -> None:
    """A Router has a transformer for queries and one for documents; an adapter for one of them is half a model."""
    from sentence_transformers import SentenceTransformer, models
    from sentence_transformers.base.modules import Router

    base = bare_base(tmp_path / "base", embedding_base)
    parts = [[models.Transformer(str(base)), models.Pooling(32)] for _ in "qd"]
    router = Router.for_query_document(query_modules=parts[0], document_modules=parts[1])
    model = SentenceTransformer(modules=[router], device="cpu")
    model.save_pretrained(str(tmp_path / "router"))
    adapter = trained(model, tmp_path / "adapter")
    with pytest.raises(MethodError, match="several parts") as refused:
        merged(adapter, tmp_path / "out")
    part = refused.value.hint.rpartition(" ")[2]
    with pytest.raises(BaseModelError, match="no single transformer"):
        merged(adapter, tmp_path / "out", subfolder=part, base_model=str(tmp_path / "router"))
    merged(adapter, tmp_path / "out", subfolder=part)


@pytest.mark.parametrize("task", ["SEQ_CLS", None])
@pytest.mark.parametrize("head", ["trained with the adapter", "the base's own"])
def test_a_reranker_s_adapter_is_merged_whatever_it_says_of_its_task(
    embedding_base: Path, tmp_path: Path, head: str, task: str | None
) -> None:
    """`add_adapter` saves no head unless told to, and no task; sentence-transformers says it beside the adapter."""
    from sentence_transformers import CrossEncoder

    base = bare_base(tmp_path / "base", embedding_base)
    saved = ["classifier"] if head == "trained with the adapter" else None
    model = CrossEncoder(str(base), device="cpu", num_labels=1)
    if saved is None:
        model.save_pretrained(str(tmp_path / "headed"))
        model = CrossEncoder(str(tmp_path / "headed"), device="cpu")
    adapter = trained(model, tmp_path / "adapter", task_type=task, modules_to_save=saved)
    merged(adapter, tmp_path / "out")
    loaded = CrossEncoder(str(tmp_path / "out"), device="cpu")
    torch.testing.assert_close(loaded.predict(PAIRS), model.predict(PAIRS), rtol=1e-4, atol=1e-5)


def test_a_reranker_s_head_that_nobody_saved_is_missed(embedding_base: Path, tmp_path: Path) -> None:
    from sentence_transformers import CrossEncoder

    model = CrossEncoder(str(bare_base(tmp_path / "base", embedding_base)), device="cpu", num_labels=1)
    with pytest.raises(BaseModelError, match=r"classifier\.weight"):
        merged(trained(model, tmp_path / "adapter"), tmp_path / "out")


def test_vectors_of_tokens_are_judged_as_well(embedding_base: Path, tmp_path: Path) -> None:
    """A model with a vector for each token has no pooling; what it has behind the transformer is judged as well."""
    from sentence_transformers import MultiVectorEncoder

    model = MultiVectorEncoder(str(bare_base(tmp_path / "base", embedding_base)), device="cpu")
    adapter = trained(model, tmp_path / "adapter")
    made = merged(adapter, tmp_path / "out")
    loaded = MultiVectorEncoder(str(tmp_path / "out"), device="cpu")
    for got, expected in zip(loaded.encode_query(TEXTS), model.encode_query(TEXTS), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    dense = next(tmp_path.glob("out/*_Dense/model.safetensors"))
    from safetensors.torch import load_file, save_file

    save_file({name: tensor * 1.5 + 0.1 for name, tensor in load_file(dense).items()}, dense)
    assert judged(made.folder, adapter).verdict is Verdict.FAIL


def test_an_encoder_saved_alone_is_judged_as_such(embedding_base: Path, tmp_path: Path) -> None:
    """T5's encoder is a model of its own, of which AutoModel knows nothing."""
    import transformers
    from peft import LoraConfig
    from sentence_transformers import SentenceTransformer, models

    rows = len(transformers.AutoTokenizer.from_pretrained(embedding_base))
    config = transformers.T5Config(
        vocab_size=rows, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, pad_token_id=0
    )
    base = bare_base(tmp_path / "base", embedding_base, transformers.T5EncoderModel(config))
    model = SentenceTransformer(modules=[models.Transformer(str(base)), models.Pooling(32)], device="cpu")
    model.add_adapter(LoraConfig(r=3, target_modules=["q", "wo"]))
    _move(model, "lora_")
    model.eval().save_pretrained(str(tmp_path / "adapter"))
    merged(tmp_path / "adapter", tmp_path / "out")
    loaded = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    torch.testing.assert_close(loaded.encode(TEXTS), model.encode(TEXTS), rtol=1e-4, atol=1e-5)


def test_lost_prompts_are_a_fault(embedding_base: Path, tmp_path: Path) -> None:
    model = embedder(
        bare_base(tmp_path / "base", embedding_base), prompts={"query": "find: "}, default_prompt_name="query"
    )
    adapter = trained(model, tmp_path / "adapter")
    made = merged(adapter, tmp_path / "out")
    settings = made.folder / "config_sentence_transformers.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "prompts": {}}))
    verification = judged(made.folder, adapter)
    assert verification.verdict is Verdict.FAIL
    assert any(
        "prompts is {}, adapter and base have {'query': 'find: '}" in reason
        for reason in verification.reasons
    )


def judged(folder: Path, adapter: Path) -> Any:
    hub = Hub(endpoint="http://127.0.0.1:9", token=None)
    source = SourceRequest((str(adapter),))
    return verify_merged(str(folder), source, GATE, hub=hub, progress=Silent())[1]
