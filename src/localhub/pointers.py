"""Git LFS pointers: what git holds in place of a large file. Format: git-lfs specification, version 1."""

from __future__ import annotations

import re
from dataclasses import dataclass

MAX_POINTER_BYTES = 1024
_POINTER = re.compile(
    rb"version https://git-lfs\.github\.com/spec/v1\noid sha256:([0-9a-f]{64})\nsize (\d{1,19})\n"
)


@dataclass(frozen=True)
class Pointer:
    """A large file by its content."""

    sha256: str
    size: int
    """Bytes of the file itself."""

    def encode(self) -> bytes:
        """The pointer file."""
        return (
            f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n"
        ).encode()


def parse_pointer(blob: bytes) -> Pointer | None:
    """The pointer in a blob, None when the blob is an ordinary file."""
    if len(blob) > MAX_POINTER_BYTES:
        return None
    match = _POINTER.fullmatch(blob)
    return Pointer(match[1].decode(), int(match[2])) if match else None
