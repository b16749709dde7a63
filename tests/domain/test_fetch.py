"""Data sets that an adapter's card names, read from a running Hub as nobody, up to the gate's report."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi

from localhub.process import LocalHub
from merge_adapter.checkpoint.folder import Folder
from merge_adapter.domain import DOCUMENTS, fetch_domain, with_domain
from merge_adapter.hub import Hub
from merge_adapter.pipeline import MergeRequest, merge_to_folder
from merge_adapter.resolve import SourceRequest
from merge_adapter.types import Adapter, BaseModel, Resolved, Silent, Verdict
from merge_adapter.verify import VerifySettings

SECRET = "The secret of the data set stands here."
ROWS = [{"text": f"{SECRET} Number {number} of many."} for number in range(40)]


@pytest.fixture
def ours(hub: LocalHub, tokens: dict[str, str]) -> Hub:
    """The Hub as the user who may read everything here."""
    return Hub(hub.url, tokens["ada"])


@pytest.fixture
def push(ours: Hub, request: pytest.FixtureRequest) -> Callable[..., tuple[str, str]]:
    """`push("name", {path: content}, private=False, gated=False)`: a data set's id and commit."""

    def make(
        name: str, files: dict[str, bytes], *, private: bool = False, gated: bool = False
    ) -> tuple[str, str]:
        api: HfApi = ours.api
        repo_id = f"ada/{request.node.name[:40].partition('[')[0]}-{name}"
        api.create_repo(repo_id, repo_type="dataset", private=private)
        for path, content in files.items():
            api.upload_file(path_or_fileobj=content, path_in_repo=path, repo_id=repo_id, repo_type="dataset")
        if gated:
            api.update_repo_settings(repo_id, repo_type="dataset", gated="auto")
        return repo_id, str(api.dataset_info(repo_id).sha)

    return make


def lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.fixture
def adapter(copy_of: Callable[..., Path], lm_adapter: Path) -> Callable[..., Path]:
    """`adapter("owner/data", …)`: a copy of the trained adapter whose card names these data sets."""

    def make(*named: str) -> Path:
        folder = copy_of(lm_adapter, "adapter")
        (folder / "README.md").write_text(f"---\ndatasets: {json.dumps(list(named))}\n---\n# An adapter\n")
        return folder

    return make


def sources(folder: Path, base: Path) -> Resolved:
    config = json.loads((folder / "adapter_config.json").read_text())
    model = BaseModel(Folder(base), json.loads((base / "config.json").read_text()))
    return Resolved((Adapter(Folder(folder), config, "LORA"),), model, Folder(folder))


def test_a_merge_asks_about_the_adapters_domain_and_shows_none_of_it(
    push: Any, adapter: Callable[..., Path], lm_base: Path, ours: Hub, tmp_path: Path
) -> None:
    """The documents are among the probes, their commit in the report, their text nowhere."""
    data, sha = push("data", {"train.jsonl": lines(ROWS)})
    request = MergeRequest(
        SourceRequest((str(adapter(data)),), base_model=str(lm_base)),
        gate=VerifySettings(probe_tokens=256, greedy_tokens=4, isolated=False),
    )
    merged = merge_to_folder(request, tmp_path / "out", hub=ours, progress=Silent())
    assert merged.verification.verdict is Verdict.PASS, merged.verification.reasons
    [entry] = merged.report["verification"]["probes"]["datasets"]
    assert (entry["id"], entry["revision"], entry["file"]) == (data, sha, "train.jsonl")
    assert entry["documents"] == DOCUMENTS
    asked = [row["name"] for row in merged.report["verification"]["outputs"]["per_document"]]
    assert f"{data} 1" in asked
    assert any(f"{DOCUMENTS} documents of it" in reason for reason in merged.verification.reasons)
    for file in merged.folder.iterdir():
        assert SECRET.encode() not in file.read_bytes(), file.name


