"""PEFT's weighted combination of IA3 adapters: one vector per module, the weighted sum of the adapters' own.

As `combine` does for LoRA, the adapters are shown to the rest of the merge as the single one that PEFT's
`add_weighted_adapter` would leave. A module that only some of them change gets the sum over those alone, as in PEFT.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from merge_adapter.errors import MethodError, ShapeError
from merge_adapter.methods.adapter_file import PREFIX, AdapterFile
from merge_adapter.methods.change import TensorSpec
from merge_adapter.methods.combinations.combined import OpenedTogether, Together
from merge_adapter.methods.patterns import check_patterns
from merge_adapter.types import Combination, CombinationType

if TYPE_CHECKING:
    from torch import Tensor

_VECTOR = ".ia3_l"
_ONE_BY_ONE = "Leave out --combination: the adapters are then merged one after the other."


@dataclass(frozen=True)
class CombinedVectors(Together):
    """Several IA3 adapters as one. Answers like an AdapterFile."""

    parts: Mapping[str, tuple[int, ...]]
    """Tensor -> the adapters that have it, counted from 0."""
    specs: Mapping[str, TensorSpec]
    """The combined vectors: `[out, 1]`, or `[1, in]` of a feed-forward module; of a convolution `[1, …, 1, 1]` both."""

    @property
    def memory_bytes(self) -> int:
        """Vectors take next to nothing."""
        return 0

    def open(self) -> SummedVectors:
        """The combined vectors, computed as they are read."""
        return SummedVectors(self)


class SummedVectors(OpenedTogether):
    """The tensors of a CombinedVectors, summed in float32 in the order of the adapters, as PEFT does."""

    def __init__(self, file: CombinedVectors) -> None:
        super().__init__(file.files)
        self._file = file

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        return self._file.specs

    def read(self, name: str) -> Tensor:
        import torch

        total = torch.zeros(self.specs[name].shape)
        for number in self._file.parts[name]:
            total += self._stored[number].read(name).float() * self._file.files[number].adapter.weight
        return total


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
    paths = {name.removeprefix(PREFIX).removesuffix(_VECTOR): held for name, held in parts.items()}
    for file in files:
        check_patterns(file.adapter.config, paths)
    config = {
        **files[0].adapter.config,
        "target_modules": list(paths),
        "feedforward_modules": [path for path, held in paths.items() if _scales_inputs(path, held, files)],
        "exclude_modules": None,
    }
    return CombinedVectors(
        adapter=replace(files[0].adapter, config=config, weight=1.0),
        files=tuple(files),
        parts=parts,
        specs=specs,
    )


def _scales_inputs(path: str, held: Sequence[int], files: Sequence[AdapterFile]) -> bool:
    """Whether the vectors of a module multiply what goes into it. A convolution's shape does not tell.

    Raises MethodError where the adapters disagree: PEFT would go by the first one's config.
    """
    said = {_is_feedforward(path, files[number].adapter.config) for number in held}
    if len(said) > 1:
        raise MethodError(
            f"{path} is a feed-forward module for one adapter and none for another: their vectors scale different"
            " sides and have no sum.",
            hint=_ONE_BY_ONE,
        )
    return said.pop()


def _is_feedforward(path: str, config: Mapping[str, Any]) -> bool:
    """PEFT's own rule, of `IA3Model`."""
    given = config.get("feedforward_modules") or ()
    if isinstance(given, str):
        return re.fullmatch(given, path) is not None
    return isinstance(given, list) and any(path.endswith(str(end)) for end in given)
