"""Shards: which chunk ranges of which xorbs make up which files.

Layout, all little-endian: a header of 48 bytes (32 bytes of tag, version, footer size), then records of 48
bytes. Files first: file hash, flags, number of terms; then that many terms, that many verification
records (flag bit 31) and one SHA-256 record (bit 30). A record whose hash is all ones ends the list. The
same again for xorbs with their chunks.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

RECORD_BYTES = 48
MAX_SHARD_BYTES = 64 * 1024 * 1024
_HEADER = struct.Struct("<32sQQ")
_RECORD = struct.Struct("<32sIIII")
_FILE = struct.Struct("<32sIIQ")
_LAST = b"\xff" * 32
_VERIFICATION = 1 << 31
_SHA256 = 1 << 30


class MalformedShardError(ValueError):
    """Bytes that are no shard."""


@dataclass(frozen=True)
class Term:
    """A run of chunks that makes up part of a file."""

    xorb: str
    """64 hex digits."""
    length: int
    """Raw bytes."""
    start: int
    """First chunk."""
    end: int
    """Chunk after the last."""


@dataclass(frozen=True)
class ShardFile:
    """One file of a shard."""

    hash: str
    terms: tuple[Term, ...]
    sha256: str | None


@dataclass(frozen=True)
class ShardXorb:
    """One xorb of a shard, with the hashes of its chunks in order."""

    hash: str
    chunks: tuple[str, ...]


@dataclass(frozen=True)
class Shard:
    files: tuple[ShardFile, ...]
    xorbs: tuple[ShardXorb, ...]


def hash_text(raw: bytes) -> str:
    """How xet prints a hash: four little-endian 64-bit numbers, 16 hex digits each."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", raw))


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self._offset = _HEADER.size

    def record(self) -> bytes:
        record = self._data[self._offset : self._offset + RECORD_BYTES]
        if len(record) < RECORD_BYTES:
            raise MalformedShardError(f"cut short at byte {self._offset} of {len(self._data)}")
        self._offset += RECORD_BYTES
        return record


def parse(data: bytes) -> Shard:
    """Read a shard as a client uploads it.

    Raises:
        MalformedShardError: too short, or of another version.
    """
    if len(data) < _HEADER.size:
        raise MalformedShardError(f"{len(data)} bytes are no shard")
    _tag, version, _footer = _HEADER.unpack_from(data)
    if version != 2:
        raise MalformedShardError(f"shard version {version}, expected 2")
    reader = _Reader(data)
    files = []
    while (record := reader.record())[:32] != _LAST:
        files.append(_file(record, reader))
    xorbs = []
    while (record := reader.record())[:32] != _LAST:
        raw, _flags, count, _bytes, _stored = _RECORD.unpack(record)
        chunks = tuple(hash_text(reader.record()[:32]) for _ in range(count))
        xorbs.append(ShardXorb(hash_text(raw), chunks))
    return Shard(tuple(files), tuple(xorbs))


def _file(record: bytes, reader: _Reader) -> ShardFile:
    raw, flags, count, _unused = _FILE.unpack(record)
    terms = []
    for _ in range(count):
        xorb, _flags, length, start, end = _RECORD.unpack(reader.record())
        terms.append(Term(hash_text(xorb), length, start, end))
    if flags & _VERIFICATION:
        for _ in range(count):
            reader.record()
    sha256 = hash_text(reader.record()[:32]) if flags & _SHA256 else None
    return ShardFile(hash_text(raw), tuple(terms), sha256)
