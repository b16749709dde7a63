"""How a tensor is cut into row blocks."""

from __future__ import annotations

import math

BLOCK_ELEMENTS = 1 << 18
"""Elements of a block: 1 MiB in float32, so that a block and its update stay in a core's cache.

The cut into blocks depends on the tensor's shape alone, never on threads or settings: matrix products of
other block shapes could round differently.
"""


def block_rows(shape: tuple[int, ...]) -> int:
    """Rows per block for a tensor of this shape."""
    columns = math.prod(shape[1:])
    return max(1, BLOCK_ELEMENTS // max(columns, 1))
