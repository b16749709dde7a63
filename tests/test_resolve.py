"""From what the user names to pinned sources; what strangers write in a config opens no path here."""

import json
from pathlib import Path
from typing import Any

import pytest

from merge_adapter.errors import (
    BaseModelError,
    InputError,
    MalformedError,
    MergeAdapterError,
    NotFoundError,
    PolicyError,
)
from merge_adapter.hub import Hub
from merge_adapter.resolve import Reference, SourceRequest, parse_reference, resolve


@pytest.fixture
def unreachable() -> Hub:
    """A Hub nobody listens at: a test that reaches for it fails."""
    return Hub(endpoint="http://127.0.0.1:9", token=None)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def make_adapter(folder: Path, **config: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "lora", **config}))
    return folder


def test_a_local_adapter_finds_its_local_base(tmp_path: Path, base: Path, unreachable: Hub) -> None:
    adapter = make_adapter(tmp_path / "adapter", base_model_name_or_path=str(base))
    sources = resolve(SourceRequest((str(adapter),)), hub=unreachable)
    assert sources.adapter.method == "LORA"
    assert sources.base.repository.origin.folder == base
    assert sources.tokenizer is sources.base.repository


def test_the_adapters_own_tokenizer_wins_when_it_is_whole(
    tmp_path: Path, base: Path, unreachable: Hub
) -> None:
    adapter = make_adapter(tmp_path / "adapter", base_model_name_or_path=str(base))
    (adapter / "tokenizer_config.json").write_text("{}")
    sources = resolve(SourceRequest((str(adapter),)), hub=unreachable)
    assert sources.tokenizer is sources.base.repository
    assert any("incomplete tokenizer" in note for note in sources.notes)
    (adapter / "vocab.txt").write_text("a")
    sources = resolve(SourceRequest((str(adapter),)), hub=unreachable)
    assert sources.tokenizer is sources.adapter.repository


def test_a_given_base_overrides_and_the_difference_is_noted(
    tmp_path: Path, base: Path, unreachable: Hub
) -> None:
    adapter = make_adapter(tmp_path / "adapter", base_model_name_or_path="someone/else")
    sources = resolve(SourceRequest((str(adapter),), base_model=str(base)), hub=unreachable)
    assert any("someone/else" in note for note in sources.notes)


def test_the_one_adapter_below_is_taken_and_several_are_not_guessed(
    tmp_path: Path, base: Path, unreachable: Hub
) -> None:
    make_adapter(tmp_path / "run" / "checkpoint-5", base_model_name_or_path=str(base))
    sources = resolve(SourceRequest((str(tmp_path / "run"),)), hub=unreachable)
    assert sources.adapter.repository.origin.subfolder == "checkpoint-5"
    make_adapter(tmp_path / "run" / "the ninth", base_model_name_or_path=str(base))
    with pytest.raises(InputError, match="2 adapters") as caught:
        resolve(SourceRequest((str(tmp_path / "run"),)), hub=unreachable)
    assert "--subfolder 'the ninth'" in caught.value.hint  # as it is typed in a shell
    request = SourceRequest((str(tmp_path / "run"),), subfolder="the ninth")
    assert resolve(request, hub=unreachable).adapter.repository.origin.subfolder == "the ninth"


