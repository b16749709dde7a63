"""Sizes as people write and read them."""

from __future__ import annotations

import pytest

from merge_adapter.errors import InputError
from merge_adapter.sizes import human_bytes, parse_bytes


@pytest.mark.parametrize(
    ("amount", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (2_200_000_000, "2.2 GB"), (3.5e15, "3500.0 TB")],
)
def test_bytes(amount: float, text: str) -> None:
    assert human_bytes(amount) == text


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("6GB", 6_000_000_000),
        ("500 MiB", 500 << 20),
        ("2g", 2_000_000_000),
        ("1.5kb", 1500),
        (" 12 ", 12),
        ("3TiB", 3 << 40),
    ],
)
def test_units_are_decimal_unless_they_say_otherwise(text: str, size: int) -> None:
    assert parse_bytes(text, what="it") == size


@pytest.mark.parametrize("text", ["", "much", "-1GB", "6 G B", "1e9"])
def test_anything_else_is_refused_by_its_name(text: str) -> None:
    with pytest.raises(InputError, match="the budget is"):
        parse_bytes(text, what="the budget")
