"""A base of an old sentence-transformers, merged end to end: it answers as base + adapter in sentence-transformers."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import torch

from merge_adapter.hub import Hub
from merge_adapter.pipeline import MergeRequest, merge_to_folder
from merge_adapter.resolve import SourceRequest
from merge_adapter.types import Silent, Verdict
from merge_adapter.verify.settings import VerifySettings

BERT = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 128,
}  # fmt: skip
TEXTS = ["A cat sat on the mat.", "Stocks fell sharply on Monday.", "The kitten slept on a rug."]


def old_base(folder: Path, tokenizer: Path) -> Path:
    """Saved by today's sentence-transformers, then laid out as versions before 2.0 did."""
    import transformers
    from sentence_transformers import SentenceTransformer, models

    torch.manual_seed(1)
    plain = folder.with_name("plain")
    config = transformers.BertConfig(**BERT)
    model = transformers.BertModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(plain)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json"):
        if (tokenizer / name).exists():
            shutil.copy(tokenizer / name, plain)
    transformer = models.Transformer(str(plain))
    pooling = models.Pooling(transformer.get_word_embedding_dimension(), pooling_mode="cls")
    SentenceTransformer(modules=[transformer, pooling], device="cpu").save_pretrained(str(folder))
    inside = folder / "0_Transformer"
    inside.mkdir()
    for path in list(folder.iterdir()):
        if path.is_file() and path.name not in (
            "modules.json",
            "README.md",
            "config_sentence_transformers.json",
        ):
            path.rename(inside / path.name)
    modules = json.loads((folder / "modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    (folder / "modules.json").write_text(json.dumps(modules))
    return folder


def test_an_old_sentence_transformer_is_merged_and_loads_both_ways(
    embedding_base: Path, tmp_path: Path
) -> None:
    import transformers
    from peft import LoraConfig, PeftModel, get_peft_model
    from sentence_transformers import SentenceTransformer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = old_base(tmp_path / "base", embedding_base)
        before = sorted(path.relative_to(base) for path in base.rglob("*"))
        torch.manual_seed(2)
        bare = transformers.AutoModel.from_pretrained(base / "0_Transformer")
        lora = LoraConfig(
            r=4, target_modules=["query", "value"], task_type="FEATURE_EXTRACTION", init_lora_weights=False
        )
        get_peft_model(bare, lora).save_pretrained(tmp_path / "adapter")
        request = MergeRequest(
            SourceRequest((str(tmp_path / "adapter"),), base_model=str(base)),
            gate=VerifySettings(isolated=False, probe_tokens=128),
        )
        hub = Hub(endpoint="http://127.0.0.1:9", token=None)
        merged = merge_to_folder(request, tmp_path / "out", hub=hub, progress=Silent())
        reference = SentenceTransformer(str(base), device="cpu")
        plain = reference.encode(TEXTS)
        adapted = PeftModel.from_pretrained(reference[0].auto_model, tmp_path / "adapter").eval()
        reference[0].auto_model = adapted
        expected = torch.from_numpy(reference.encode(TEXTS))
        got = torch.from_numpy(SentenceTransformer(str(tmp_path / "out"), device="cpu").encode(TEXTS))
        transformers.AutoModel.from_pretrained(tmp_path / "out")
    assert merged.verification.verdict is Verdict.PASS, merged.verification.reasons
    assert float((expected - torch.from_numpy(plain)).abs().max()) > 1e-3
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert not (tmp_path / "out" / "0_Transformer").exists()
    assert sorted(path.relative_to(base) for path in base.rglob("*")) == before
