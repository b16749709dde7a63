"""Regular expressions of strangers: matched within a limit before anything else matches them.

PEFT and this package try the patterns of adapter_config.json on the paths of the base's modules, and Python's `re` can
take for ever over a few characters. A pattern that is not plainly cheap is tried on the very same paths first, in a
process with a limit of its own.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from merge_adapter.errors import MalformedError
from merge_adapter.methods.change import NameMap

LIMIT = 10
"""Seconds of processor time for all patterns together; the largest models take a fraction of one."""
_WALL = 300
"""Seconds of wall time, where a system knows no limit of processor time, or is very busy."""
_LENGTH = 1 << 16
"""Characters of one pattern."""
_ESCAPED = re.compile(r"\\.|\[\^?\]?[^\]]*\]", re.DOTALL)
_GROUP = re.compile(r"\(\?(?:[:=!]|<[=!]|P<\w+>)")
"""How a plain group, one that is not kept, a look around and a named group begin; other things behind `(?` are rare."""
_QUANTIFIER = re.compile(r"[*+{]")
_CHOICE = re.compile(r"[?|]")
_CHEAP = 12
"""Bits of work that a pattern may be and still be quick: 6 for each quantifier, which has some 64 characters of a path
to try, 1 for each choice between two."""
_KEYS = re.compile(r"modules|pattern|parameters|layers")
"""In the names of config keys whose values PEFT may use as patterns."""
_TRY = """
import json, re, sys
given = json.load(sys.stdin)
try:
    import resource
    resource.setrlimit(resource.RLIMIT_CPU, (given["limit"], given["limit"]))
except ImportError:
    pass
for number, pattern in enumerate(given["patterns"]):
    print(number, flush=True)
    for form in given["forms"]:
        try:
            compiled = re.compile(form.replace("PATTERN", pattern))
        except re.error:
            continue
        for name in given["names"]:
            compiled.match(name)
            compiled.fullmatch(name)
print("done", flush=True)
"""
_FORMS = ("PATTERN", r"(.*\.)?(PATTERN)$", r"(?:^|.*?\.)PATTERN\.(?P<idx>\d+)\.", r"(^|.*\.)PATTERN($|\..*)")
"""How PEFT wraps them: not at all, as the end of a path, in front of a layer's number, anywhere."""


def check_patterns(config: Mapping[str, Any], names: Iterable[str], *, limit: int = LIMIT) -> None:
    """Raise MalformedError for a pattern that cannot be matched against `names` in time.

    `limit`: seconds of processor time.
    """
    costly = [(key, pattern) for key, pattern in patterns_of(config) if not is_cheap(pattern)]
    if (
        costly
        and (number := _tried(tuple(pattern for _, pattern in costly), tuple(names), limit)) is not None
    ):
        key, pattern = costly[number]
        raise MalformedError(
            f"adapter_config.json: {key} names the pattern {pattern!r:.200}, which could not be matched against the"
            f" base's module names in {limit} s of processor time.",
            hint="Replace the pattern by a list of the modules' names, and distrust where the adapter comes from.",
        )


def check_lengths(config: Mapping[str, Any]) -> None:
    """Raise MalformedError for a pattern too long to be one; to be called before any is compiled."""
    for key, pattern in patterns_of(config):
        if len(pattern) > _LENGTH:
            raise MalformedError(
                f"adapter_config.json: {key} holds a pattern of {len(pattern)} characters; up to {_LENGTH} are read.",
                hint="Name the modules in a list.",
            )


def patterns_of(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Config key and pattern, for everything that PEFT may take for one."""
    for key, value in config.items():
        if not _KEYS.search(key):
            continue
        items = [value] if isinstance(value, str) else value
        if isinstance(items, list | Mapping):
            yield from ((key, item) for item in items if isinstance(item, str))


def is_cheap(pattern: str) -> bool:
    """Whether a pattern is quick on any path: no repeated group, next to no repetition and few choices."""
    plain = _GROUP.sub("(", _ESCAPED.sub("x", pattern))
    if "(?" in plain or re.search(r"\)[*+{]", plain):  # comments and flags change what the rest means
        return False
    return 6 * len(_QUANTIFIER.findall(plain)) + len(_CHOICE.findall(plain)) <= _CHEAP


def module_paths(names: NameMap, adapter: Iterable[str]) -> tuple[str, ...]:
    """Every path that a pattern may be tried on: those of the base's modules, and of the adapter's tensors."""
    root = names.module("")
    known = (name for name, _ in root.named_modules()) if root is not None else names.modules()
    found: dict[str, None] = {}
    for path in (*known, *adapter):
        parts = path.split(".")
        found.update((".".join(parts[:count]), None) for count in range(1, len(parts) + 1))
    return tuple(found)


def _tried(patterns: tuple[str, ...], names: tuple[str, ...], limit: int) -> int | None:
    """Match all in a process of its own; the number of the pattern that it ended at, None when it went through."""
    given = {"patterns": patterns, "names": names, "forms": _FORMS, "limit": limit}
    command = [sys.executable, "-I", "-S", "-c", _TRY]
    try:
        done = subprocess.run(
            command, input=json.dumps(given), capture_output=True, text=True, timeout=_WALL, check=False
        )
        said = done.stdout
    except subprocess.TimeoutExpired as error:
        raw = error.stdout or b""
        said = raw.decode() if isinstance(raw, bytes) else raw
    lines = said.split()
    return None if lines[-1:] == ["done"] else int(lines[-1]) if lines else 0
