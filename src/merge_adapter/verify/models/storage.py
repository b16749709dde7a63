"""The checkpoint files as they lie on the disk: which they are, what they name, what they hold.

The headers are read by safetensors' own reader and pickled files by torch's weights-only one; nothing here
is shared with the code that writes merged checkpoints.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from merge_adapter.errors import MalformedError, NotFoundError

SAFETENSORS = ("model.safetensors.index.json", "model.safetensors")
PICKLED = ("pytorch_model.bin.index.json", "pytorch_model.bin")
ADAPTER_SAFETENSORS = "adapter_model.safetensors"
ADAPTER_PICKLED = "adapter_model.bin"

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


@dataclass(frozen=True)
class Stored:
    """One tensor as a header describes it."""

    file: str
    dtype: str
    """In safetensors' spelling: BF16, F32, …"""
    shape: tuple[int, ...]

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """None for a dtype torch is not known to load."""
        return _DTYPES.get(self.dtype)


@dataclass(frozen=True)
class Layout:
    """Which weight files a model loads from."""

    files: tuple[str, ...]
    index: str | None = None
    weight_map: Mapping[str, str] = field(default_factory=dict)
    total_size: int | None = None
    """`metadata.total_size` of the index, in bytes."""
    pickled: bool = False


def layout(names: Iterable[str], read: Any) -> Layout:
    """The files a model loads from, in transformers' order of preference; `read(name) -> bytes`.

    Raises NotFoundError when there are no weights, MalformedError for an index that cannot be used.
    """
    present = set(names)
    for pickled, (index, single) in ((False, SAFETENSORS), (True, PICKLED)):
        # transformers takes the single file first when both lie there
        if single in present:
            return Layout((single,), pickled=pickled)
        if index in present:
            return _indexed(index, read(index), pickled=pickled)
    raise NotFoundError(
        "no weights: neither model.safetensors nor its index, nor the pytorch_model.bin forms, lie here",
        hint="Check the path, and that the files were downloaded in full.",
    )


def _indexed(name: str, content: bytes, *, pickled: bool) -> Layout:
    try:
        document = json.loads(content)
        weight_map = document["weight_map"]
        total = document.get("metadata", {}).get("total_size")
        files = tuple(sorted(set(weight_map.values())))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise MalformedError(f"{name} is not an index of weights: {error!r}") from error
    for file in files:
        if not isinstance(file, str) or "/" in file or "\\" in file or file.startswith("."):
            raise MalformedError(f"{name} names a shard outside its own folder: {file!r}")
    return Layout(files, name, weight_map, int(total) if total is not None else None, pickled)


def local_layout(folder: Path) -> Layout:
    """Which weight files `folder` loads from. Raises NotFoundError or MalformedError."""
    names = [path.name for path in folder.iterdir() if path.is_file()]
    return layout(names, lambda name: (folder / name).read_bytes())


class Checkpoint:
    """The tensors of one set of weight files, mapped from the disk; a context manager.

    Raises MalformedError, naming the file, for a truncated or foreign file.
    """

    def __init__(self, folder: Path, files: Iterable[str]) -> None:
        self.tensors: dict[str, Stored] = {}
        self.duplicates: list[str] = []
        self._stack = ExitStack()
        self._open: dict[str, Any] = {}
        try:
            for file in files:
                self._add(folder, file)
        except BaseException:
            self._stack.close()
            raise

    def _add(self, folder: Path, file: str) -> None:
        path = folder / file
        if not path.is_file():
            raise NotFoundError(f"{file} is named by the index but does not exist")
        if file.endswith(".safetensors"):
            try:
                opened = self._stack.enter_context(safe_open(str(path), framework="pt"))
            except (SafetensorError, OSError, ValueError) as error:
                raise MalformedError(f"{file} is not a whole safetensors file: {error}") from error
            names = list(opened.keys())
            for name in names:
                part = opened.get_slice(name)
                self._note(name, Stored(file, part.get_dtype(), tuple(part.get_shape())))
            self._open[file] = opened
            return
        try:
            # files from before torch 1.6 are no archives, and cannot be mapped
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
        except Exception as error:  # unpickling raises anything
            raise MalformedError(f"{file} cannot be read as a file of tensors: {error}") from error
        self._open[file] = content
        spelling = {dtype: name for name, dtype in _DTYPES.items()}
        for name, tensor in content.items():
            if isinstance(tensor, Tensor):
                dtype = spelling.get(tensor.dtype, str(tensor.dtype))
                self._note(name, Stored(file, dtype, tuple(tensor.shape)))

    def _note(self, name: str, stored: Stored) -> None:
        if name in self.tensors:
            self.duplicates.append(name)
        self.tensors[name] = stored

    def __getitem__(self, name: str) -> Tensor:
        """The tensor, mapped from the disk where the format allows."""
        opened = self._open[self.tensors[name].file]
        tensor = opened[name] if isinstance(opened, dict) else opened.get_tensor(name)
        assert isinstance(tensor, Tensor)
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    @property
    def float_dtypes(self) -> frozenset[torch.dtype]:
        """The dtypes of its floating-point tensors."""
        found = (stored.torch_dtype for stored in self.tensors.values())
        return frozenset(dtype for dtype in found if dtype is not None and dtype.is_floating_point)

    @property
    def widest_float(self) -> torch.dtype:
        """The dtype that holds every floating-point tensor without loss: the one in use, or the widest of several."""
        found = self.float_dtypes
        if len(found) == 1:
            return next(iter(found))
        return torch.float64 if torch.float64 in found else torch.float32

    def close(self) -> None:
        """Let go of the files."""
        self._open.clear()
        self._stack.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def same_bytes(left: Tensor, right: Tensor) -> bool:
    """True when two tensors of one shape and dtype hold the same bytes, NaNs included."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    if left.numel() == 0:
        return True
    if left.dtype.is_floating_point or left.dtype.is_complex:
        raw = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}
        kind = raw[left.element_size()]
        return bool(torch.equal(left.contiguous().view(kind), right.contiguous().view(kind)))
    return bool(torch.equal(left, right))
