"""Good merges, made by PEFT itself so that no code of ours stands behind them, and means to spoil a copy of one."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from merge_adapter.checkpoint.folder import Folder
from merge_adapter.report import document
from merge_adapter.types import Adapter, BaseModel, Resolved, Verification
from merge_adapter.verify import VerifySettings, verify

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "vocab.txt",
)
SENTENCE_FILES = (
    "modules.json",
    "1_Pooling",
    "2_Normalize",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
)


@contextmanager
def quiet() -> Iterator[None]:
    """PEFT reads a deprecated attribute of transformers, and transformers reports new heads: theirs, not ours."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)


def resolved(adapter: Path, base: Path, *more: Path) -> Resolved:
    """Sources as `resolve` would give them, the tokenizer from the adapter when it has one."""
    repository = Folder(adapter)
    tokenizer = repository if "tokenizer.json" in repository.files else Folder(base)
    adapters = []
    for path in (adapter, *more):
        config = json.loads((path / "adapter_config.json").read_text())
        adapters.append(Adapter(Folder(path), config, str(config["peft_type"]).upper()))
    held = tokenizer if "tokenizer.json" in tokenizer.files else None
    return Resolved(
        tuple(adapters), BaseModel(Folder(base), json.loads((base / "config.json").read_text())), held
    )


@pytest.fixture(scope="session")
def sources_of() -> Callable[..., Resolved]:
    """`resolved`, for modules of tests."""
    return resolved


def judged(merged: Path, sources: Resolved, settings: VerifySettings) -> Verification:
    """The gate's answer, which must make a report that keeps to the schema and names no path, whatever it is."""
    verification = verify(merged, sources, settings=settings)
    text = document.dump(document.verdict_only(sources, verification))
    document.validate_judgement(json.loads(text), place=merged.name)
    assert str(merged.parent) not in text
    return verification


@pytest.fixture(scope="session")
def reported() -> Callable[[Path, Resolved, VerifySettings], Verification]:
    """`judged`, for modules of tests."""
    return judged


@pytest.fixture(scope="session")
def silence() -> Callable[[], Any]:
    """`quiet`, for modules of tests."""
    return quiet


@dataclass(frozen=True)
class Good:
    """A merge that is right, with what it was made from."""

    merged: Path
    sources: Resolved
    kind: str

    def with_sources(self, merged: Path, adapter: Path | None = None, base: Path | None = None) -> Good:
        """Another folder to judge, on another adapter or base."""
        own = self.sources.adapter.repository.origin.folder, self.sources.base.repository.origin.folder
        assert own[0] is not None and own[1] is not None
        return Good(merged, resolved(adapter or own[0], base or own[1]), self.kind)

    def judge(self, merged: Path | None = None, **settings: Any) -> Verification:
        """The gate's answer, without the outputs part unless asked for."""
        chosen = VerifySettings(**{"outputs": False, **settings})
        return judged(merged or self.merged, self.sources, chosen)


