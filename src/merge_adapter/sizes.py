"""Sizes as people write them."""

from __future__ import annotations

import re

from merge_adapter.errors import InputError

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?i?b?)", re.IGNORECASE)


def parse_bytes(text: str, *, what: str) -> int:
    """Bytes from `6GB`, `500 MiB`, `2g` or a plain number; InputError, which calls it `what`, for anything else."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise InputError(f"{what} is {text!r}, expected a size such as 6GB or 500 MiB")
    number, unit = float(match[1]), match[2].lower()
    base = 1024 if "i" in unit else 1000
    return int(number * base ** (" kmgt".index(unit[0]) if unit and unit[0] in "kmgt" else 0))
