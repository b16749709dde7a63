"""The trial of the gate: good merges spoiled in one way each, every one to be caught and named."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from merge_adapter.types import Verdict
from merge_adapter.verify.probes import shipped


@dataclass(frozen=True)
class Corruption:
    """One way to spoil a merge."""

    name: str
    spoil: Callable[[Any], None]
    says: str
    """Expression that a reason must match."""
    on: tuple[str, ...] = ("lm", "cls", "emb")


def updated(piece: Any) -> list[str]:
    """Names of the matrices that the adapter changed, in order."""
    tensors, base = piece.tensors, piece.base
    return [name for name in sorted(tensors) if name in base and not torch.equal(tensors[name], base[name])]


def one(piece: Any) -> Callable[[str], bool]:
    """The second updated matrix alone."""
    name = updated(piece)[1]
    return lambda other: other == name


def every(piece: Any) -> Callable[[str], bool]:
    return set(updated(piece)).__contains__


def layer(piece: Any) -> Callable[[str], bool]:
    """All updated matrices of the second layer."""
    names = set(updated(piece))
    return lambda name: name in names and re.search(r"layers?\.1\.", name) is not None


def kept(piece: Any) -> str:
    """A matrix or vector the adapter leaves alone."""
    names = set(updated(piece))
    return next(
        name
        for name in sorted(piece.tensors)
        if name not in names and "layer" in name and "norm" in name.lower()
    )


def damage(at: Callable[[Any], str], change: Callable[[torch.Tensor], None]) -> Callable[[Any], None]:
    def spoil(piece: Any) -> None:
        tensors = {name: tensor.clone() for name, tensor in piece.tensors.items()}
        change(tensors[at(piece)])
        piece.write(tensors)

    return spoil


def first(piece: Any) -> str:
    return updated(piece)[0]


def swap(piece: Any) -> None:
    tensors = piece.tensors
    one = next(name for name in updated(piece) if re.search(r"layers?\.0\.", name))
    other = re.sub(r"(layers?)\.0\.", r"\1.1.", one)
    tensors[one], tensors[other] = tensors[other], tensors[one]
    piece.write(tensors)


def foreign(piece: Any) -> None:
    generator = torch.Generator().manual_seed(3)

    def other(merged: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        delta = (merged.double() - base.double()).flatten()
        return base.double() + delta[torch.randperm(delta.numel(), generator=generator)].reshape(base.shape)

    piece.edit(every(piece), other)


def transpose(piece: Any) -> None:
    name = next(
        name for name in updated(piece) if piece.tensors[name].shape[0] == piece.tensors[name].shape[1]
    )
    tensors = piece.tensors
    tensors[name] = tensors[name].T.contiguous()
    piece.write(tensors)


def flip_bit(tensor: torch.Tensor) -> None:
    """One unit of the last place but two, in one element."""
    kind = torch.int16 if tensor.element_size() == 2 else torch.int32
    tensor.view(kind)[3, 5] ^= 4 if tensor.element_size() == 2 else 1 << 10


def truncate(piece: Any) -> None:
    path = piece.folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4096])


def drop(choose: Callable[[Any], str]) -> Callable[[Any], None]:
    def spoil(piece: Any) -> None:
        tensors = piece.tensors
        del tensors[choose(piece)]
        piece.write(tensors)

    return spoil


def extra(piece: Any) -> None:
    piece.write(piece.tensors | {"model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(4, 4)})


def shards(piece: Any) -> dict[str, Any]:
    """Split the file in two with an index; the index, not yet written."""
    tensors = piece.tensors
    names = sorted(tensors)
    half = len(names) // 2
    weight_map = {}
    for number, part in enumerate((names[:half], names[half:]), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, piece.folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (piece.folder / "model.safetensors").unlink()
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    return {"metadata": {"total_size": total}, "weight_map": weight_map}


def write_index(piece: Any, index: dict[str, Any]) -> None:
    (piece.folder / "model.safetensors.index.json").write_text(json.dumps(index))


def shard_missing(piece: Any) -> None:
    write_index(piece, shards(piece))
    (piece.folder / "model-00002-of-00002.safetensors").unlink()


def total_size_is_a_count(piece: Any) -> None:
    index = shards(piece)
    index["metadata"]["total_size"] = len(index["weight_map"])
    write_index(piece, index)


def index_points_elsewhere(piece: Any) -> None:
    index = shards(piece)
    name = next(iter(index["weight_map"]))
    index["weight_map"][name] = "model-00002-of-00002.safetensors"
    write_index(piece, index)


def index_leaves_out(piece: Any) -> None:
    index = shards(piece)
    del index["weight_map"][sorted(index["weight_map"])[0]]
    write_index(piece, index)


def stale_adapter(piece: Any) -> None:
    folder = piece.good.sources.adapter.repository.origin.folder
    shutil.copy(folder / "adapter_config.json", piece.folder)
    shutil.copy(folder / "adapter_model.safetensors", piece.folder)


def stale_weights(piece: Any) -> None:
    torch.save(piece.base, piece.folder / "pytorch_model.bin")


def stale_index(piece: Any) -> None:
    """A base in shards, merged into one file: some loaders go by the index."""
    index = {"metadata": {}, "weight_map": dict.fromkeys(piece.base, "model-00001-of-00002.safetensors")}
    write_index(piece, index)


def other_prompts(piece: Any) -> None:
    """Each text would be put behind one that the adapter was not trained with."""
    piece.config("config_sentence_transformers.json", prompts={"q": "find: "}, default_prompt_name="q")


def narrowed(piece: Any) -> None:
    tensors = piece.tensors
    narrow = torch.float16 if next(iter(tensors.values())).dtype == torch.float32 else torch.float8_e4m3fn
    piece.write({name: t.to(narrow) if t.is_floating_point() else t for name, t in tensors.items()})


def coarse(piece: Any) -> None:
    """Merged in a coarser dtype and widened again: half the bits are lost, the names and dtypes look right."""
    narrow = (
        torch.bfloat16 if next(iter(piece.tensors.values())).dtype == torch.float32 else torch.float8_e4m3fn
    )
    piece.edit(every(piece), lambda m, b: m.to(narrow).to(m.dtype))


def tokenizer_of_base(piece: Any) -> None:
    folder = piece.good.sources.base.repository.origin.folder
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(folder / name, piece.folder / name)


def no_tokenizer(piece: Any) -> None:
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.txt",
        "special_tokens_map.json",
        "chat_template.jinja",
    ):
        (piece.folder / name).unlink(missing_ok=True)


def swapped_tokens(piece: Any) -> None:
    path = piece.folder / "tokenizer.json"
    document = json.loads(path.read_text())
    vocabulary = document["model"]["vocab"]
    left, right = ("Ġt", "Ġs") if "Ġt" in vocabulary else ("the", "of")
    vocabulary[left], vocabulary[right] = vocabulary[right], vocabulary[left]
    path.write_text(json.dumps(document))


def rare_tokens_swapped(piece: Any) -> None:
    """Two that no probe holds."""
    path = piece.folder / "tokenizer.json"
    document = json.loads(path.read_text())
    vocabulary = document["model"]["vocab"]
    read = "\n".join(probe.plain() for probe in shipped()).lower()
    rare = [token for token in vocabulary if len(token) > 4 and token.strip("Ġ#").lower() not in read]
    left, right = rare[-1], rare[-2]
    vocabulary[left], vocabulary[right] = vocabulary[right], vocabulary[left]
    path.write_text(json.dumps(document))


def labels_swapped(piece: Any) -> None:
    piece.config(id2label={"0": "LABEL_1", "1": "LABEL_0"}, label2id={"LABEL_1": 0, "LABEL_0": 1})


def config_narrower(piece: Any) -> None:
    """The weights as they were, and a config by which transformers would load them in fewer bits."""
    wide = next(iter(piece.tensors.values())).dtype == torch.float32
    piece.config(dtype="bfloat16" if wide else "float16")


def other_pad(piece: Any) -> None:
    piece.config("tokenizer_config.json", pad_token=None, eos_token="the", extra_special_tokens=None)


def other_pooling(piece: Any) -> None:
    path = "1_Pooling/config.json"
    config = json.loads((piece.folder / path).read_text())
    flags = {key: False for key in config if key.startswith("pooling_mode_")}
    if flags:
        piece.config(path, **(flags | {"pooling_mode_cls_token": True}))
    else:
        piece.config(path, pooling_mode="cls")


def no_template(piece: Any) -> None:
    (piece.folder / "chat_template.jinja").unlink()


def changed_template(piece: Any) -> None:
    path = piece.folder / "chat_template.jinja"
    path.write_text(path.read_text() + "\n\nAnswer:")


def fewer_heads(piece: Any) -> None:
    heads = json.loads((piece.folder / "config.json").read_text())["num_attention_heads"]
    piece.config(num_attention_heads=heads // 2, num_key_value_heads=None, head_dim=None)


def untied(piece: Any) -> None:
    """The tie flag dropped while the file has no output head of its own."""
    piece.config(tie_word_embeddings=False)


def head_changed(piece: Any) -> None:
    piece.edit(lambda name: name == "score.weight", lambda m, b: torch.flip(m, [0]))


def head_of_noise(piece: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    piece.edit(
        lambda name: name == "score.weight", lambda m, b: torch.randn(m.shape, generator=generator) * 0.02
    )


def vocabulary_cut(piece: Any) -> None:
    tensors = piece.tensors
    name = next(name for name in tensors if "embed_tokens" in name or "word_embeddings" in name)
    tensors[name] = tensors[name][:-8].contiguous()
    piece.write(tensors)
    piece.config(vocab_size=tensors[name].shape[0])


CORRUPTIONS = (
    Corruption("nothing merged", lambda p: p.strengthen(every(p), 0), "not merged"),
    Corruption("one module not merged", lambda p: p.strengthen(one(p), 0), r"^\S+: not merged$"),
    Corruption("one layer not merged", lambda p: p.strengthen(layer(p), 0), r"\.1\..*: not merged"),
    Corruption("merged twice", lambda p: p.strengthen(every(p), 2), "merged twice"),
    Corruption("one module merged twice", lambda p: p.strengthen(one(p), 2), "merged twice"),
    Corruption("sign flipped", lambda p: p.strengthen(every(p), -1), "sign flipped"),
    Corruption(
        "scaled by sqrt(r)",
        lambda p: p.strengthen(every(p), p.rank**0.5),
        r"scaled by sqrt\(r\)|merged twice",
    ),
    Corruption("scaled by r", lambda p: p.strengthen(every(p), p.rank), r"scaled by r|scaled by sqrt|merged"),
    Corruption("a tenth too strong", lambda p: p.strengthen(every(p), 1.1), r"merged at 1\.1\d? times"),
    Corruption("a tenth too weak", lambda p: p.strengthen(every(p), 0.9), r"merged at 0\.\d+ times"),
    Corruption("two layers swapped", swap, "holds what belongs to"),
    Corruption("another adapter", foreign, "another adapter"),
    Corruption("tensor zeroed", lambda p: p.edit(one(p), lambda m, b: torch.zeros_like(m)), "zeroed"),
    Corruption("not a number", damage(first, lambda t: t[0, 0].fill_(float("nan"))), "1 of .* not finite"),
    Corruption("infinite", damage(first, lambda t: t[0, 0].fill_(float("-inf"))), "1 of .* not finite"),
    Corruption("a row damaged", damage(first, lambda t: t[2].mul_(-1)), r"wrong in 1 of .* rows \(row 2\)"),
    Corruption("one element off", damage(first, flip_bit), r"wrong in 1 of .* rows \(row 3\)"),
    Corruption("transposed", transpose, "transposed"),
    Corruption("norm nudged", damage(kept, lambda t: t.mul_(1.01)), "outside the adapter's targets"),
    Corruption("norm zeroed", damage(kept, lambda t: t.zero_()), "zeroed"),
    Corruption("coarser dtype on the way", coarse, "coarser arithmetic"),
    Corruption("file cut short", truncate, "not a whole safetensors file"),
    Corruption("tensor missing", drop(first), "is missing"),
    Corruption("tensor too many", extra, "no module loads"),
    Corruption("shard missing", shard_missing, "does not exist"),
    Corruption("total_size counts tensors", total_size_is_a_count, "total_size"),
    Corruption("index points elsewhere", index_points_elsewhere, "the index says"),
    Corruption("index leaves a tensor out", index_leaves_out, "not in the index"),
    Corruption("adapter left in the folder", stale_adapter, "second time"),
    Corruption("stale weights beside", stale_weights, "beside those the model loads"),
    Corruption("stale index beside", stale_index, "beside those the model loads"),
    Corruption("dtype narrowed", narrowed, "stored as|cannot"),
    Corruption("vocabulary cut", vocabulary_cut, "has shape|does not have the shape"),
    Corruption("activation changed", lambda p: p.config(hidden_act="relu"), "hidden_act: is 'relu'"),
    Corruption(
        "eps changed", lambda p: p.config(rms_norm_eps=1e-2, layer_norm_eps=1e-2), "norm_eps: is 0.01"
    ),
    Corruption("fewer heads", fewer_heads, "num_attention_heads|shape"),
    Corruption(
        "quantisation left in config",
        lambda p: p.config(quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}),
        "quantization|cannot load",
        ("lm",),
    ),
    Corruption("config is no JSON", lambda p: (p.folder / "config.json").write_text("{"), "cannot load|JSON"),
    Corruption(
        "rope base changed",
        lambda p: p.config(rope_parameters={"rope_theta": 500.0, "rope_type": "default"}),
        "rope_theta",
        ("lm", "cls"),
    ),
    Corruption("tie dropped", untied, "lm_head.weight: is missing", ("lm",)),
    Corruption("no tokenizer", no_tokenizer, "tokenizer cannot be used|encodes"),
    Corruption("two tokens swapped", swapped_tokens, "encodes .* probes differently"),
    Corruption(
        "two rare tokens swapped", rare_tokens_swapped, r"^vocabulary: .* has the id \d+, expected \d+"
    ),
    Corruption("end token changed", other_pad, "eos_token", ("lm",)),
    Corruption("template missing", no_template, "chat template: is missing", ("lm",)),
    Corruption("template changed", changed_template, "renders .* conversations differently", ("lm",)),
    Corruption("base's template", tokenizer_of_base, "renders .* conversations differently", ("lm",)),
    Corruption("head flipped", head_changed, "score.*: differs from the tensor the adapter brings", ("cls",)),
    Corruption(
        "head of noise", head_of_noise, "score.*: differs from the tensor the adapter brings", ("cls",)
    ),
    Corruption("head missing", drop(lambda p: "score.weight"), "score.weight: is missing", ("cls",)),
    Corruption(
        "modules.json lost",
        lambda p: (p.folder / "modules.json").unlink(),
        "modules.json: is missing",
        ("emb",),
    ),
    Corruption("labels swapped", labels_swapped, "id2label: the labels have changed places", ("cls",)),
    Corruption("config states a narrower dtype", config_narrower, r"^dtype: is \w+, the files hold"),
    Corruption("prompts changed", other_prompts, "prompts is .*, adapter and base have", ("emb",)),
    Corruption(
        "labels miscounted",
        lambda p: p.config(id2label={"0": "a", "1": "b", "2": "c"}, label2id={"a": 0, "b": 1, "c": 2}),
        "num_labels|does not have the shape",
        ("cls",),
    ),
)

EVERYTHING = "MERGE_ADAPTER_TRIAL" in os.environ
"""The whole trial, every corruption in both dtypes; otherwise each model takes turns with the dtypes."""

CASES = [
    pytest.param(corruption, f"{kind}-{dtype}", id=f"{corruption.name}-{kind}-{dtype}")
    for number, corruption in enumerate(CORRUPTIONS)
    for turn, kind in enumerate(corruption.on)
    for place, dtype in enumerate(("bf16", "fp32"))
    if EVERYTHING or (number + turn + place) % 2 == 0
]


PAGE = Path(__file__).parents[2] / "docs" / "equivalence.md"
TABLE = re.compile(r"(?<=<!-- trial -->\n).*?(?=<!-- /trial -->)", re.DOTALL)
"""Where the table of the trial stands in the page."""

KINDS = {"lm": "decoder", "cls": "classifier", "emb": "encoder"}


def models_of(corruption: Corruption) -> str:
    """The trained models that a way of spoiling is tried on, in words."""
    return (
        "all three" if len(corruption.on) == len(KINDS) else ", ".join(KINDS[kind] for kind in corruption.on)
    )


@pytest.fixture(scope="module")
def ledger() -> Iterator[dict[str, str]]:
    """What was said of each way of spoiling first; MERGE_ADAPTER_TRIAL names a page that then gets the table."""
    rows: dict[str, str] = {}
    yield rows
    place = os.environ.get("MERGE_ADAPTER_TRIAL")
    if place:
        lines = ["| spoiled | models | what the gate said |", "|---|---|---|"]
        for corruption in CORRUPTIONS:
            said = shorten(rows[corruption.name], width=130, placeholder=" …").replace("|", "\\|")
            lines.append(f"| {corruption.name} | {models_of(corruption)} | {said} |")
        page = Path(place)
        page.write_text(
            TABLE.sub(lambda _: "\n".join(lines) + "\n", page.read_text(encoding="utf-8")), encoding="utf-8"
        )


@pytest.mark.parametrize(("corruption", "model"), CASES)
def test_a_spoiled_merge_fails_and_is_named(
    corruption: Corruption, model: str, workpiece: Callable[[str], Any], ledger: dict[str, str]
) -> None:
    """Verdict fail, and one reason says what was done."""
    piece = workpiece(model)
    corruption.spoil(piece)
    result = piece.good.judge(piece.folder)
    assert result.verdict is Verdict.FAIL, result.reasons
    said = [reason for reason in result.reasons if re.search(corruption.says, reason.split(" (and ")[0])]
    assert said, result.reasons
    ledger.setdefault(corruption.name, said[0].split(" (and ")[0])


def test_the_page_shows_this_trial() -> None:
    """Every way of spoiling in the table, on these models, with words that this module asks for; and their number."""
    page = PAGE.read_text(encoding="utf-8")
    [table] = TABLE.findall(page)
    rows = [
        [cell.replace("\\|", "|") for cell in re.split(r" (?<!\\)\| ", line.strip("| "))]
        for line in table.splitlines()[2:]
    ]
    assert [row[:2] for row in rows] == [[one.name, models_of(one)] for one in CORRUPTIONS]
    for one, (_, _, said) in zip(CORRUPTIONS, rows, strict=True):
        assert re.search(one.says, said), one.name
    cases = 2 * sum(len(one.on) for one in CORRUPTIONS)
    assert f"in {len(CORRUPTIONS)} ways: {cases} cases" in " ".join(page.split())