def base_as(base: Path, folder: Path, dtype: torch.dtype) -> Path:
    """A copy of a base checkpoint with its floating-point tensors in `dtype`."""
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("__pycache__", "*.py", "onnx", "openvino"))
    tensors = load_file(folder / "model.safetensors")
    cast = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tensors.items()}
    save_file(cast, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def merge_with_peft(
    adapter: Path, base: Path, out: Path, auto: str, *, safe: bool = False, shard: str = "5GB", **loading: Any
) -> Path:
    """PEFT's own merge, saved by transformers, with the tokenizer the adapter calls for."""
    import peft
    import transformers

    with quiet():
        model = getattr(transformers, auto).from_pretrained(base, dtype="auto", **loading)
        merged = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload(safe_merge=safe)
        merged.save_pretrained(out, max_shard_size=shard)
    source = adapter if (adapter / "tokenizer.json").exists() else base
    for name in (*TOKENIZER_FILES, *SENTENCE_FILES):
        if (source / name).is_dir():
            shutil.copytree(source / name, out / name)
        elif (source / name).exists():
            shutil.copy(source / name, out / name)
    return out


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("verify")


@pytest.fixture(scope="session")
def good(
    workshop: Path,
    lm_base: Path,
    lm_adapter: Path,
    classifier_adapter: Path,
    embedding_base: Path,
    embedding_adapter: Path,
) -> Callable[[str], Good]:
    """`good("lm-bf16")`: one of six right merges, made once."""
    sources = {
        "lm": (lm_adapter, lm_base, "AutoModelForCausalLM", {}),
        "cls": (classifier_adapter, lm_base, "AutoModelForSequenceClassification", {"num_labels": 2}),
        "emb": (embedding_adapter, embedding_base, "AutoModel", {}),
    }
    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
    made: dict[str, Good] = {}

    def build(name: str) -> Good:
        if name not in made:
            kind, _, dtype = name.partition("-")
            adapter, base, auto, loading = sources[kind]
            own = workshop / f"{'emb' if kind == 'emb' else 'lm'}-base-{dtype}"
            if not own.exists():
                base_as(base, own, dtypes[dtype])
            merged = merge_with_peft(adapter, own, workshop / name, auto, **loading)
            made[name] = Good(merged, resolved(adapter, own), kind)
        return made[name]

    return build


@dataclass(frozen=True)
class Workpiece:
    """A copy of a good merge that a test may spoil."""

    folder: Path
    good: Good

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What the merged file holds."""
        return load_file(self.folder / "model.safetensors")

    @property
    def base(self) -> dict[str, Tensor]:
        """What the base's file holds."""
        folder = self.good.sources.base.repository.origin.folder
        assert folder is not None
        return load_file(folder / "model.safetensors")

    @property
    def rank(self) -> int:
        """r of the adapter."""
        return int(self.good.sources.adapter.config["r"])

    def write(self, tensors: dict[str, Tensor]) -> None:
        """Replace the merged file."""
        plain = {key: value.contiguous() for key, value in tensors.items()}
        save_file(plain, self.folder / "model.safetensors", metadata={"format": "pt"})

    def edit(self, names: Callable[[str], bool], change: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Put `change(merged, base)` in the place of every tensor whose name `names` accepts; at least one."""
        tensors, base = self.tensors, self.base
        chosen = [name for name in tensors if names(name)]
        assert chosen
        for name in chosen:
            own = base.get(name)
            made = change(tensors[name], tensors[name] if own is None else own)
            tensors[name] = made.to(tensors[name].dtype)
        self.write(tensors)

    def strengthen(self, names: Callable[[str], bool], factor: float) -> None:
        """Merge the update `factor` times, rounded once."""
        self.edit(names, lambda m, b: b.double() + factor * (m.double() - b.double()))

    def config(self, name: str = "config.json", **changes: Any) -> None:
        """Set fields of a JSON file; None removes one."""
        document = json.loads((self.folder / name).read_text())
        for key, value in changes.items():
            if value is None:
                document.pop(key, None)
            else:
                document[key] = value
        (self.folder / name).write_text(json.dumps(document))


@pytest.fixture
def workpiece(tmp_path: Path, good: Callable[[str], Good]) -> Callable[[str], Workpiece]:
    """`workpiece("lm-bf16")`: a copy to spoil."""

    def copy(name: str) -> Workpiece:
        right = good(name)
        return Workpiece(Path(shutil.copytree(right.merged, tmp_path / name)), right)

    return copy


def untied_copy(base: Path, folder: Path) -> Path:
    """A copy of a base whose output head is a tensor of its own."""
    shutil.copytree(base, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def random_merge(tmp_path: Path, good: Callable[[str], Good]) -> Callable[..., Good]:
    """`random_merge(config, "bf16", seed=0, safe=False)`: a random adapter on the trained base, merged by PEFT.

    `config` is one of PEFT's, or the fields of a LoraConfig; `untied` among them gives the base an output head.
    """

    def build(config: Any, dtype: str, *, seed: int = 0, safe: bool = False) -> Good:
        import peft
        import transformers

        origin = good(f"lm-{dtype}").sources.base.repository.origin.folder
        assert origin is not None
        base = origin
        if isinstance(config, dict):
            fields = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **config}
            if fields.pop("untied", False):
                base = untied_copy(origin, tmp_path / "base")
            config = peft.LoraConfig(**fields)
        torch.manual_seed(seed)
        with quiet():
            model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype="auto")
            model = peft.get_peft_model(model, config)
            for value in model.parameters():
                if value.requires_grad:
                    # every trained tensor moves off its initialisation, or the adapter would do nothing
                    value.data.add_(torch.randn(value.shape).to(value.dtype) * 0.05)
            model.save_pretrained(tmp_path / "adapter")
            model.merge_and_unload(safe_merge=safe).save_pretrained(tmp_path / "merged")
        for file in TOKENIZER_FILES:
            if (base / file).exists():
                shutil.copy(base / file, tmp_path / "merged" / file)
        return Good(tmp_path / "merged", resolved(tmp_path / "adapter", base), "lm")

    return build
