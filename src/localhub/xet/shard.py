"""Shards: which chunk ranges of which xorbs make up which files.

Layout, all little-endian: a header of 48 bytes (32 bytes of tag, version, footer size), then records of 48
bytes. Files first: file hash, flags, number of terms; then that many terms, that many verification
records (flag bit 31) and one SHA-256 record (bit 30). A record whose hash is all ones ends the list. The
same again for xorbs with their chunks.
"""

from __future__ import annotations

import struct
import time
from dataclasses import dataclass

RECORD_BYTES = 48
MAX_SHARD_BYTES = 64 * 1024 * 1024
_HEADER = struct.Struct("<32sQQ")
_RECORD = struct.Struct("<32sIIII")
_FILE = struct.Struct("<32sIIQ")
_FOOTER = struct.Struct("<9Q32s12Q")
_INDEX_SECONDS = 7 * 24 * 3600
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
    records: bytes
    """The records that said so: one for the xorb, one for each chunk."""


@dataclass(frozen=True)
class Shard:
    """What a client uploads."""

    tag: bytes
    """The 32 bytes every shard starts with."""
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
    tag, version, _footer = _HEADER.unpack_from(data)
    if version != 2:
        raise MalformedShardError(f"shard version {version}, expected 2")
    reader = _Reader(data)
    files = []
    while (record := reader.record())[:32] != _LAST:
        files.append(_file(record, reader))
    xorbs = []
    while (record := reader.record())[:32] != _LAST:
        raw, _flags, count, _bytes, _stored = _RECORD.unpack(record)
        chunks = [reader.record() for _ in range(count)]
        hashes = tuple(hash_text(chunk[:32]) for chunk in chunks)
        xorbs.append(ShardXorb(hash_text(raw), hashes, b"".join([record, *chunks])))
    return Shard(tag, tuple(files), tuple(xorbs))


def chunk_index(tag: bytes, records: bytes) -> bytes:
    """A shard without files that tells a client which chunks a xorb holds.

    Unlike an uploaded one it needs a footer: offsets of both lists, no lookup tables, no hash key, and
    the moment until which it may be used.
    """
    files_at = _HEADER.size
    xorbs_at = files_at + RECORD_BYTES
    footer_at = xorbs_at + len(records) + RECORD_BYTES
    last = _LAST + bytes(16)
    offsets = (1, files_at, xorbs_at, footer_at, 0, footer_at, 0, footer_at, 0)
    now = int(time.time())
    footer = _FOOTER.pack(*offsets, bytes(32), now, now + _INDEX_SECONDS, *(0,) * 9, footer_at)
    return _HEADER.pack(tag, 2, len(footer)) + last + records + last + footer


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
