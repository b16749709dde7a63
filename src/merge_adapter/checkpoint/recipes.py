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
            weight = weight - self._spread(stored.read(self.zero).float(), start, stop)
        return weight * self._spread(_scale(stored.read(self.uses[1])), start, stop)

    def _spread(self, values: Tensor, start: int, stop: int) -> Tensor:
        """One value per block -> one per element of the rows asked for, or one for all."""
        import torch

        if values.numel() == 1:
            return values.reshape(())
        columns = self.shape[-1]
        if len(self.shape) == 3:
            tall = values[start:stop].repeat_interleave(self.block[0], dim=1)[:, : self.shape[1]]
            return tall.repeat_interleave(self.block[1], dim=2)[..., :columns]
        which = torch.arange(start, stop) // self.block[0]
        spread = values.reshape(values.shape[0], -1)[which]  # [rows, blocks of columns]
        return spread.repeat_interleave(self.block[1], dim=1)[:, :columns]


def _scale(stored: Tensor) -> Tensor:
    """Scales as float32; bytes are E8M0 exponents."""
    import torch

    if stored.dtype is torch.uint8:
        return (stored.float() - _MX_BIAS).exp2()
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
        codes = torch.stack((packed >> 4, packed & 15), dim=1).reshape(-1)  # high half first
        codes = codes[first % 2 : first % 2 + last - first]
        low, high = first // size, -(-last // size)
        scales = self._scales(stored, low, high)
        which = torch.arange(first, last) // size - low
        values = stored.read(self.uses[2]).float()[codes.long()]
        made = (values * scales[which]).reshape(stop - start, columns)
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
        scale = stored.read(self.uses[1]).float()
        scale = scale.reshape(scale.shape[0], -1).expand(self.shape[0], -1)[start:stop]
        group = columns // scale.shape[1]
        if self.zero:
            words = stored.read(self.zero)  # [rows packed, groups]
            zero = unpacked(words.T.contiguous(), self.bits).T[start:stop]
            values = values - zero.repeat_interleave(group, dim=1)
        return values * scale.repeat_interleave(group, dim=1)


def unpacked(words: Tensor, bits: int) -> Tensor:
    """`[rows, words]` int32 -> `[rows, words * 32 // bits]` float32: signed integers of `bits` each."""
    import torch

    rows, count = words.shape
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
        exponents = stored.read_rows(self.uses[1], start, stop).int() - _MX_BIAS
        table = torch.tensor(_FP4)
        values = torch.stack(
            (table[(blocks & 15).long()], table[(blocks >> 4).long()]), dim=-1
        )  # low half first
        values = torch.ldexp(values.flatten(-2), exponents[..., None])
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