def test_it_is_not_shown_either_where_models_continue_the_first_tokens_of_documents(
    push: Any,
    adapter: Callable[..., Path],
    lm_base: Path,
    ours: Hub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As they do where no sentence is short enough: here, none may be."""
    monkeypatch.setattr("merge_adapter.verify.probes.beginnings.LONGEST", 0)
    data, _ = push("data", {"train.jsonl": lines(ROWS)})
    request = MergeRequest(
        SourceRequest((str(adapter(data)),), base_model=str(lm_base)),
        gate=VerifySettings(probe_tokens=256, greedy_tokens=4, isolated=False),
    )
    merged = merge_to_folder(request, tmp_path / "out", hub=ours, progress=Silent())
    verification = merged.report["verification"]
    assert f"{data} 1" in [row["name"] for row in verification["outputs"]["per_document"]]
    prompts = [row["prompt"] for row in verification["greedy"]["texts"]]
    assert prompts
    assert not any("secret" in prompt for prompt in prompts)
    for file in merged.folder.iterdir():
        assert SECRET.encode()[:20] not in file.read_bytes(), file.name


def test_what_is_not_public_is_not_read_though_our_token_could(
    push: Any, adapter: Callable[..., Path], lm_base: Path, ours: Hub
) -> None:
    """A card is a stranger's text: it cannot make our token read private or gated data into a public report."""
    private, _ = push("private", {"train.jsonl": lines(ROWS)}, private=True)
    gated, _ = push("gated", {"train.jsonl": lines(ROWS)}, gated=True)
    assert ours.open_dataset(private).files
    found = fetch_domain(sources(adapter(private, gated, "nobody/nothing"), lm_base), hub=ours)
    assert [dataset.problem for dataset in found] == [
        "it is not public, or not there",
        "its readers must ask for access",
        "it is not public, or not there",
    ]
    assert not any(dataset.probes or dataset.bytes_read for dataset in found)


def test_files_that_cannot_be_read_are_passed_over_or_told(
    push: Any, adapter: Callable[..., Path], lm_base: Path, ours: Hub
) -> None:
    """A broken file gives way to the next; a data set of code alone gives nothing, and nothing of it is run."""
    mixed, sha = push(
        "mixed", {"train.json": b"{broken", "more.csv": b"id,review\n1,A film of some length.\n"}
    )
    code, other = push("code", {"code.py": b"raise SystemExit('run')", "sound.wav": b"RIFF"})
    first, second = fetch_domain(sources(adapter(mixed, code), lm_base), hub=ours)
    assert (first.file, first.text, first.revision) == ("more.csv", "longest text", sha)
    assert [probe.text for probe in first.probes] == ["A film of some length."]
    assert (second.revision, second.problem) == (other, "none of its files is of a kind that is read")


def test_several_data_sets_share_the_documents(
    push: Any, adapter: Callable[..., Path], lm_base: Path, ours: Hub
) -> None:
    """Three at most, each with its part; what is no name of a data set is passed over."""
    names = [push(f"d{number}", {"train.jsonl": lines(ROWS)})[0] for number in range(4)]
    found = fetch_domain(sources(adapter("../etc", *names), lm_base), hub=ours)
    assert [dataset.id for dataset in found] == names[:3]
    assert [len(dataset.probes) for dataset in found] == [DOCUMENTS // 3] * 3


def test_the_same_commit_gives_the_same_documents(
    push: Any, adapter: Callable[..., Path], lm_base: Path, ours: Hub
) -> None:
    data, _ = push("data", {"train.jsonl": lines(ROWS)})
    given = sources(adapter(data), lm_base)
    assert fetch_domain(given, hub=ours) == fetch_domain(given, hub=ours)


def test_a_hub_that_does_not_answer_is_told_once_and_is_no_error(
    adapter: Callable[..., Path], lm_base: Path, unused_port: int
) -> None:
    """Two data sets, one look; the merge goes on without them."""
    hub = Hub(f"http://127.0.0.1:{unused_port}")
    first, second = fetch_domain(sources(adapter("a/b", "c/d"), lm_base), hub=hub)
    assert first.problem == second.problem
    assert str(unused_port) in first.problem


@pytest.fixture
def unused_port() -> Any:
    """A port that nobody listens on, kept from others while the test runs."""
    import socket

    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


@pytest.mark.parametrize(
    "changes",
    [{"dataset_probes": False}, {"outputs": False}, {"probes": Path("own.txt")}],
    ids=["told not to", "no outputs", "own probes"],
)
def test_nothing_is_asked_of_the_hub_where_it_is_not_wanted(
    changes: dict[str, Any], adapter: Callable[..., Path], lm_base: Path, unused_port: int
) -> None:
    """The Hub here does not answer, and nobody notices."""
    gate = replace(VerifySettings(), **changes)
    hub = Hub(f"http://127.0.0.1:{unused_port}")
    assert with_domain(gate, sources(adapter("a/b"), lm_base), hub=hub, progress=Silent()) is gate
