"""What people may choose about a job, checked: from a comment, a form, or a file.

Everything accepted here ends up in a subprocess's arguments, in URLs and in pages; so each value has a narrow
shape, and folders of this machine can never be named.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from enum import StrEnum
from typing import Any, TypeVar

from merge_adapter.bot.jobs import JobOptions
from merge_adapter.errors import InputError
from merge_adapter.sizes import parse_number, parse_whole
from merge_adapter.types import CombinationType, DType, QuantizedBase, SoftPrompt, Strategy

E = TypeVar("E", bound=StrEnum)

_NAME = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
_REPO_ID = re.compile(rf"(?:{_NAME}/)?{_NAME}")
_OWNED_ID = re.compile(rf"{_NAME}/{_NAME}")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,199}")
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]{0,63}")
_MOST_ADAPTERS = 8
"""Beside the first: each is looked up before it is merged."""
_LARGEST_RANK = 65_536
_SUBFOLDER = re.compile(r"[A-Za-z0-9_.-]+(?:/[A-Za-z0-9_.-]+){0,9}")


def repo_id(text: str, *, what: str) -> str:
    """`owner/name`. Raises InputError."""
    if not _OWNED_ID.fullmatch(text) or ".." in text or "--" in text:
        raise InputError(f"{text[:100]!r} is not a Hub id", hint=f"Write the {what} as owner/name.")
    return text


def owner(text: str) -> str:
    """A user or an organisation. Raises InputError."""
    if not re.fullmatch(_NAME, text) or ".." in text or "--" in text:
        raise InputError(
            f"{text[:100]!r} is not the name of an owner", hint="Give a user or an organisation."
        )
    return text


def reference(text: str, *, what: str) -> tuple[str, str | None]:
    """`owner/name` or `owner/name@revision`, as id and revision. Raises InputError."""
    name, at, tail = text.strip().partition("@")
    return repo_id(name, what=what), (revision(tail) if at else None)


def revision(text: str) -> str:
    """A branch, tag or commit. Raises InputError."""
    if not _REVISION.fullmatch(text) or ".." in text:
        raise InputError(f"{text[:100]!r} is not a revision", hint="Give a branch, a tag or a commit.")
    return text


def subfolder(text: str) -> str:
    """A path inside a repository, "" for its root. Raises InputError."""
    text = text.strip("/")
    if text and (not _SUBFOLDER.fullmatch(text) or any(part in (".", "..") for part in text.split("/"))):
        raise InputError(f"{text[:100]!r} is not a folder of a repository")
    return text


def _model_id(text: str) -> str:
    if not _REPO_ID.fullmatch(text) or ".." in text or "--" in text:
        raise InputError(f"{text[:100]!r} is not a Hub id", hint="Write the base model as owner/name.")
    return text


def _license(text: str) -> str:
    if not _LICENSE.fullmatch(text):
        raise InputError(
            f"{text[:100]!r} is not a licence id of the Hub", hint="Such as apache-2.0 or llama3.1."
        )
    return text


def _private(text: str) -> bool | None:
    try:
        return {"": None, "true": True, "yes": True, "false": False, "no": False}[text.lower()]
    except KeyError:
        raise InputError(f"private is {text[:20]!r}, expected true or false") from None


def _dtype(text: str) -> DType:
    return _member(text, DType, "dtype")


def _strategy(text: str) -> Strategy:
    return _member(text, Strategy, "strategy")


def _several(text: str) -> list[str]:
    """One a line, or with commas between them."""
    return [part.strip() for part in re.split(r"[\n,]", text) if part.strip()]


def _adapters(text: str) -> tuple[str, ...]:
    """Ids, each with its revision if it has one. At most eight."""
    found = tuple(reference(one, what="adapter") for one in _several(text))
    if len(found) > _MOST_ADAPTERS:
        raise InputError(f"{len(found)} more adapters were named, {_MOST_ADAPTERS} at most")
    return tuple(f"{name}@{at}" if at else name for name, at in found)


def _weights(text: str) -> tuple[float, ...]:
    return tuple(parse_number(one, what="a weight") for one in _several(text)[: _MOST_ADAPTERS + 2])


def _density(text: str) -> float:
    number = parse_number(text, what="density")
    if not 0 < number <= 1:
        raise InputError(f"density is {text[:20]!r}, expected a part between 0 and 1")
    return number


def _member(text: str, kind: type[E], name: str) -> E:
    try:
        return kind(text)
    except ValueError:
        raise InputError(
            f"{name} is {text[:40]!r}, expected one of {', '.join(one.value for one in kind)}"
        ) from None


_READERS: Mapping[str, Callable[[str], Any]] = {
    "base_model": _model_id,
    "base_revision": revision,
    "dtype": _dtype,
    "strategy": _strategy,
    "target_repo": lambda text: repo_id(text, what="target"),
    "private": _private,
    "license": _license,
    "quantized_base": lambda text: _member(text, QuantizedBase, "quantized-base"),
    "soft_prompt": lambda text: _member(text, SoftPrompt, "soft-prompt"),
    "adapters": _adapters,
    "weights": _weights,
    "combination": lambda text: _member(text, CombinationType, "combination"),
    "density": _density,
    "svd_rank": lambda text: parse_whole(text, what="svd-rank", least=1, most=_LARGEST_RANK),
}
NAMES = tuple(_READERS)
"""Every option, by its name in `JobOptions`."""


def options_from(chosen: Mapping[str, str]) -> JobOptions:
    """Options from texts by their names, which are of `NAMES`; empty ones stay at their default. Raises InputError."""
    options = JobOptions()
    for name, text in chosen.items():
        if text.strip():
            options = replace(options, **{name: _READERS[name](text.strip())})
    return options
