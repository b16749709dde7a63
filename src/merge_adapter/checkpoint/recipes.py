"""The arithmetic of dequantising: stored numbers, a table or a float format, and scales. Rows in, rows out."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from merge_adapter.errors import MalformedError

if TYPE_CHECKING:
    from torch import Tensor

    from merge_adapter.methods.change import Weights

_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The values of E2M1, in the order of their codes (OCP Microscaling Formats, version 1.0)."""
_MX_BIAS = 127


class Recipe(Protocol):
    """How one dequantised tensor is made."""

    def using(self, extra: tuple[str, ...]) -> Recipe:
        """The same with more stored tensors used up, none of them needed."""
        ...

    @property
    def uses(self) -> tuple[str, ...]:
        """Stored tensors it is made from; the first is where it lies in the file."""
        ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    def rows(self, stored: Weights, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` along the first dimension, float32."""
        ...


@dataclass(frozen=True)
class Scaled:
    """`weight * scale`, one scale for each block of `block[0]` rows and `block[1]` columns."""

    uses: tuple[str, ...]
    shape: tuple[int, ...]
    block: tuple[int, int]
    divisor: float = 1.0
    """What the scales are to be divided by."""

    def using(self, extra: tuple[str, ...]) -> Scaled:
        return replace(self, uses=(*self.uses, *extra))

    def rows(self, stored: Weights, start: int, stop: int) -> Tensor:
        import torch

        weight = stored.read_rows(self.uses[0], start, stop).float()
        scale = stored.read(self.uses[1]).float()
        if scale.numel() == 1:
            return weight * (scale.reshape(()) / self.divisor)
        scale = scale.reshape(scale.shape[0], -1)
        which = torch.arange(start, stop) // self.block[0]
        spread = scale[which].repeat_interleave(self.block[1], dim=1)[:, : weight.shape[1]]
        return weight * (spread / self.divisor)


@dataclass(frozen=True)
class QuantState:
    """What bitsandbytes stores beside a 4-bit weight."""

    shape: tuple[int, ...]
    blocksize: int
    nested_blocksize: int | None
    nested_offset: float


def quant_state(text: bytes, name: str) -> QuantState:
    """Parse the JSON that bitsandbytes packs into a tensor of bytes. Raises MalformedError."""
    try:
        state: Any = json.loads(text.decode())
        shape = tuple(int(size) for size in state["shape"])
        nested = state.get("nested_blocksize")
        made = QuantState(
            shape,
            int(state["blocksize"]),
            int(nested) if nested is not None else None,
            float(state.get("nested_offset") or 0.0),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise MalformedError(
            f"{name}: its quantisation state cannot be read: {error}.", hint="Download the base again."
        ) from error
    if len(shape) != 2 or min(*shape, made.blocksize) < 1 or (nested is not None and int(nested) < 1):
        raise MalformedError(f"{name}: its quantisation state says {made}.", hint="Download the base again.")
    return made


@dataclass(frozen=True)
class Block4:
    """bitsandbytes 4 bit: a table of 16 values, one scale per block of the flattened weight, perhaps nested."""

    uses: tuple[str, ...]
    """Weight, absmax, quant_map, with nested scales nested_absmax and nested_quant_map, last the state."""
    shape: tuple[int, ...]
    blocksize: int
    nested_blocksize: int | None
    nested_offset: float

    def using(self, extra: tuple[str, ...]) -> Block4:
        return replace(self, uses=(*self.uses, *extra))

    def rows(self, stored: Weights, start: int, stop: int) -> Tensor:
        import torch

        columns = self.shape[1]
        first, last = start * columns, stop * columns
        packed = self._bytes(stored, first // 2, -(-last // 2))
        codes = torch.stack((packed >> 4, packed & 15), dim=1).reshape(-1)  # high half first
        codes = codes[first % 2 : first % 2 + last - first]
        low, high = first // self.blocksize, -(-last // self.blocksize)
        scales = self._scales(stored, low, high)
        which = torch.arange(first, last) // self.blocksize - low
        values = stored.read(self.uses[2]).float()[codes.long()]
        return (values * scales[which]).reshape(stop - start, columns)

    def _bytes(self, stored: Weights, low: int, high: int) -> Tensor:
        if len(stored.specs[self.uses[0]].shape) == 2 and stored.specs[self.uses[0]].shape[0] != 1:
            return stored.read_rows(self.uses[0], low, high).reshape(-1)
        return stored.read(self.uses[0]).reshape(-1)[low:high]

    def _scales(self, stored: Weights, low: int, high: int) -> Tensor:
        import torch

        absmax = stored.read_rows(self.uses[1], low, high)
        if self.nested_blocksize is None:
            return absmax.float()
        outer = stored.read(self.uses[3]).float()
        table = stored.read(self.uses[4]).float()
        which = torch.arange(low, high) // self.nested_blocksize
        return table[absmax.long()] * outer[which] + self.nested_offset


@dataclass(frozen=True)
class Packed:
    """compressed-tensors' packed integers: `32 / bits` to an int32 along the inputs, low bits first, symmetric."""

    uses: tuple[str, ...]
    """Packed weight, scales of shape `[rows, groups]`, perhaps the shape."""
    shape: tuple[int, ...]
    bits: int

    def using(self, extra: tuple[str, ...]) -> Packed:
        return replace(self, uses=(*self.uses, *extra))

    def rows(self, stored: Weights, start: int, stop: int) -> Tensor:
        import torch

        packed = stored.read_rows(self.uses[0], start, stop)
        shifts = torch.arange(0, 32, self.bits, dtype=torch.int32)
        codes = (packed[:, :, None] >> shifts) & ((1 << self.bits) - 1)
        values = codes.reshape(stop - start, -1).float() - (1 << (self.bits - 1))
        scale = stored.read(self.uses[1]).float()
        scale = scale.expand(self.shape[0], -1)[start:stop] if scale.dim() == 2 else scale.reshape(1, 1)
        return values * scale.repeat_interleave(values.shape[1] // scale.shape[1], dim=1)


@dataclass(frozen=True)
class Mx4:
    """MXFP4 experts: `[experts, out, groups, 16]` bytes of two values, an exponent for each group of 32.

    The dequantised tensor is `[experts, in, out]`, as transformers holds it.
    """

    uses: tuple[str, ...]
    shape: tuple[int, ...]

    def using(self, extra: tuple[str, ...]) -> Mx4:
        return replace(self, uses=(*self.uses, *extra))

    def rows(self, stored: Weights, start: int, stop: int) -> Tensor:
        import torch

        blocks = stored.read_rows(self.uses[0], start, stop)
        exponents = stored.read_rows(self.uses[1], start, stop).int() - _MX_BIAS
        table = torch.tensor(_FP4)
        values = torch.stack(
            (table[(blocks & 15).long()], table[(blocks >> 4).long()]), dim=-1
        )  # low half first
        values = torch.ldexp(values.flatten(-2), exponents[..., None])
        return values.flatten(-2).transpose(1, 2).contiguous()  # [experts, out, in] -> [experts, in, out]
