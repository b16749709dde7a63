"""Configs and other small files of untrusted repositories, read with a limit."""

from __future__ import annotations

import json
from typing import Any

from merge_adapter.errors import MalformedError
from merge_adapter.types import Repository

_LIMIT = 16 << 20
"""Bytes of a config read at most. Tokenizer configs with thousands of added tokens reach 1 MB."""


def read_limited(repository: Repository, path: str) -> bytes:
    """The content of a small file; MalformedError when it is larger than any honest one."""
    size = repository.files.get(path, 0)
    if size > _LIMIT:
        raise MalformedError(
            f"{path} of {repository.origin} has {size} bytes; such a file is read up to {_LIMIT}"
        )
    return repository.read(path)


def read_json(repository: Repository, path: str) -> Any:
    """The parsed content of `path`. MalformedError when it is no JSON or too large."""
    return _parsed(read_limited(repository, path), repository, path)


def check_json(repository: Repository, path: str) -> None:
    """Raise MalformedError when the file `path`, of any size, is no JSON. Vocabularies reach some 30 MB."""
    _parsed(repository.local(path).read_bytes(), repository, path)


def _parsed(content: bytes, repository: Repository, path: str) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise MalformedError(
            f"{path} of {repository.origin} is not readable JSON: {error}",
            hint="Fix the file in its repository, or remove it there if nothing needs it.",
        ) from error


def read_object(repository: Repository, path: str) -> dict[str, Any]:
    """The JSON object in `path`; MalformedError when it holds anything else."""
    parsed = read_json(repository, path)
    if not isinstance(parsed, dict):
        raise MalformedError(
            f"{path} of {repository.origin} holds a {type(parsed).__name__}, expected an object"
        )
    return parsed
