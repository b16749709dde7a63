"""Parameters that transformers makes from tensors on disk and cannot turn back into them.

A conversion without a reverse operation, or one that does not come back bit for bit, leaves a merged parameter with no
tensor of the base to stand in. transformers also loads a parameter that is stored under the name it has in memory.
So the base is loaded whole, by transformers itself, and such parameters take the place of the tensors they come from.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from merge_adapter.checkpoint.dtypes import torch_dtype
from merge_adapter.errors import BaseModelError
from merge_adapter.methods.change import FLOATING, TensorSpec

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor


@dataclass(frozen=True)
class OneWay:
    """What one conversion makes, for good."""

    parameters: tuple[TensorSpec, ...]
    """Named as in memory, in the dtype of the first of `sources`."""
    sources: tuple[str, ...]
    """The tensors on disk that they are made from, and nothing else is."""
    reason: str
    """Why it cannot be undone, one sentence without its full stop."""


class OneWayError(BaseModelError):
    """An adapter changes parameters that cannot be written back under the base's own names.

    The merge can still be done on the loaded model; `plan.make_plan` does.
    """

    def __init__(self, parameter: str, model: Any, found: tuple[OneWay, ...]) -> None:
        reason = next((one.reason for one in found if _makes(one, parameter)), "")
        super().__init__(
            f"{parameter} cannot be written back under the base's own names: {reason}.",
            hint="Leave out --strategy stream; the merge then loads the base with transformers.",
        )
        self.parameter = parameter
        self.model = model
        """The model on the meta device, whose class and config load the base."""
        self.found = found
        """Every conversion of the base that cannot be undone."""


def load_parameters(
    model: Any, folder: Path, wanted: Collection[TensorSpec], stored: Collection[TensorSpec]
) -> dict[str, Tensor]:
    """The parameters `wanted` as transformers loads them for the class of `model` from `folder`, on the CPU.

    `stored`: the base's tensors, whose dtype is the one to load in. Raises BaseModelError when transformers cannot
    load the base, or makes a parameter anew instead of reading it.
    """
    import torch

    dtypes = {torch_dtype(spec.dtype) for spec in stored if spec.dtype in FLOATING}
    narrow = dtypes.pop() if len(dtypes) == 1 else torch.float64 if torch.float64 in dtypes else torch.float32
    with _quiet():
        try:
            loaded, info = type(model).from_pretrained(
                folder,
                config=deepcopy(model.config),
                dtype=narrow,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
        except (OSError, ValueError, RuntimeError, KeyError, AttributeError, TypeError, ImportError) as error:
            raise BaseModelError(
                f"transformers cannot load the base as {type(model).__name__}: {error}",
                hint="Check that the base loads with from_pretrained.",
            ) from error
    state: Mapping[str, Tensor] = loaded.state_dict()
    anew = {str(name) for name in info.get("missing_keys", ())}
    made: dict[str, Tensor] = {}
    for spec in wanted:
        value = state.get(spec.name)
        if value is None or spec.name in anew or tuple(value.shape) != spec.shape:
            got = (
                "made anew" if spec.name in anew else "no such tensor" if value is None else list(value.shape)
            )
            raise BaseModelError(
                f"{spec.name}: expected {list(spec.shape)} of the base when transformers loads it, got {got}.",
                hint="The base's config.json and its weights do not belong together.",
            )
        made[spec.name] = value.detach().to(torch_dtype(spec.dtype)).clone()
    return made


def note_on(found: Collection[OneWay]) -> str:
    """What a person should know of a base that was loaded because of these."""
    parameters = [spec.name for one in found for spec in one.parameters]
    sources = [name for one in found for name in one.sources]
    shown = ", ".join(parameters[:3]) + (", …" if len(parameters) > 3 else "")
    return (
        f"transformers cannot undo its own conversion of {len(sources)} tensors of the base"
        f" ({next(iter(found)).reason}). So the base was loaded with transformers, and in their place stand"
        f" {len(parameters)} tensors under the names that it gives them in memory ({shown}). All others keep the"
        " base's layout."
    )


def _makes(one: OneWay, parameter: str) -> bool:
    return any(spec.name == parameter for spec in one.parameters)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' progress bars and reports off the terminal."""
    import warnings

    from transformers.utils import logging

    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
