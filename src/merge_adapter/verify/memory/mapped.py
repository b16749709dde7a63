"""Mapped weights are let go once read, so that the memory in use does not grow with the model."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

_PRESENT_OR_SWAPPED = 3 << 62
_SWAPPED = 1 << 62
_OF_A_FILE = 1 << 61
"""Bits of an entry in /proc/self/pagemap (Linux, Documentation/admin-guide/mm/pagemap.rst)."""

_ENTRY = 8
"""Bytes of one entry."""

SMALLEST = 1 << 18
"""Bytes below which a tensor is not worth a system call."""


class Pager(Protocol):
    """Brings weights to files that are mapped already, when they are about to be read."""

    def need(self, tensor: Tensor) -> None:
        """Return when the data of `tensor`, if it lies in such a file, is there. What was needed before may go."""
        ...

    def served(self, folder: Path, address: Path) -> AbstractContextManager[None]:
        """While the context lasts, do the same for a process that has `folder` open and asks at socket `address`."""
        ...


_pagers: list[Pager] = []


@contextmanager
def paged(pager: Pager) -> Iterator[None]:
    """While the context lasts, ask `pager` before weights are read. One at a time in a process."""
    _pagers.append(pager)
    try:
        yield
    finally:
        _pagers.remove(pager)


def is_paged() -> bool:
    """Whether weights may be absent until they are needed."""
    return bool(_pagers)


def served(folder: Path, address: Path) -> AbstractContextManager[None]:
    """Let another process, which has `folder` open, ask the pager in force at the Unix socket `address`."""
    return _pagers[-1].served(folder, address) if _pagers else nullcontext()


def need(tensor: Tensor) -> None:
    """Make sure that the data of `tensor` is there; does nothing where all of it always is."""
    for pager in _pagers:
        pager.need(tensor)


def release(tensor: Tensor) -> None:
    """Drop the resident pages of `tensor` when every one of them is a clean page of a mapped file.

    They come back from the page cache when read again. Pages that were written to, and memory of any other kind, are
    left alone; so is everything on systems that cannot tell.
    """
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        return
    size = tensor.numel() * tensor.element_size()
    if size < SMALLEST:
        return
    page = mmap.PAGESIZE
    first, last = -(-tensor.data_ptr() // page), (tensor.data_ptr() + size) // page
    system = _system()
    if system is None or last <= first:
        return
    pagemap, madvise = system
    raw = os.pread(pagemap, (last - first) * _ENTRY, first * _ENTRY)
    if len(raw) != (last - first) * _ENTRY:
        return
    entries = torch.frombuffer(bytearray(raw), dtype=torch.int64)
    present = entries & _signed(_PRESENT_OR_SWAPPED) != 0
    of_a_file = (entries & _OF_A_FILE != 0) & (entries & _SWAPPED == 0)
    if bool((present & of_a_file).any()) and bool((of_a_file | ~present).all()):
        madvise(first * page, (last - first) * page, mmap.MADV_DONTNEED)


def _signed(bits: int) -> int:
    """The int64 with the bits of an unsigned number."""
    return bits - (1 << 64) if bits >> 63 else bits


@cache
def _system() -> tuple[int, Any] | None:
    """/proc/self/pagemap, open, and the C library's madvise; None where one of them is missing."""
    if sys.platform != "linux" or not hasattr(mmap, "MADV_DONTNEED"):
        return None
    try:
        pagemap = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        madvise = ctypes.CDLL(None, use_errno=True).madvise
    except (OSError, AttributeError):
        return None
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return pagemap, madvise
