"""Which files are large: the `.gitattributes` of a new repository and the rule that reads it."""

from __future__ import annotations

import fnmatch

REGULAR_LIMIT = 10 * 1024 * 1024
"""Bytes from which any file is stored as a large one."""

_PATTERNS = """
    *.7z *.arrow *.bin *.bz2 *.ckpt *.ftz *.gz *.h5 *.joblib *.lfs.* *.mlmodel *.model *.msgpack *.npy *.npz
    *.onnx *.ot *.parquet *.pb *.pickle *.pkl *.pt *.pth *.rar *.safetensors saved_model/**/* *.tar.* *.tar
    *.tflite *.tgz *.wasm *.xz *.zip *.zst *tfevents*
"""

DEFAULT_ATTRIBUTES = "".join(
    f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in _PATTERNS.split()
)


def large_patterns(attributes: str) -> tuple[str, ...]:
    """The patterns a `.gitattributes` sends to large storage, in order."""
    patterns = []
    for line in attributes.splitlines():
        fields = line.split()
        if len(fields) > 1 and not line.startswith("#") and "filter=lfs" in fields[1:]:
            patterns.append(fields[0])
    return tuple(patterns)


def matches(path: str, patterns: tuple[str, ...]) -> bool:
    """Whether one of the patterns names the path; a pattern without a slash is matched by the file's name."""
    name = path.rpartition("/")[2]
    return any(
        fnmatch.fnmatchcase(path, pattern.replace("**/*", "*"))
        if "/" in pattern
        else fnmatch.fnmatchcase(name, pattern)
        for pattern in patterns
    )


def is_binary(sample: bytes) -> bool:
    """Whether the first bytes of a file (up to 512) are not text."""
    if b"\x00" in sample:
        return True
    try:
        sample.decode("utf-8")
    except UnicodeDecodeError as error:
        # A character may be cut at the end of the sample.
        return error.start < len(sample) - 3
    return False


def upload_mode(path: str, size: int, sample: bytes, patterns: tuple[str, ...]) -> str:
    """`lfs` or `regular`, as preupload answers."""
    large = matches(path, patterns) or size >= REGULAR_LIMIT or is_binary(sample)
    return "lfs" if large else "regular"
