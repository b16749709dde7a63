"""Xorbs: up to 64 MiB of compressed chunks, one after another, each behind a header of 8 bytes.

Header: version (0), 3 bytes compressed length, scheme, 3 bytes raw length, little-endian.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import lz4.frame

HEADER_BYTES = 8
MAX_XORB_BYTES = 72 * 1024 * 1024
"""64 MiB of chunks, with room for headers and a footer."""
MAX_CHUNK_BYTES = 16 * 1024 * 1024
FOOTER_IDENT = b"XETBLOB"


class MalformedXorbError(ValueError):
    """Bytes that are no xorb."""


class Scheme(IntEnum):
    """How a chunk is compressed."""

    NONE = 0
    LZ4 = 1
    BYTE_GROUPED_LZ4 = 2


@dataclass(frozen=True)
class Chunk:
    """Where a chunk lies in its xorb."""

    offset: int
    """Of its header, in bytes."""
    stored: int
    """Compressed bytes, without the header."""
    scheme: Scheme
    length: int
    """Raw bytes."""

    @property
    def end(self) -> int:
        """Offset of the byte after it."""
        return self.offset + HEADER_BYTES + self.stored


def parse(data: bytes) -> tuple[Chunk, ...]:
    """The chunks of a xorb, with or without a footer.

    Raises:
        MalformedXorbError: it is cut short or holds something else.
    """
    chunks: list[Chunk] = []
    offset = 0
    while offset < len(data) and data[offset : offset + 7] != FOOTER_IDENT:
        header = data[offset : offset + HEADER_BYTES]
        if len(header) < HEADER_BYTES or header[0] != 0 or header[4] > max(Scheme):
            raise MalformedXorbError(f"no chunk header at byte {offset} of {len(data)}")
        stored = int.from_bytes(header[1:4], "little")
        length = int.from_bytes(header[5:8], "little")
        chunk = Chunk(offset, stored, Scheme(header[4]), length)
        if chunk.end > len(data) or length > MAX_CHUNK_BYTES:
            raise MalformedXorbError(f"chunk {len(chunks)} runs past the end ({chunk.end} > {len(data)})")
        chunks.append(chunk)
        offset = chunk.end
    if not chunks:
        raise MalformedXorbError("no chunks")
    return tuple(chunks)


def unpack(stored: bytes, scheme: Scheme, length: int) -> bytes:
    """The raw bytes of one chunk.

    Raises:
        MalformedXorbError: it does not decompress to `length` bytes.
    """
    if scheme is Scheme.NONE:
        raw = stored
    else:
        try:
            raw = lz4.frame.decompress(stored)
        except RuntimeError as error:
            raise MalformedXorbError(f"chunk does not decompress: {error}") from error
        if scheme is Scheme.BYTE_GROUPED_LZ4:
            raw = _ungroup(raw)
    if len(raw) != length:
        raise MalformedXorbError(f"chunk has {len(raw)} bytes, its header says {length}")
    return raw


def _ungroup(grouped: bytes) -> bytes:
    """Undo the grouping by position modulo 4: all bytes 0, then all bytes 1, 2, 3."""
    out = bytearray(len(grouped))
    start = 0
    for lane in range(4):
        size = (len(grouped) - lane + 3) // 4
        out[lane::4] = grouped[start : start + size]
        start += size
    return bytes(out)
