"""Sizes and numbers as people write and read them."""

from __future__ import annotations

import math
import re

from merge_adapter.errors import InputError

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?i?b?)", re.IGNORECASE)
_UNITS = ("B", "kB", "MB", "GB", "TB")


def human_bytes(amount: float) -> str:
    """`amount` bytes in decimal units, as disks and networks are sold: 2_200_000_000 -> "2.2 GB"."""
    value = float(amount)
    for unit in _UNITS[:-1]:
        if abs(value) < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} {_UNITS[-1]}"


def parse_bytes(text: str, *, what: str) -> int:
    """Bytes from `6GB`, `500 MiB`, `2g` or a plain number; InputError, which calls it `what`, for anything else."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise InputError(f"{what} is {text!r}, expected a size such as 6GB or 500 MiB")
    number, unit = float(match[1]), match[2].lower()
    base = 1024 if "i" in unit else 1000
    return int(number * base ** (" kmgt".index(unit[0]) if unit and unit[0] in "kmgt" else 0))


def parse_number(text: str, *, what: str) -> float:
    """A finite number; InputError, which calls it `what`, for anything else."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise InputError(f"{what} is {text[:40]!r}, expected a number")
    return number


def parse_whole(text: str, *, what: str, least: int = 0, most: int = 2**63 - 1) -> int:
    """A whole number from `least` to `most`, in digits alone; InputError, which calls it `what`, for anything else."""
    short = text.isdecimal() and len(text) <= 20  # int() refuses thousands of digits with another error
    if not short or not least <= int(text) <= most:
        bound = f" of at least {least}" if least else ""
        raise InputError(f"{what} is {text[:40]!r}, expected a whole number{bound}")
    return int(text)
