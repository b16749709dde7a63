"""Headers of safetensors files: what the reference implementation writes is read, whatever does not hold is refused."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from merge_adapter.checkpoint.folder import Folder
from merge_adapter.checkpoint.header import HEADER_LIMIT, build_header, parse_header, read_header
from merge_adapter.errors import MalformedError
from merge_adapter.methods.change import ITEM_BITS, TensorSpec

GOOD: dict[str, Any] = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
}


def file_of(folder: Path, header: Any, data: int = 32, *, raw: bytes | None = None) -> Folder:
    text = raw if raw is not None else json.dumps(header).encode()
    (folder / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(data))
    return Folder(folder)


def changed(name: str, **entry: Any) -> dict[str, Any]:
    return {**GOOD, name: {**GOOD[name], **entry}}


def test_a_file_of_the_reference_implementation_is_read(tmp_path: Path) -> None:
    """Names, dtypes, shapes, offsets and metadata, in the order of the data."""
    tensors = {
        "w": torch.arange(6.0).reshape(2, 3),
        "h": torch.ones(3, dtype=torch.bfloat16),
        "s": torch.tensor(3),
        "e": torch.empty(0, 4),
        "q": torch.zeros(2, 2).to(torch.float8_e4m3fn),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt", "note": "ü"})
    header = read_header(Folder(tmp_path), "x.safetensors")
    assert header.metadata == {"format": "pt", "note": "ü"}
    assert header.file_bytes == (tmp_path / "x.safetensors").stat().st_size
    found = {stored.spec.name: stored for stored in header.tensors}
    assert {name: spec.spec.shape for name, spec in found.items()} == {
        n: tuple(t.shape) for n, t in tensors.items()
    }
    assert [found[name].spec.dtype for name in "whsq"] == ["F32", "BF16", "I64", "F8_E4M3"]
    content = (tmp_path / "x.safetensors").read_bytes()
    assert content[found["w"].offset : found["w"].end] == tensors["w"].numpy().tobytes()


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (changed("b", data_offsets=[20, 28]), 28, "overlaps"),
        (changed("b", data_offsets=[28, 36]), 36, "hole"),
        (changed("a", data_offsets=[4, 28]), 32, "hole"),
        (GOOD, 31, "truncated"),
        (GOOD, 33, "left over"),
        (changed("a", dtype="F33"), 32, "dtype among"),
        (changed("a", dtype=["F32"]), 32, "dtype among"),
        (changed("a", shape=[2, 4]), 32, "32 bytes for shape"),
        (changed("a", shape=[2, -3]), 32, "whole numbers"),
        (changed("a", shape=[2, 3.0]), 32, "whole numbers"),
        (changed("a", shape=[True, 6]), 32, "whole numbers"),
        (changed("a", shape=[2**62, 2**62]), 32, "bytes for shape"),
        (changed("a", shape=[1] * 40), 32, "at most 32"),
        (changed("a", data_offsets=[24, 0]), 32, "begin <= end"),
        (changed("a", data_offsets=[0]), 32, "begin <= end"),
        (changed("a", extra=1), 32, "dtype, shape and data_offsets"),
        ({**GOOD, "a": 7}, 32, "dtype, shape and data_offsets"),
        ({**GOOD, "__metadata__": {"n": 1}}, 32, "strings to strings"),
        ([1, 2], 32, "JSON object"),
    ],
)
def test_what_does_not_hold_is_refused(tmp_path: Path, header: Any, data: int, message: str) -> None:
    """Each with the file's name, what was expected and what was found."""
    with pytest.raises(MalformedError, match=message) as caught:
        read_header(file_of(tmp_path, header, data), "x.safetensors")
    assert caught.value.message.startswith("x.safetensors")
    assert "expected" in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"\xff\xfe{}", "UnicodeDecodeError"),
        (b"{not json", "JSON"),
        (b"[" * 100_000, "RecursionError"),
        (b'{"a": {"dtype": "U8", "shape": [NaN], "data_offsets": [0, 0]}}', "NaN is not JSON"),
        (b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}, "a": {}}', "'a' twice"),
    ],
)
def test_text_that_is_no_header_is_refused(tmp_path: Path, raw: bytes, message: str) -> None:
    """Broken encodings, nesting bombs, names given twice."""
    with pytest.raises(MalformedError, match=message):
        read_header(file_of(tmp_path, None, 1, raw=raw), "x.safetensors")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes in all"),
        (b"\x01\x02", "2 bytes in all"),
        (struct.pack("<Q", HEADER_LIMIT + 1), "length field"),
        (struct.pack("<Q", 2**63), "length field"),
        (struct.pack("<Q", 100) + b"{}", "truncated"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    ],
)
def test_files_cut_short_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    """A header of a length that is not there is never read."""
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(MalformedError, match=message):
        read_header(Folder(tmp_path), "x.safetensors")


names = st.text(min_size=1, max_size=12).filter(lambda name: name != "__metadata__")
dtypes = st.sampled_from(sorted(code for code, bits in ITEM_BITS.items() if bits % 8 == 0))
shapes = st.lists(st.integers(0, 5), max_size=3)


@settings(max_examples=150, deadline=None)
@given(
    st.dictionaries(names, st.tuples(dtypes, shapes), max_size=6),
    st.dictionaries(names, st.text(max_size=8), max_size=2),
)
def test_built_headers_are_read_back(
    entries: dict[str, tuple[str, list[int]]], metadata: dict[str, str]
) -> None:
    """Whatever names, dtypes and shapes: what was laid out is what is parsed."""
    specs = [TensorSpec(name, dtype, tuple(shape)) for name, (dtype, shape) in entries.items()]
    start, header = build_header(specs, metadata)
    parsed = parse_header(start[8:], path="x", file_bytes=header.file_bytes)
    assert {stored.spec.name: stored for stored in parsed.tensors} == {s.spec.name: s for s in header.tensors}
    assert parsed.metadata == metadata
    assert len(start) == header.data_start
    assert header.data_start % 8 == 0


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60), st.integers(0, 60), st.integers(0, 255))
def test_no_bytes_make_it_fail_otherwise(junk: bytes, position: int, value: int) -> None:
    """Damaged headers are parsed or refused, never anything else; what is accepted fits the file."""
    text = bytearray(json.dumps(GOOD).encode() + junk)
    text[position % len(text)] = value
    try:
        header = parse_header(bytes(text), path="x", file_bytes=8 + len(text) + 32)
    except MalformedError:
        return
    assert header.file_bytes == 8 + len(text) + 32


@pytest.mark.parametrize("entry", [changed("b", data_offsets=[20, 28]), changed("a", dtype="F33")])
def test_the_reference_implementation_refuses_the_same(tmp_path: Path, entry: Any) -> None:
    """We are no stricter than the format on these, and no laxer."""
    file_of(tmp_path, entry, 28)
    with pytest.raises(SafetensorError):
        safe_open(tmp_path / "x.safetensors", framework="pt")
