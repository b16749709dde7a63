"""How a tensor is cut into row blocks."""

from __future__ import annotations

import math

BLOCK_ELEMENTS = 1 << 19
"""Elements of a block: 2 MiB in float32. With smaller ones, which stay in a core's own cache, threads wait for each
other.

The cut into blocks depends on the tensor's shape alone, never on threads or settings: matrix products of
other block shapes could round differently.
"""


def block_rows(shape: tuple[int, ...]) -> int:
    """Rows per block for a tensor of this shape."""
    columns = math.prod(shape[1:])
    return max(1, BLOCK_ELEMENTS // max(columns, 1))
