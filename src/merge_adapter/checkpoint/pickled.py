"""Weights in torch's pickled format, opened with `weights_only=True` and nothing else."""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch

from merge_adapter.checkpoint.dtypes import code_of
from merge_adapter.checkpoint.header import Header, build_header
from merge_adapter.errors import MalformedError
from merge_adapter.methods.change import TensorSpec

_NEEDS_CODE = re.compile(r"(?:GLOBAL|REDUCE|NEWOBJ) (?P<name>[\w.]+)")


def load_pickled(path: Path, name: str) -> dict[str, torch.Tensor]:
    """The tensors of a file, mapped into memory where its format allows it. `name` is for messages.

    Raises MalformedError for anything that is not a flat mapping from names to tensors, or that would have
    to run code to be read.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of its own deprecated storage classes in old files
            loaded = _load(path)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError, OSError) as error:
        raise MalformedError(
            f"{name}: expected weights that load with weights_only=True, got {_reason(error)}.",
            hint="Save the adapter or model again as safetensors, or download the file again.",
        ) from error
    if not isinstance(loaded, Mapping) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in loaded.items()
    ):
        raise MalformedError(
            f"{name}: expected a mapping from names to tensors, got {type(loaded).__name__}.",
            hint="Save the model's state_dict alone.",
        )
    return {key: value.detach() for key, value in loaded.items()}


def pickled_header(path: Path, name: str) -> Header:
    """The header that a pickled file would have as safetensors, its tensors in the file's order."""
    tensors = load_pickled(path, name)
    specs = [TensorSpec(key, code_of(tensor.dtype), tuple(tensor.shape)) for key, tensor in tensors.items()]
    return build_header(specs, {"format": "pt"})[1]


def _reason(error: Exception) -> str:
    """What is in the file instead, without torch's advice to load it unsafely."""
    if (named := _NEEDS_CODE.search(str(error))) is not None:
        return f"one that wants to call {named['name']:.100} while loading, which could run any code"
    lines = str(error).strip().splitlines()
    return lines[0][:200].rstrip(".") if lines else type(error).__name__


def _load(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap" not in str(error):
            raise
        return torch.load(path, map_location="cpu", weights_only=True)  # the format before torch 1.6
