"""The texts that every verification puts to the models.

`v1.jsonl` is written for this purpose and belongs to the package (Apache-2.0): several languages, code, mathematics,
tables and conversations. A changed set gets a new number, so that figures of one version can be compared.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from merge_adapter.errors import MalformedError, NotFoundError

VERSION = "v1"


@dataclass(frozen=True)
class Probe:
    """One document: a text, or a conversation."""

    name: str
    text: str = ""
    messages: tuple[Mapping[str, str], ...] = ()

    def plain(self) -> str:
        """The document as text; a conversation without a template reads as lines of `role: content`."""
        if self.messages:
            return "\n".join(f"{turn['role']}: {turn['content']}" for turn in self.messages)
        return self.text


def shipped() -> tuple[Probe, ...]:
    """The probes of this version, in a fixed order that mixes their kinds."""
    lines = resources.files(__package__).joinpath(f"{VERSION}.jsonl").read_text(encoding="utf-8").splitlines()
    probes = [
        _from_line(json.loads(line), number, f"{VERSION}.jsonl") for number, line in enumerate(lines, 1)
    ]
    # a stride that shares no factor with the count: a short run still sees languages, code, mathematics and chat
    stride = next(step for step in range(7, 7 + len(probes)) if _coprime(step, len(probes)))
    return tuple(probes[(at * stride) % len(probes)] for at in range(len(probes)))


def _coprime(left: int, right: int) -> bool:
    while right:
        left, right = right, left % right
    return left == 1


def from_file(path: Path) -> tuple[Probe, ...]:
    """A user's own probes: JSON lines with `text` or `messages`, or plain text with one document per line.

    Raises NotFoundError or MalformedError, with the line.
    """
    try:
        content = path.read_text(encoding="utf-8-sig")  # some editors begin a file with a mark
    except FileNotFoundError as error:
        raise NotFoundError(f"no such file of probes: {path}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise MalformedError(f"{path} cannot be read as UTF-8 text: {error}") from error
    if path.suffix in (".jsonl", ".ndjson", ".json"):
        found = []
        for number, line in enumerate(content.splitlines(), 1):
            if line.strip():
                found.append(_from_line(_parsed(line, number, path.name), number, path.name))
    else:
        lines = enumerate(content.splitlines(), 1)
        found = [Probe(f"{path.name}:{number}", line.strip()) for number, line in lines if line.strip()]
    if not found:
        raise MalformedError(f"{path} holds no probe", hint="Put a document on each line.")
    return tuple(found)


def _parsed(line: str, number: int, name: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise MalformedError(f"{name}, line {number} is not JSON: {error}") from error


def _from_line(entry: Any, number: int, name: str) -> Probe:
    if isinstance(entry, dict):
        title = str(entry.get("id", f"{name}:{number}"))
        if isinstance(entry.get("text"), str) and entry["text"]:
            return Probe(title, entry["text"])
        turns = entry.get("messages")
        if isinstance(turns, Sequence) and turns and all(_is_turn(turn) for turn in turns):
            return Probe(title, messages=tuple({"role": t["role"], "content": t["content"]} for t in turns))
    raise MalformedError(
        f"{name}, line {number} holds neither `text` nor `messages`",
        hint='Each line is {"text": "…"} or {"messages": [{"role": "user", "content": "…"}]}.',
    )


def _is_turn(turn: Any) -> bool:
    return (
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
    )
