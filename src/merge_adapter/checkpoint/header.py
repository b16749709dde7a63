"""The header of a safetensors file, parsed strictly and made.

The format (https://github.com/huggingface/safetensors#format): eight bytes that hold N as a little-endian
integer, N bytes of JSON, then the data. The JSON maps each tensor to dtype, shape and the range of its data,
and `__metadata__` to a map of strings. Ranges leave no hole and end with the file.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from merge_adapter.errors import MalformedError
from merge_adapter.methods.change import ITEM_BITS, TensorSpec
from merge_adapter.types import Repository

HEADER_LIMIT = 100_000_000
"""Bytes; the limit of the reference implementation."""
_RANK_LIMIT = 32
_ALIGNMENT = 8
_AGAIN = "Download or save the file again."

_POINTER = b"version "
"""How a Git LFS pointer file begins; as a length field it would be beyond any limit."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor and where its data lies."""

    spec: TensorSpec
    offset: int
    """From the start of the file, in bytes."""

    @property
    def end(self) -> int:
        return self.offset + self.spec.nbytes


@dataclass(frozen=True)
class Header:
    """What the header of one file says."""

    tensors: tuple[StoredTensor, ...]
    """In the order of their data."""
    metadata: Mapping[str, str]
    data_start: int
    """Bytes before the data: the length field and the JSON."""

    @property
    def file_bytes(self) -> int:
        return self.tensors[-1].end if self.tensors else self.data_start


def read_header(repository: Repository, path: str) -> Header:
    """Read and check the header of a file, and nothing but the header.

    Raises MalformedError for whatever does not hold, NotFoundError for a file that is not there.
    """
    size = repository.files.get(path)
    length = repository.read(path, offset=0, length=8)
    if size is None:
        size = len(repository.read(path))
    if length == _POINTER:
        raise MalformedError(
            f"{path}: expected weights, got a Git LFS pointer: the text that stands for a file not yet downloaded.",
            hint="Run git lfs pull there, or download the repository with the hf command.",
        )
    if len(length) < 8:
        raise _malformed(path, "a safetensors file begins with 8 bytes", f"{len(length)} bytes in all")
    (count,) = struct.unpack("<Q", length)
    if count > HEADER_LIMIT:
        raise _malformed(path, f"a header of at most {HEADER_LIMIT} bytes", f"a length field of {count}")
    if 8 + count > size:
        raise _malformed(path, f"a header of {count} bytes", f"a file of {size} bytes, so it is truncated")
    return parse_header(repository.read(path, offset=8, length=count), path=path, file_bytes=size)


def parse_header(text: bytes, *, path: str, file_bytes: int) -> Header:
    """Check the JSON part `text` of a file of `file_bytes` bytes; `path` is for messages."""
    data_start = 8 + len(text)
    entries = _entries(text, path)
    metadata = _metadata(entries.pop("__metadata__", {}), path)
    stored = sorted(
        (_stored(name, entry, path, data_start) for name, entry in entries.items()),
        key=lambda tensor: (tensor.offset, tensor.end),
    )
    position = data_start
    for tensor in stored:
        if tensor.offset != position:
            problem = (
                "overlaps the tensor before it" if tensor.offset < position else "leaves a hole before it"
            )
            raise _malformed(
                path,
                f"the data of {tensor.spec.name!r} at byte {position}",
                f"byte {tensor.offset}, which {problem}",
            )
        position = tensor.end
    if position != file_bytes:
        what = "so it is truncated" if file_bytes < position else "so bytes are left over"
        raise _malformed(path, f"{position} bytes by its header", f"a file of {file_bytes} bytes, {what}")
    return Header(tuple(stored), metadata, data_start)


def build_header(specs: Iterable[TensorSpec], metadata: Mapping[str, str]) -> tuple[bytes, Header]:
    """The first bytes of a file that holds these tensors in this order, and the header they stand for."""
    entries: dict[str, Any] = {}
    if metadata:
        entries["__metadata__"] = dict(metadata)
    begin = 0
    ordered = tuple(specs)
    for spec in ordered:
        end = begin + spec.nbytes
        entries[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    data_start = 8 + len(text)
    stored, offset = [], data_start
    for spec in ordered:
        stored.append(StoredTensor(spec, offset))
        offset += spec.nbytes
    return struct.pack("<Q", len(text)) + text, Header(tuple(stored), dict(metadata), data_start)


def _entries(text: bytes, path: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise _malformed(path, "every name once in the header", f"{key!r} twice")
            found[key] = value
        return found

    try:
        entries = json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_constant=_no_constant)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise _malformed(path, "a JSON header", f"{type(error).__name__}: {error}") from error
    if not isinstance(entries, dict):
        raise _malformed(path, "a JSON object as header", f"a JSON {type(entries).__name__}")
    return entries


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _metadata(value: Any, path: str) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise _malformed(path, "__metadata__ to map strings to strings", repr(value)[:200])
    return value


def _stored(name: str, entry: Any, path: str, data_start: int) -> StoredTensor:
    where = f"{path}, tensor {name!r}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _malformed(where, "dtype, shape and data_offsets", repr(entry)[:200])
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BITS:
        raise _malformed(where, f"a dtype among {', '.join(ITEM_BITS)}", repr(dtype)[:80])
    if not _naturals(shape) or len(shape) > _RANK_LIMIT:
        raise _malformed(where, f"a shape of at most {_RANK_LIMIT} whole numbers", repr(shape)[:200])
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _malformed(where, "data_offsets [begin, end] with begin <= end", repr(offsets)[:200])
    if prod(shape) * ITEM_BITS[dtype] % 8:
        raise _malformed(where, "a whole number of bytes", f"shape {shape} in {dtype}")
    spec = TensorSpec(name, dtype, tuple(shape))
    if offsets[1] - offsets[0] != spec.nbytes:
        raise _malformed(
            where, f"{spec.nbytes} bytes for shape {shape} in {dtype}", f"{offsets[1] - offsets[0]} bytes"
        )
    return StoredTensor(spec, data_start + offsets[0])


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _malformed(where: str, expected: str, got: str) -> MalformedError:
    return MalformedError(f"{where}: expected {expected}, got {got}.", hint=_AGAIN)
