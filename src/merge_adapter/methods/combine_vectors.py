"""PEFT's weighted combination of IA3 adapters: one vector per module, the weighted sum of the adapters' own.

As `combine` does for LoRA, the adapters are shown to the rest of the merge as the single one that PEFT's
`add_weighted_adapter` would leave. A module that only some of them change gets the sum over those alone, as in PEFT.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING, Self

from merge_adapter.errors import MethodError, ShapeError
from merge_adapter.methods.adapter_file import PREFIX, AdapterFile
from merge_adapter.methods.change import TensorSpec, Weights
from merge_adapter.types import Adapter, Combination, CombinationType

if TYPE_CHECKING:
    from torch import Tensor

_VECTOR = ".ia3_l"
_ONE_BY_ONE = "Leave out --combination: the adapters are then merged one after the other."


@dataclass(frozen=True)
class CombinedVectors:
    """Several IA3 adapters as one. Answers like an AdapterFile."""

    adapter: Adapter
    """Of weight 1, its config that of PEFT's weighted adapter."""
    files: tuple[AdapterFile, ...]
    parts: Mapping[str, tuple[int, ...]]
    """Tensor -> the adapters that have it, counted from 0."""
    specs: Mapping[str, TensorSpec]
    """The combined vectors, `[out, 1]`, or `[1, in]` of a feed-forward module."""
    notes: tuple[str, ...] = ()
    memory_bytes: int = 0
    """Vectors take next to nothing."""

    @property
    def bytes(self) -> int:
        """Of all the adapters."""
        return sum(file.bytes for file in self.files)

    @property
    def tensors(self) -> int:
        """Of all the adapters."""
        return sum(file.tensors for file in self.files)

    def open(self) -> SummedVectors:
        """The combined vectors, computed as they are read."""
        return SummedVectors(self)


class SummedVectors(Weights):
    """The tensors of a CombinedVectors, summed in float32 in the order of the adapters, as PEFT does."""

    def __init__(self, file: CombinedVectors) -> None:
        self._file = file
        self._stack = ExitStack()
        self._stored = [self._stack.enter_context(part.open()) for part in file.files]

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        return self._file.specs

    @property
    def bytes_read(self) -> int:
        """Bytes of the adapters' tensor data read so far."""
        return sum(stored.bytes_read for stored in self._stored)

    def read(self, name: str) -> Tensor:
        import torch

        total = torch.zeros(self.specs[name].shape)
        for number in self._file.parts[name]:
            total += self._stored[number].read(name).float() * self._file.files[number].adapter.weight
        return total

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        return self.read(name)[start:stop]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()


def combine_vectors(files: Sequence[AdapterFile], combination: Combination) -> CombinedVectors:
    """The IA3 adapters as the one that PEFT's `add_weighted_adapter` makes of them. Reads headers alone.

    Raises MethodError for what PEFT has no rule for, ShapeError for adapters that do not fit each other.
    """
    if combination.type is not CombinationType.LINEAR:
        raise MethodError(
            f"PEFT combines IA3 adapters by the weighted sum of their vectors, not by {combination.type}.",
            hint="Use --combination linear.",
        )
    parts: dict[str, tuple[int, ...]] = {}
    specs: dict[str, TensorSpec] = {}
    for number, file in enumerate(files):
        for name, spec in file.specs.items():
            if not name.endswith(_VECTOR):
                raise MethodError(
                    f"{file.adapter.repository.origin} also holds {name}, which was trained whole and for which PEFT's"
                    " combination has no rule.",
                    hint=_ONE_BY_ONE,
                )
            known = specs.setdefault(name, replace(spec, dtype="F32"))
            if known.shape != spec.shape:
                raise ShapeError(
                    f"{name}: adapter {parts[name][0] + 1} has the shape {list(known.shape)}, adapter {number + 1} has"
                    f" {list(spec.shape)}.",
                    hint="They were trained on different bases or scale different sides, and cannot be combined.",
                )
            parts[name] = (*parts.get(name, ()), number)
    paths = {name.removeprefix(PREFIX).removesuffix(_VECTOR): spec for name, spec in specs.items()}
    config = {
        **files[0].adapter.config,
        "target_modules": list(paths),
        "feedforward_modules": [path for path, spec in paths.items() if spec.shape[0] == 1],
        "exclude_modules": None,
    }
    return CombinedVectors(
        adapter=replace(files[0].adapter, config=config, weight=1.0),
        files=tuple(files),
        parts=parts,
        specs=specs,
        notes=tuple(note for file in files for note in file.notes),
    )
