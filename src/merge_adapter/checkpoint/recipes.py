"""The arithmetic of dequantising: stored numbers, a table or a float format, and scales. Rows in, rows out."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from merge_adapter.errors import MalformedError

if TYPE_CHECKING:
    from torch import Tensor

    from merge_adapter.methods.change import Weights

_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The values of E2M1, in the order of their codes (OCP Microscaling Formats, version 1.0)."""
_MX_BIAS = 127
"""Of an E8M0 scale: the byte b stands for 2 ** (b - 127)."""
_PER_127 = 7.874015718698502e-3
"""1/127 as bitsandbytes writes it: to divide instead would differ in the last bit."""
_WORD = 32
"""Bits of the words that compressed-tensors packs into."""


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
        """Rows `start` to `stop` along the first dimension; float32, or rounded as the format says."""
        ...


@dataclass(frozen=True)
class Scaled:
    """`(weight - zero point) * scale`, one scale for each block of `block[0]` rows and `block[1]` columns.

    `[rows, columns]`, or `[experts, rows, columns]` with scales per expert.
    """

    uses: tuple[str, ...]
    """Weight and scales, then what is not read."""
    shape: tuple[int, ...]
    block: tuple[int, int]
    zero: str = ""
    """Integers in the layout of the scales, to be subtracted; "" for none."""

    def using(self, extra: tuple[str, ...]) -> Scaled:
        return replace(self, uses=(*self.uses, *extra))

    def rows(self, stored: Weights, start: int, stop: int) -> Tensor:
        weight = stored.read_rows(self.uses[0], start, stop).float()
        if self.zero:
            weight = weight - self._spread(stored, self.zero, start, stop)
        return weight * self._spread(stored, self.uses[1], start, stop)

    def _spread(self, stored: Weights, name: str, start: int, stop: int) -> Tensor:
        """One value per block -> one per element of the rows asked for, or one for all."""
        import torch

        tall, wide = self.block
        if stored.specs[name].elements == 1:
            return _numbers(stored.read(name)).reshape(())
        if len(self.shape) == 3:
            each = _numbers(
                stored.read_rows(name, start, stop)
            )  # [experts, blocks of rows, blocks of columns]
            each = each.repeat_interleave(tall, dim=1)[:, : self.shape[1]]
            return each.repeat_interleave(wide, dim=2)[..., : self.shape[2]]
        first = start // tall
        values = _numbers(stored.read_rows(name, first, -(-stop // tall)))
        wider = values.reshape(values.shape[0], -1).repeat_interleave(wide, dim=1)[:, : self.shape[1]]
        return wider[torch.arange(start, stop) // tall - first]


def _numbers(stored: Tensor) -> Tensor:
    """Scales or zero points as float32; unsigned bytes are E8M0 exponents."""
    import torch

    if stored.dtype is torch.uint8:
        return powers(stored)
    return stored.float()


@dataclass(frozen=True)
class Int8:
    """bitsandbytes 8 bit: `weight * SCB / 127`, one SCB per row."""

    uses: tuple[str, ...]
    shape: tuple[int, ...]

    def using(self, extra: tuple[str, ...]) -> Int8:
        return replace(self, uses=(*self.uses, *extra))

    def rows(self, stored: Weights, start: int, stop: int) -> Tensor:
        scale = stored.read(self.uses[1]).float().reshape(-1, 1)[start:stop]
        return stored.read_rows(self.uses[0], start, stop).float() * scale * _PER_127


@dataclass(frozen=True)
class QuantState:
    """What bitsandbytes stores beside a 4-bit weight."""

    shape: tuple[int, ...]
    blocksize: int
    dtype: str
    """To which bitsandbytes rounds what it dequantises."""
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
            str(state.get("dtype") or "float32"),
            int(nested) if nested is not None else None,
            float(state.get("nested_offset") or 0.0),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise MalformedError(
            f"{name}: its quantisation state cannot be read: {error}.", hint="Download the base again."
        ) from error
    if (
        len(shape) != 2
        or min(*shape, made.blocksize) < 1
        or (made.nested_blocksize is not None and made.nested_blocksize < 1)
        or made.dtype not in ("float32", "float16", "bfloat16")
    ):
        raise MalformedError(f"{name}: its quantisation state says {made}.", hint="Download the base again.")
    return made


@dataclass(frozen=True)
class Block4:
    """bitsandbytes 4 bit: a table of 16 values, one scale per block of the flattened weight, perhaps nested."""

    uses: tuple[str, ...]
    """Weight, absmax, quant_map, with nested scales nested_absmax and nested_quant_map, last the state."""
    state: QuantState

    @property
    def shape(self) -> tuple[int, ...]:
        return self.state.shape

    def using(self, extra: tuple[str, ...]) -> Block4:
        return replace(self, uses=(*self.uses, *extra))

    def rows(self, stored: Weights, start: int, stop: int) -> Tensor:
        import torch

        columns, size = self.shape[1], self.state.blocksize
        first, last = start * columns, stop * columns
        packed = self._bytes(stored, first // 2, -(-last // 2))
        values = pairs(stored.read(self.uses[2]).float(), packed, high_first=True)
        values = values[first % 2 : first % 2 + last - first]
        low = first // size
        scales = self._scales(stored, low, -(-last // size)).repeat_interleave(size)
        made = (values * scales[first - low * size :][: last - first]).reshape(stop - start, columns)
        return made.to(getattr(torch, self.state.dtype))

    def _bytes(self, stored: Weights, low: int, high: int) -> Tensor:
        """Bytes `low` to `high` of the packed weight, whatever dtype they are stored under."""
        import torch

        shape = stored.specs[self.uses[0]].shape
        if stored.specs[self.uses[0]].dtype == "U8" and len(shape) == 2 and shape[1] == 1:
            return stored.read_rows(self.uses[0], low, high).reshape(-1)
        return stored.read(self.uses[0]).reshape(-1).view(torch.uint8)[low:high]

    def _scales(self, stored: Weights, low: int, high: int) -> Tensor:
        import torch

        absmax = stored.read_rows(self.uses[1], low, high)
        if self.state.nested_blocksize is None:
            return absmax.float()
        outer = stored.read(self.uses[3]).float()
        table = stored.read(self.uses[4]).float()
        which = torch.arange(low, high) // self.state.nested_blocksize
        return table[absmax.long()] * outer[which] + self.state.nested_offset


def pairs(table: Tensor, packed: Tensor, *, high_first: bool) -> Tensor:
    """Bytes of two codes each -> the values of `table[16]` that they stand for, flat."""
    import torch

    halves = torch.arange(256)
    order = (halves >> 4, halves & 15) if high_first else (halves & 15, halves >> 4)
    both = torch.stack((table[order[0]], table[order[1]]), dim=1)  # [256, 2]
    # two float32 as one int64, which torch looks up ten times as fast as a row of two
    return both.view(torch.int64).reshape(-1).take(packed.reshape(-1).long()).view(torch.float32)


def powers(exponents: Tensor) -> Tensor:
    """Bytes of E8M0 -> the powers of two that they stand for, exact."""
    import torch

    table = torch.ldexp(torch.ones(256), torch.arange(256) - _MX_BIAS)
    return table.take(exponents.long())


@dataclass(frozen=True)
class Packed:
    """compressed-tensors' packed integers: `bits` each, densely into int32 words along the inputs, low bits first."""

    uses: tuple[str, ...]
    """Packed weight, scales of shape `[rows, groups]` or `[1]`, perhaps zero points and the shape."""
    shape: tuple[int, ...]
    bits: int
    zero: str = ""
    """Zero points, packed along the outputs; "" where the weights are symmetric."""

    def using(self, extra: tuple[str, ...]) -> Packed:
        return replace(self, uses=(*self.uses, *extra))

    def rows(self, stored: Weights, start: int, stop: int) -> Tensor:
        columns = self.shape[1]
        values = unpacked(stored.read_rows(self.uses[0], start, stop), self.bits)[:, :columns]
        if stored.specs[self.uses[1]].shape[0] == self.shape[0]:
            scale = stored.read_rows(self.uses[1], start, stop).float().reshape(stop - start, -1)
        else:
            scale = stored.read(self.uses[1]).float().reshape(1, -1)
        group = columns // scale.shape[1]
        if self.zero:
            values = values - self._zero(stored, start, stop).repeat_interleave(group, dim=1)
        return values * scale.repeat_interleave(group, dim=1)

    def _zero(self, stored: Weights, start: int, stop: int) -> Tensor:
        """Zero points of the rows asked for, `[rows, groups]`, from the words that hold them."""
        first = start // _WORD * _WORD  # there a word begins, whatever the width
        last = min(-(-stop // _WORD) * self.bits, stored.specs[self.zero].shape[0])
        words = stored.read_rows(self.zero, first * self.bits // _WORD, last)
        return unpacked(words.T.contiguous(), self.bits).T[start - first : stop - first]


def unpacked(words: Tensor, bits: int) -> Tensor:
    """`[rows, words]` int32 -> `[rows, words * 32 // bits]` float32: signed integers of `bits` each."""
    import torch

    rows, count = words.shape
    if bits in (4, 8) and sys.byteorder == "little":  # the common widths never cross a byte
        codes = words.view(torch.uint8)
        if bits == 4:
            codes = torch.stack((codes & 15, codes >> 4), dim=-1).reshape(rows, -1)
        return codes.float() - (1 << (bits - 1))
    held = words.long() & 0xFFFFFFFF
    begin = torch.arange(count * _WORD // bits) * bits
    word, shift = begin // _WORD, begin % _WORD
    after = (word + 1).clamp(max=count - 1)  # where an integer runs on into the next word
    codes = (held[:, word] >> shift) | (held[:, after] << (_WORD - shift))
    return (codes & ((1 << bits) - 1)).float().reshape(rows, -1) - (1 << (bits - 1))


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
        scales = powers(stored.read_rows(self.uses[1], start, stop))
        values = pairs(torch.tensor(_FP4), blocks, high_first=False)
        values = values.reshape(*scales.shape, 32) * scales[..., None]
        return values.flatten(-2).transpose(1, 2).contiguous()  # [experts, out, in] -> [experts, in, out]


@dataclass(frozen=True)
class Transposed:
    """Another recipe's tensor, transposed: where the format stores `[out, in]` and the model `[in, out]`."""

    inner: Recipe

    @property
    def uses(self) -> tuple[str, ...]:
        return self.inner.uses

    @property
    def shape(self) -> tuple[int, ...]:
        return self.inner.shape[::-1]

    def using(self, extra: tuple[str, ...]) -> Transposed:
        return Transposed(self.inner.using(extra))

    def rows(self, stored: Weights, start: int, stop: int) -> Tensor:
        return self.inner.rows(stored, 0, self.inner.shape[0])[:, start:stop].T.contiguous()
