"""What a plan is made of: single changes of the checkpoint, and what planning one needs to know about names.

A change says, from headers and configs alone, which tensors of the base it reads, which tensors of the
output it writes and which tensors of the adapter it uses up. How it runs comes in three forms:

    RowChange      one tensor on disk, row block by row block; memory is that of a block
    Replacement    one tensor on disk that becomes a tensor of the adapter; nothing of the base is read
    ModuleChange   any number of tensors, computed together; memory is that of a module

Everything here is free of torch at import, so that a plan can be made without it. Planners return changes;
`merge.py` runs them, rounds once from float32 to the dtype of the output, and writes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from math import prod
from typing import TYPE_CHECKING, Any, Protocol

from merge_adapter.types import Adapter, MergeSettings, Resolved, Strategy

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# ---------------------------------------------------------------------------------------------- tensors

ITEM_BITS: Mapping[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
"""Bits of one element for each dtype code of the safetensors format."""

FLOATING: frozenset[str] = frozenset({"F16", "BF16", "F32", "F64"})
"""The dtype codes in which weights are summed and rounded."""


@dataclass(frozen=True)
class TensorSpec:
    """A tensor as a safetensors header describes it."""

    name: str
    dtype: str
    """A dtype code of the safetensors format, such as "BF16"."""
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data; dtypes below 8 bit are packed."""
        return (self.elements * ITEM_BITS[self.dtype] + 7) // 8


class Weights(Protocol):
    """Named tensors that can be read in part: the base checkpoint, or one adapter.

    A quantised base that is to be dequantised shows its dequantised tensors here, under the names and in
    the dtypes they have in the output. Reading is thread-safe.
    """

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Every tensor, in the order of the files."""
        ...

    def read(self, name: str) -> Tensor:
        """The whole tensor in its own dtype and shape, in memory the caller owns."""
        ...

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` along the first dimension, in the tensor's own dtype."""
        ...


# ---------------------------------------------------------------------------------------------- changes


class Kind(StrEnum):
    """What a change does to the tensor it writes."""

    ADDITIVE = "additive"
    """W + D with D independent of W."""
    MULTIPLICATIVE = "multiplicative"
    """A function of W that is not a sum: DoRA, IA3, OFT and their like."""
    REPLACE = "replace"
    """The trained tensor takes the base tensor's place."""
    ADD = "add"
    """A tensor the base checkpoint does not have."""


class RowKernel(Protocol):
    """The arithmetic of one RowChange, made once per merge. Blocks are float32, 2-D, and never overlap.

    Row i of the block is row `start + i` of the tensor viewed as `[shape[0], prod(shape[1:])]`
    (`[n, 1]` for a vector). `apply` may be called from several threads at once; `survey` may not.
    """

    surveys: bool = False
    """True when every block must be shown to `survey`, in order, before the first `apply`."""

    def survey(self, block: Tensor, start: int) -> None:  # noqa: ARG002 - for kernels that override it
        """A first look at the rows, for kernels that need sums over all of them (DoRA, transposed)."""
        raise AssertionError(f"{type(self).__name__} asked for no survey")

    def apply(self, block: Tensor, start: int, merged: Tensor, update: Tensor) -> None:
        """Write `merged` = f(block) and `update` = f(block) - block. All four are `[rows, columns]` float32.

        `block` must not be changed. The result may not depend on which thread calls. All are on one device.
        """
        ...

    def to(self, device: torch.device) -> None:
        """Move the kernel's tensors to the device on which blocks will be."""
        for name, value in vars(self).items():
            if hasattr(value, "is_cuda"):
                setattr(self, name, value.to(device))


@dataclass(frozen=True)
class RowChange:
    """A tensor of the base changed row by row; several on one tensor apply in plan order."""

    tensor: TensorSpec
    """The tensor as it is written: name, shape, and the dtype of the base."""
    module: str
    """Where the adapter says so, for messages: a module path or parameter name."""
    consumes: tuple[str, ...]
    """Names in the adapter's file."""
    kind: Kind
    arithmetic: RowArithmetic
    """Makes the kernel when the merge runs."""
    source: str = ""
    """The tensor of the base that is read; "" for the one that is written. Another one where a tied tensor
    comes out untied: the new tensor starts from the one it was tied to."""

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.source or self.tensor.name,)

    @property
    def writes(self) -> tuple[TensorSpec, ...]:
        return (self.tensor,)

    @property
    def memory_bytes(self) -> int:
        return self.arithmetic.memory_bytes


