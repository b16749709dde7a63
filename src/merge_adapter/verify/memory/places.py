"""Where in which file the weights of a loaded model lie: by the mappings of this process, not by names."""

from __future__ import annotations

import math
import sys
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

_MAPS = Path("/proc/self/maps")


@dataclass(frozen=True)
class Place:
    """A run of bytes in a file of the folder."""

    file: str
    offset: int
    """Of the tensor's first element, in bytes."""
    bytes: int
    """From the first element to the end of the last, gaps included."""


class Places:
    """The mappings of one folder's files at the moment it is made. A tensor that was copied lies in none of them."""

    def __init__(self, folder: Path) -> None:
        self._regions: list[tuple[int, int, int, str]] = []
        # links are followed by who maps a file, so that the mapping names what they lead to
        names = {
            str(path.resolve()): path.relative_to(folder).as_posix() for path in folder.rglob("*.safetensors")
        }
        for line in _MAPS.read_text(encoding="utf-8", errors="replace").splitlines() if supported() else ():
            parts = line.split(maxsplit=5)
            if len(parts) < 6 or parts[5] not in names:
                continue
            first, last = (int(bound, 16) for bound in parts[0].split("-"))
            self._regions.append((first, last, int(parts[2], 16), names[parts[5]]))
        self._regions.sort()
        self._firsts = [region[0] for region in self._regions]

    def find(self, tensor: Tensor) -> Place | None:
        """Where `tensor` lies; None for one that lies in memory alone."""
        if tensor.device.type != "cpu" or tensor.is_meta or not tensor.numel():
            return None
        address, length = tensor.data_ptr(), span(tensor)
        at = bisect_right(self._firsts, address) - 1
        if at < 0:
            return None
        first, last, offset, file = self._regions[at]
        return Place(file, offset + address - first, length) if address + length <= last else None


def supported() -> bool:
    """Whether this system tells what is mapped where."""
    return sys.platform == "linux" and _MAPS.exists()


def span(tensor: Tensor) -> int:
    """Bytes from the first element of a tensor to the end of its last."""
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (reach + 1) * tensor.element_size()


def same_in(path: Path, place: Place, like: Tensor) -> Tensor:
    """The tensor that lies at `place` in another file of the same layout, mapped, with the form of `like`."""
    size = path.stat().st_size
    whole = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    part = whole[place.offset : place.offset + place.bytes]
    if place.offset % like.element_size():
        part = part.clone()  # elements must lie at multiples of their size
    elements = part.view(like.dtype)
    assert elements.numel() == math.ceil(place.bytes / like.element_size())
    return elements.as_strided(like.shape, like.stride(), elements.storage_offset())
