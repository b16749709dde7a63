"""What lies on the Hub against what was sent: every way in which it can be less."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from merge_adapter.checkpoint.folder import Folder
from merge_adapter.errors import HubError
from merge_adapter.publish.whole import check_header, check_remote, differences, read_remote_report


def listed(files: dict[str, bytes]) -> dict[str, tuple[int, str]]:
    return {path: (len(content), hashlib.sha256(content).hexdigest()) for path, content in files.items()}


@pytest.fixture
def files() -> dict[str, bytes]:
    return {"config.json": b'{"model_type": "llama"}', "model.safetensors": tensors(b"\x00" * 64)}


def tensors(body: bytes, *, end: int | None = None) -> bytes:
    entry = {"dtype": "U8", "shape": [len(body)], "data_offsets": [0, len(body) if end is None else end]}
    header = json.dumps({"weight": entry}).encode()
    return len(header).to_bytes(8, "little") + header + body


def test_equal_files_are_whole(world, files: dict[str, bytes]) -> None:
    """Large ones by the hash the Hub keeps, small ones by content."""
    repo_id = world.name("ann")
    world.repository(repo_id, files)
    check_remote(world.hub().open(repo_id), listed(files))


@pytest.mark.parametrize(
    ("path", "content", "problem"),
    [
        ("config.json", b'{"model_type": "bert "}', "other content"),
        ("config.json", b"{}", "has 2 bytes"),
        ("model.safetensors", tensors(b"\x01" * 64), "other content"),
        ("model.safetensors", b"cut", "has 3 bytes"),
    ],
)
def test_a_file_that_differs_is_found(
    world, files: dict[str, bytes], path: str, content: bytes, problem: str
) -> None:
    """And told by its name."""
    repo_id = world.name("ann")
    world.repository(repo_id, {**files, path: content})
    (found,) = differences(world.hub().open(repo_id), listed(files))
    assert found.startswith(path)
    assert problem in found


def test_a_file_that_is_missing_is_found(world, files: dict[str, bytes]) -> None:
    """An error that says nothing was offered as ready."""
    repo_id = world.name("ann")
    world.repository(repo_id, {"config.json": files["config.json"]})
    with pytest.raises(HubError, match=r"model\.safetensors is missing") as caught:
        check_remote(world.hub().open(repo_id), listed(files))
    assert "Nothing was offered" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", b"not JSON"),
        ("config.json", b'{"model_type": "llama", "num_attention_heads": "many"}'),
    ],
)
def test_what_cannot_be_loaded_is_not_ready(
    world, files: dict[str, bytes], name: str, content: bytes
) -> None:
    """Equal bytes are not enough: the download is loaded as a user would."""
    broken = {**files, name: content}
    repo_id = world.name("ann")
    world.repository(repo_id, broken)
    with pytest.raises(HubError, match="does not load"):
        check_remote(world.hub().open(repo_id), listed(broken))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (tensors(b"\x00" * 64)[:-1], "end at byte"),
        (tensors(b"\x00" * 64, end=65), "end at byte"),
        (b"\xff" * 16, "longer than the file"),
        ((9).to_bytes(8, "little") + b"not JSON!", "cannot be read"),
        ((2).to_bytes(8, "little") + b"[]", "cannot be read"),
        (b"", "longer than the file"),
    ],
)
def test_a_broken_header_is_found(tmp_path: Path, content: bytes, problem: str) -> None:
    """Truncated, overlong, not JSON, not a table."""
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(HubError, match=problem):
        check_header(Folder(tmp_path), "model.safetensors")


@pytest.mark.parametrize(
    "content", [b"{}", b"not JSON", b"[" * 100_000, b"\xff\xfe\x00", b'{"schema": 1}', b""]
)
def test_a_report_that_is_not_one_is_no_evidence(world, content: bytes) -> None:
    """Anybody can put a file of that name into a repository."""
    repo_id = world.name("ann")
    world.repository(repo_id, {"merge_report.json": content})
    assert read_remote_report(world.hub().open(repo_id)) is None