class RowArithmetic(Protocol):
    """Makes a RowKernel; a frozen dataclass of names, shapes and scales."""

    @property
    def memory_bytes(self) -> int:
        """Bytes the kernel holds while it runs, blocks not counted."""
        ...

    def kernel(self, adapter: Weights) -> RowKernel:
        """Read what is needed of the adapter."""
        ...


@dataclass(frozen=True)
class Replacement:
    """A tensor of the output that is a tensor of the adapter, cast to the output's dtype."""

    tensor: TensorSpec
    """As it is written: name on disk, dtype of the output, shape of the adapter's tensor."""
    module: str
    source: str
    """Name in the adapter's file; same shape."""
    kind: Kind = Kind.REPLACE
    also_consumes: tuple[str, ...] = ()
    """Adapter tensors that hold the same values again, or frozen copies that are rightly not used."""
    counted: bool = True
    """False where another change accounts for the tensors: a second place that gets the same values."""

    @property
    def consumes(self) -> tuple[str, ...]:
        return (self.source, *self.also_consumes) if self.counted else ()

    @property
    def reads(self) -> tuple[str, ...]:
        return ()

    @property
    def writes(self) -> tuple[TensorSpec, ...]:
        return (self.tensor,)

    @property
    def memory_bytes(self) -> int:
        return 0


@dataclass(frozen=True)
class ModuleChange:
    """Tensors computed together by a function that needs them whole."""

    module: str
    reads: tuple[str, ...]
    """Names in the base checkpoint."""
    writes: tuple[TensorSpec, ...]
    """As they are on disk, in the base's dtype; names the base lacks are added."""
    consumes: tuple[str, ...]
    kind: Kind
    memory_bytes: int
    """Peak bytes while it runs, estimated."""
    arithmetic: ModuleArithmetic


class ModuleArithmetic(Protocol):
    """Computes a ModuleChange. Must be thread-safe, or take its own lock."""

    def run(self, base: Weights, adapter: Weights) -> Iterator[tuple[str, Tensor]]:
        """Each tensor of `writes` once, in any order: its name on disk and its new value, not yet rounded.

        The shape is that of the TensorSpec, the dtype float32; one in another floating dtype is taken to be
        rounded already.
        """
        ...


Change = RowChange | Replacement | ModuleChange

# ------------------------------------------------------------------------------------------------ names


class ModuleKind(StrEnum):
    """How a module holds its weight, as far as the arithmetic of adapters cares."""

    LINEAR = "linear"
    """`[out, in]`."""
    CONV1D = "conv1d"
    """transformers' Conv1D: a linear layer whose weight is `[in, out]`."""
    EMBEDDING = "embedding"
    """`[tokens, width]`."""
    CONV = "conv"
    """torch's ConvNd: `[out, in / groups, *kernel]`."""
    OTHER = "other"
    """Anything else: norms, fused experts, custom modules."""


