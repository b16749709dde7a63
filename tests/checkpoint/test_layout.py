"""Which files hold the weights: indexes, single files, pickles, and what makes each of them refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from merge_adapter.checkpoint.folder import Folder
from merge_adapter.checkpoint.layout import find_layout
from merge_adapter.checkpoint.reader import StoredWeights
from merge_adapter.errors import MalformedError, NotFoundError

A, B = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


def shards(folder: Path, **index: Any) -> Folder:
    save_file({"a": torch.ones(2, 3), "b": torch.zeros(3)}, folder / A, metadata={"format": "pt"})
    save_file({"c": torch.ones(4)}, folder / B, metadata={"format": "pt"})
    content = {"metadata": {"total_size": 52}, "weight_map": {"a": A, "b": A, "c": B}, **index}
    (folder / INDEX).write_text(json.dumps(content))
    return Folder(folder)


def test_shards_are_found_through_their_index(tmp_path: Path) -> None:
    """Tensors in the order of the files, each with its file."""
    layout = find_layout(shards(tmp_path))
    assert list(layout.specs) == ["a", "b", "c"]
    assert layout.home["c"].path == B
    assert layout.index == INDEX


def test_a_single_file_wins_over_shards(tmp_path: Path) -> None:
    """As transformers chooses."""
    shards(tmp_path)
    save_file({"z": torch.ones(1)}, tmp_path / "model.safetensors")
    assert list(find_layout(Folder(tmp_path)).specs) == ["z"]


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": A, "b": A, "c": "../c.safetensors"}, "a file beside the index"),
        ({"a": A, "b": A, "c": "/etc/passwd"}, "a file beside the index"),
        ({"a": A, "b": A, "c": "x\\y"}, "a file beside the index"),
        ({"a": A, "b": A, "c": 7}, "a file beside the index"),
        ({"a": A, "b": A, "c": A}, "every tensor it lists|'c' in"),
        ({"a": A, "b": B, "c": B}, "'b' in"),
        ({"a": A, "b": A, "c": B, "d": B}, "every tensor it lists"),
        ({"a": A, "c": B}, "none for 1: b"),
        ({}, "weight_map"),
        ([], "weight_map"),
    ],
)
def test_an_index_that_lies_is_refused(tmp_path: Path, weight_map: Any, message: str) -> None:
    """Paths stay inside; the map is complete and true."""
    with pytest.raises(MalformedError, match=message):
        find_layout(shards(tmp_path, weight_map=weight_map))


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    """Which of them counts would depend on the reader."""
    folder = shards(tmp_path)
    save_file({"c": torch.ones(4), "a": torch.zeros(2, 3)}, tmp_path / B)
    with pytest.raises(MalformedError, match="'a' in one file"):
        find_layout(folder)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    """Before anything is read."""
    shards(tmp_path)
    (tmp_path / B).unlink()
    with pytest.raises(NotFoundError, match=B):
        find_layout(Folder(tmp_path))


def test_no_weights_at_all_is_said_with_what_is_there(tmp_path: Path) -> None:
    """The message lists what was expected and found."""
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(NotFoundError, match=r"expected model\.safetensors.*found notes\.txt"):
        find_layout(Folder(tmp_path))


class Evil:
    """A pickle that runs a command when it is loaded."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch /tmp/merge-adapter-was-here",)


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    """`weights_only=True`, whatever the file wants."""
    torch.save({"a": Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(MalformedError, match=r"weights_only=True.*wants to call \S+ while loading"):
        find_layout(Folder(tmp_path))
    assert not Path("/tmp/merge-adapter-was-here").exists()


@pytest.mark.parametrize("content", [b"", b"garbage" * 100, b"PK\x03\x04broken"])
def test_a_pickle_that_is_none_is_malformed(tmp_path: Path, content: bytes) -> None:
    """Empty, random and half-zipped files."""
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(MalformedError, match=r"pytorch_model\.bin"):
        find_layout(Folder(tmp_path))


@pytest.mark.parametrize("value", [torch.ones(2), ["a"], {"a": 1}, {1: torch.ones(1)}])
def test_a_pickle_of_something_else_is_malformed(tmp_path: Path, value: Any) -> None:
    """Only a mapping from names to tensors is weights."""
    torch.save(value, tmp_path / "pytorch_model.bin")
    with pytest.raises(MalformedError, match="mapping from names to tensors"):
        find_layout(Folder(tmp_path))


@pytest.mark.parametrize("old_format", [True, False])
def test_pickled_weights_are_read(tmp_path: Path, *, old_format: bool) -> None:
    """Both formats of torch.save; views and shared storage come out as plain tensors."""
    whole = torch.arange(12.0).reshape(3, 4)
    tensors = {"w": whole, "view": whole.T, "s": torch.tensor(2.0), "h": torch.ones(3).bfloat16()}
    torch.save(tensors, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=not old_format)
    folder = Folder(tmp_path)
    with StoredWeights(folder, find_layout(folder)) as weights:
        for name, tensor in tensors.items():
            assert torch.equal(weights.read(name), tensor)
        assert torch.equal(weights.read_rows("view", 1, 3), whole.T[1:3])


def test_rows_are_read_where_they_are(tmp_path: Path) -> None:
    """Any rows of any dtype, and nothing else of the file."""
    tensors = {
        "w": torch.arange(40.0).reshape(10, 4),
        "b": torch.arange(10) % 2 == 0,
        "h": torch.randn(6, 2, 3).bfloat16(),
        "s": torch.tensor(5),
        "e": torch.empty(0, 3),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    folder = Folder(tmp_path)
    with StoredWeights(folder, find_layout(folder)) as weights:
        assert torch.equal(weights.read_rows("w", 3, 7), tensors["w"][3:7])
        assert weights.bytes_read == 4 * 16
        for name, tensor in tensors.items():
            assert torch.equal(weights.read(name), tensor)


def test_a_file_cut_while_it_is_read_is_malformed(tmp_path: Path) -> None:
    """The header was whole, the data no longer is."""
    save_file({"w": torch.ones(100, 4)}, tmp_path / "model.safetensors")
    folder = Folder(tmp_path)
    with StoredWeights(folder, find_layout(folder)) as weights:
        os.truncate(tmp_path / "model.safetensors", 400)
        with pytest.raises(MalformedError, match="cut while being read"):
            weights.read("w")


def test_a_folder_stays_inside_itself(tmp_path: Path) -> None:
    """Files are listed, anything else is not found, and subfolders cannot lead out."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x.txt").write_text("hello")
    (tmp_path / "secret").write_text("no")
    folder = Folder(tmp_path, "in")
    assert dict(folder.files) == {"x.txt": 5}
    assert folder.read("x.txt", offset=1, length=3) == b"ell"
    for path in ("../secret", "y.txt", "/etc/passwd"):
        with pytest.raises(NotFoundError):
            folder.read(path)
    for inner in ("..", "/etc", "in/../.."):
        with pytest.raises(NotFoundError):
            Folder(tmp_path, inner)
    with pytest.raises(NotFoundError, match="does not exist"):
        Folder(tmp_path / "nowhere")