def test_each_adapter_may_name_its_subfolder(tmp_path: Path, base: Path, unreachable: Hub) -> None:
    run = tmp_path / "run"
    for name in ("checkpoint-5", "checkpoint-9", "a:b"):
        make_adapter(run / name, base_model_name_or_path=str(base))
    request = SourceRequest((f"{run}:checkpoint-5", f"{run}:checkpoint-9/", str(run / "a:b")))
    origins = [one.repository.origin for one in resolve(request, hub=unreachable).adapters]
    assert [origin.subfolder for origin in origins] == ["checkpoint-5", "checkpoint-9", ""]
    assert origins[2].folder == run / "a:b"
    for reference, options, message in (
        (f"{run}:", {}, "no subfolder after its colon"),
        (f"{run}:../run", {}, "not a path inside"),
        (f"{run}:checkpoint-5", {"subfolder": "checkpoint-9"}, "--subfolder says"),
        (f"{run}:checkpoint-7", {}, "does not exist"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            resolve(SourceRequest((reference,), **options), hub=unreachable)
        assert caught.value.hint or "path inside" in message


def old_sentence_transformer(base: Path) -> Path:
    """The layout of sentence-transformers before 2.0: nothing of transformers at the root."""
    (base / "0_Transformer").mkdir()
    (base / "1_Pooling").mkdir()
    for name in ("config.json", "tokenizer.json"):
        (base / name).rename(base / "0_Transformer" / name)
    (base / "1_Pooling" / "config.json").write_text("{}")
    modules = [
        {"idx": 0, "name": "0", "path": "0_Transformer", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ]
    (base / "modules.json").write_text(json.dumps(modules))
    return base


def test_a_transformer_in_a_folder_of_its_own_is_shown_at_the_root(
    tmp_path: Path, base: Path, unreachable: Hub
) -> None:
    adapter = make_adapter(tmp_path / "adapter", base_model_name_or_path=str(old_sentence_transformer(base)))
    sources = resolve(SourceRequest((str(adapter),)), hub=unreachable)
    shown = sources.base.repository
    assert list(shown.files) == ["1_Pooling/config.json", "config.json", "modules.json", "tokenizer.json"]
    assert sources.base.config["model_type"] == "llama"
    assert [module["path"] for module in json.loads(shown.read("modules.json"))] == ["", "1_Pooling"]
    assert shown.files["modules.json"] == len(shown.read("modules.json"))
    folder = shown.folder(shown.files)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"
    assert (folder / "1_Pooling" / "config.json").is_file()
    assert any("sentence-transformers" in note for note in sources.notes)
    assert not (base / "config.json").exists()


@pytest.mark.parametrize(
    "modules", ["[]", "{", '[{"type": "x.Transformer", "path": "../out"}]', '["Transformer"]']
)
def test_modules_that_name_no_transformer_make_no_base(
    modules: str, tmp_path: Path, base: Path, unreachable: Hub
) -> None:
    (old_sentence_transformer(base) / "modules.json").write_text(modules)
    adapter = make_adapter(tmp_path / "adapter", base_model_name_or_path=str(base))
    with pytest.raises(NotFoundError, match=r"no config\.json"):
        resolve(SourceRequest((str(adapter),)), hub=unreachable)


BAD: list[tuple[str, dict[str, Any], type[MergeAdapterError], str]] = [
    ("no base named", {}, InputError, "does not say which base"),
    ("base is empty", {"base_model_name_or_path": ""}, InputError, "does not say which base"),
    ("base is a number", {"base_model_name_or_path": 7}, InputError, "does not say which base"),
    ("base folder missing", {"base_model_name_or_path": "./nowhere"}, NotFoundError, "does not exist"),
    ("base is no name", {"base_model_name_or_path": "a b c"}, InputError, "neither a folder nor a Hub id"),
    ("base climbs", {"base_model_name_or_path": "a/../b"}, InputError, "neither a folder nor a Hub id"),
    ("bad revision", {"base_model_name_or_path": "a/b", "revision": "../x"}, MalformedError, "revision"),
]


@pytest.mark.parametrize(
    ("config", "error", "message"), [case[1:] for case in BAD], ids=[case[0] for case in BAD]
)
def test_a_config_that_names_no_base_is_refused(
    tmp_path: Path, unreachable: Hub, config: dict[str, Any], error: type[MergeAdapterError], message: str
) -> None:
    adapter = make_adapter(tmp_path / "adapter", **config)
    with pytest.raises(error, match=message):
        resolve(SourceRequest((str(adapter),)), hub=unreachable)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"a": ' * 100_000, "null", "\xff"])
def test_an_unreadable_config_is_malformed(tmp_path: Path, unreachable: Hub, content: str) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(MalformedError):
        resolve(SourceRequest((str(adapter),)), hub=unreachable)


def test_a_folder_without_an_adapter_is_told_apart_from_a_whole_model(base: Path, unreachable: Hub) -> None:
    with pytest.raises(NotFoundError, match="a whole model"):
        resolve(SourceRequest((str(base),)), hub=unreachable)


def test_a_base_that_is_an_adapter_is_refused(tmp_path: Path, unreachable: Hub) -> None:
    first = make_adapter(tmp_path / "first", base_model_name_or_path="a/b")
    second = make_adapter(tmp_path / "second", base_model_name_or_path=str(first))
    with pytest.raises(BaseModelError, match="itself an adapter"):
        resolve(SourceRequest((str(second),)), hub=unreachable)


def test_strangers_cannot_name_folders(tmp_path: Path, base: Path, unreachable: Hub) -> None:
    adapter = make_adapter(tmp_path / "adapter", base_model_name_or_path=str(base))
    with pytest.raises(PolicyError):
        resolve(SourceRequest((str(adapter),), local_paths=False), hub=unreachable)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("gpt2", Reference("gpt2")),
        ("owner/name", Reference("owner/name")),
        ("owner/name@main", Reference("owner/name", "main")),
        ("owner/name@refs/pr/3", Reference("owner/name", "refs/pr/3")),
    ],
)
def test_hub_ids_are_read(text: str, expected: Reference) -> None:
    assert parse_reference(text, what="adapter") == expected


@pytest.mark.parametrize("text", ["", "a/b/c", "a b", "a/b@", "a/b@../x", "-a/b", "a/b@x y", "a/\n"])
def test_text_that_is_no_reference_is_refused(text: str) -> None:
    with pytest.raises(InputError):
        parse_reference(text, what="adapter")


@pytest.mark.parametrize(
    "text", ["~nobody-of-that-name/x", "x" * 5000, "/" + "x" * 300, "x\0y", "x" * 5000 + ":y"]
)
def test_text_that_can_be_no_path_is_refused_wherever_it_stands(
    text: str, tmp_path: Path, base: Path, unreachable: Hub
) -> None:
    """As the adapter, as the base, and in a config, which strangers write."""
    adapter = make_adapter(tmp_path / "adapter", base_model_name_or_path=text)
    for request in (
        SourceRequest((text,)),
        SourceRequest((str(adapter),), base_model=text),
        SourceRequest((str(adapter),)),
    ):
        with pytest.raises(InputError):
            resolve(request, hub=unreachable)
