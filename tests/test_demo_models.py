"""The models that ship: really trained, small, and such that a merge that does nothing or too much is noticed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from merge_adapter.checkpoint.folder import Folder
from merge_adapter.demo.samples import QUESTIONS, write_samples
from merge_adapter.merge import merge
from merge_adapter.package import package
from merge_adapter.plan import make_plan
from merge_adapter.resolve import SourceRequest, resolve
from merge_adapter.types import MergeSettings, Silent


def merged_by_us(adapter: Path, base: Path, destination: Path) -> Path:
    """The merged folder: weights and what stands beside them."""
    destination.mkdir()
    sources = resolve(SourceRequest((str(adapter),), base_model=str(base)), hub=None)  # type: ignore[arg-type]
    settings = MergeSettings()
    plan = make_plan(sources, settings)
    merge(plan, sources, destination, settings=settings, progress=Silent(), threads=1)
    package(sources, plan, destination, settings=settings)
    return destination


def test_demo_models_are_small(lm_base: Path, lm_adapter: Path) -> None:
    """The demo starts at once: a few MB in all, the base in bf16, the adapter in fp32."""
    total = sum(path.stat().st_size for folder in (lm_base, lm_adapter) for path in folder.iterdir())
    assert total < 4 << 20
    assert {tensor.dtype for tensor in load_file(lm_base / "model.safetensors").values()} == {torch.bfloat16}
    adapter = load_file(lm_adapter / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}
    assert len(adapter) == 5 * 7 * 2  # layers, linear modules of each, A and B


@pytest.mark.parametrize("name", ["lm_base", "lm_adapter", "classifier_adapter", "embedding_adapter"])
def test_shipped_files_tell_no_machine(name: str, request: pytest.FixtureRequest) -> None:
    """Nothing that ships names a folder of the machine it was trained on."""
    folder = request.getfixturevalue(name)
    for path in folder.rglob("*"):
        if path.is_file() and path.suffix != ".safetensors" and path.name != "tokenizer.json":
            text = path.read_text()
            assert not [place for place in ("/work", "/home", "/root", "/tmp") if place in text], path
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                assert set(file.metadata() or {}) <= {"format"}


def test_every_matrix_of_the_adapter_was_trained(lm_adapter: Path) -> None:
    """No LoRA B is still the zeros it began as: a merge that skips one changes the model."""
    for name, tensor in load_file(lm_adapter / "adapter_model.safetensors").items():
        assert tensor.abs().max() > 0, name


def test_base_adapter_and_merged_write_what_the_demo_shows(
    lm_base: Path, lm_adapter: Path, tmp_path: Path
) -> None:
    """The adapter changes the style visibly, and the merged model, loaded without PEFT, keeps it word for word."""
    samples = write_samples(lm_base, lm_adapter, merged_by_us(lm_adapter, lm_base, tmp_path / "merged"))
    assert [sample.question for sample in samples] == list(QUESTIONS)
    for sample in samples:
        assert sample.adapted.startswith("In short:")
        assert sample.adapted.endswith("That is all.")
        assert sample.merged == sample.adapted
        assert not sample.base.startswith("In short:")


def test_classifier_tells_code_from_prose_after_the_merge(
    lm_base: Path, classifier_adapter: Path, tmp_path: Path
) -> None:
    """The head that the base lacks is in the merged checkpoint, and its config loads it."""
    merged = merged_by_us(classifier_adapter, lm_base, tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(merged)
    texts = [
        "def read(self, size=-1):\n    if self.closed:\n        raise ValueError('closed')\n    return self._read()",
        "The statement is executed repeatedly as long as the expression is true; when it is false, the loop ends.",
    ]
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    model = AutoModelForSequenceClassification.from_pretrained(merged, dtype=torch.float32)
    plain = AutoModelForSequenceClassification.from_pretrained(lm_base, num_labels=2, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(plain, str(classifier_adapter))
    with torch.no_grad():
        ours, theirs = model(**inputs).logits, adapted(**inputs).logits
    assert ours.argmax(-1).tolist() == [1, 0]
    assert ours == pytest.approx(theirs, abs=0.1)


def test_embedding_model_gives_the_adapters_similarities(
    embedding_base: Path, embedding_adapter: Path, tmp_path: Path
) -> None:
    """Through sentence-transformers: the merged folder's cosine similarities are those of base + adapter."""
    from sentence_transformers import SentenceTransformer

    texts = ["What does shutil.copyfile do?", "Copy the content of a file.", "Return the hyperbolic sine."]
    merged = SentenceTransformer(
        str(merged_by_us(embedding_adapter, embedding_base, tmp_path / "out")), device="cpu"
    )
    base = SentenceTransformer(str(embedding_base), device="cpu")
    base_similarities = base.similarity(base.encode(texts), base.encode(texts))
    base.load_adapter(str(embedding_adapter))
    expected = base.similarity(base.encode(texts), base.encode(texts))
    similarities = merged.similarity(merged.encode(texts), merged.encode(texts))
    assert similarities == pytest.approx(expected, abs=1e-5)
    assert (expected - base_similarities).abs().max() > 0.02


def test_fixtures_name_their_base(lm_adapter: Path, embedding_adapter: Path) -> None:
    """As pushed adapters do: a Hub id, no path."""
    named = [
        json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
        for folder in (lm_adapter, embedding_adapter)
    ]
    assert named == ["demo/pydoc-llama", "sentence-transformers/all-MiniLM-L6-v2"]
    assert "README.md" in Folder(lm_adapter).files


def test_generation_of_the_base_needs_no_adapter(lm_base: Path) -> None:
    """The base is a model of its own: trained text, not noise."""
    tokenizer = AutoTokenizer.from_pretrained(lm_base)
    model = AutoModelForCausalLM.from_pretrained(lm_base, dtype=torch.float32)
    text = 'The "while" statement is used for repeated execution as long as an expression is true.'
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item()
    assert loss < 5.0  # of ln(2048) = 7.6 for a model that knows nothing