class Group(Protocol):
    """Parameters that are not one disk tensor each: fused, split, stacked, permuted or transposed on load.

    `load` and `revert` are exact inverses on values that came from `load`; both accept any floating dtype.
    """

    @property
    def parameters(self) -> tuple[TensorSpec, ...]:
        """In memory: name, dtype, shape."""
        ...

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """On disk."""
        ...

    def load(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Disk tensors -> parameters; all of them given, all of them returned."""
        ...

    def revert(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parameters -> disk tensors; all of them given, all of them returned."""
        ...


class NameMap(Protocol):
    """From the model that PEFT wrapped to the base checkpoint.

    Parameter names are those of that model, as `model.named_parameters()` gives them and as adapter files
    use them after `base_model.model.`: `model.layers.0.self_attn.q_proj.weight`.
    """

    @property
    def architecture(self) -> str | None:
        """Class name of the model that PEFT wrapped, for `architectures` in the merged config.json.

        None when it was not needed to know it: the base's own stands."""
        ...

    def direct(self, parameter: str) -> str | None:
        """The disk tensor that is this parameter, value for value in the same shape, or None.

        For tied parameters, of which the checkpoint holds one, each of them answers with that one.
        """
        ...

    def group(self, parameter: str) -> Group | None:
        """The group the parameter belongs to when it is on disk in another form; None when `direct` answers
        or the checkpoint does not have it at all."""
        ...

    def check_two_ways(self, parameter: str) -> None:
        """Raise OneWayError when the base has this parameter in a form that cannot be written back."""
        ...

    def tied(self, parameter: str) -> tuple[str, ...]:
        """The other parameters that share this one's storage in a model loaded from this checkpoint.

        `lm_head.weight` for `model.embed_tokens.weight` and the other way round; () when none do."""
        ...

    def ties(self) -> Iterable[tuple[str, ...]]:
        """Every set of tied parameters, each sorted."""
        ...

    def tied_for_good(self, parameter: str) -> tuple[str, ...]:
        """Those of `tied` that share its storage even when config.json says that embeddings are not tied."""
        ...

    def declared_ties(self, parameter: str) -> tuple[str, ...]:
        """`tied`, and those that config.json ties but the checkpoint holds apart, with values of their own.

        PEFT goes by the config alone where it trains single tokens."""
        ...

    def disk_name(self, parameter: str) -> str:
        """The name under which a parameter that the checkpoint lacks is to be stored so that it loads.

        For an added head, an untied output embedding, an added bias."""
        ...

    def kind(self, module: str) -> ModuleKind:
        """How the module holds its weight."""
        ...

    def exists(self, module: str) -> bool | None:
        """Whether the model has such a module, or None where the map does not know the model.

        Then only the checkpoint can tell."""
        ...

    def modules(self) -> Iterable[str]:
        """Module paths that own at least one parameter, in the model's order where it is known."""
        ...

    def module(self, path: str) -> Any | None:
        """The module itself, on the meta device; None where the map has no model or the model no such module."""
        ...

    @property
    def unused(self) -> tuple[str, ...]:
        """Disk tensors that no parameter of the adapted model takes: heads of another class, for one."""
        ...


# --------------------------------------------------------------------------------------------- planners


@dataclass(frozen=True)
class Context:
    """What a planner may look at: configs, headers and names, never weights."""

    sources: Resolved
    settings: MergeSettings
    adapter: Adapter
    """The one adapter being planned; one of `sources.adapters`."""
    config: Mapping[str, Any]
    """Its adapter_config.json, checked: unknown keys gone, defaults not filled in."""
    tensors: Mapping[str, TensorSpec]
    """Its tensors under repaired names: `base_model.model.` + module + what PEFT saves, no adapter name.

    The `Weights` handed to the arithmetic of its changes answer to the same names.
    """
    base: Mapping[str, TensorSpec]
    """Every tensor of the base checkpoint, in the order of the files."""
    names: NameMap


@dataclass(frozen=True)
class Planned:
    """What a planner found. That every adapter tensor is consumed exactly once is checked by the plan."""

    changes: tuple[Change, ...]
    notes: tuple[str, ...] = ()
    config_changes: Mapping[str, Any] = field(default_factory=dict)
    """Edits of config.json that the method itself calls for; None removes a key."""
    dropped: tuple[str, ...] = ()
    """Tensors of the base that the merged model's class does not have, left out of the output."""
    strategy: Strategy = Strategy.STREAM
    strategy_reason: str = ""
    """Why not streamed, one sentence without its full stop; "" when it is."""


class Planner(Protocol):
    """Plans one method: adapter tensors to changes. One per streamed method in the methods table.

    Raises MethodError, AccountingError, ShapeError or BaseModelError.
    """

    def __call__(self, context: Context, /) -> Planned: ...
