"""Ties that the checkpoint itself undoes: both parameters on disk, with different values.

transformers ties what the config says is tied, unless the checkpoint holds both tensors and they differ; flan-t5 and
umt5 are stored so. A sample is compared first, since two tensors that were trained apart differ everywhere; where the
sample is equal, every byte is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from merge_adapter.checkpoint.layout import Layout, WeightFile, find_layout
from merge_adapter.names.conversion import ConvertedNames
from merge_adapter.types import Repository

_SAMPLES = 16
_SAMPLE_BYTES = 64 << 10
_PIECE = 16 << 20
"""Bytes that are read at a time where every one counts."""


def without_stored_apart(names: ConvertedNames, repository: Repository) -> ConvertedNames:
    """The same map, with parameters that are on disk under values of their own tied to nothing."""
    sources = getattr(names.model, "all_tied_weights_keys", {})
    pairs = {
        target: (names.renamed[target], names.renamed[source])
        for target, source in sources.items()
        if target in names.renamed and source in names.renamed and target in names.shared
    }
    if not pairs:
        return names
    layout = find_layout(repository)
    pairs = {  # a parameter that is not on disk as it is has no values of its own there
        target: pair for target, pair in pairs.items() if set(pair) <= set(layout.specs)
    }
    apart = {target for target, (one, other) in pairs.items() if _differ(repository, layout, one, other)}
    shared = {
        name: tuple(other for other in others if other not in apart)
        for name, others in names.shared.items()
        if name not in apart
    }
    return replace(names, shared={name: others for name, others in shared.items() if others})


def _differ(repository: Repository, layout: Layout, one: str, other: str) -> bool:
    left, right = layout.specs[one], layout.specs[other]
    if (left.dtype, left.shape) != (right.dtype, right.shape):
        return True
    files = layout.home[one], layout.home[other]
    if any(file.pickled for file in files):
        return _pickled_differ(repository, layout, one, other)
    starts = [_offset(file, name) for file, name in zip(files, (one, other), strict=True)]
    for begin, length in (*_samples(left.nbytes), *_pieces(left.nbytes)):
        parts = [
            repository.read(file.path, offset=start + begin, length=length)
            for file, start in zip(files, starts, strict=True)
        ]
        if parts[0] != parts[1]:
            return True
    return False


def _samples(size: int) -> Iterator[tuple[int, int]]:
    """`(begin, length)` of some bytes of `size`, spread over all of them."""
    step = max(size // _SAMPLES, 1)
    for begin in range(0, size, step):
        yield begin, min(_SAMPLE_BYTES, step, size - begin)


def _pieces(size: int) -> Iterator[tuple[int, int]]:
    """`(begin, length)` of all bytes."""
    for begin in range(0, size, _PIECE):
        yield begin, min(_PIECE, size - begin)


def _pickled_differ(repository: Repository, layout: Layout, one: str, other: str) -> bool:
    import torch

    from merge_adapter.checkpoint.reader import StoredWeights

    with StoredWeights(repository, layout) as weights:
        return not torch.equal(weights.read(one), weights.read(other))


def _offset(file: WeightFile, name: str) -> int:
    offsets: Mapping[str, int] = {stored.spec.name: stored.offset for stored in file.header.tensors}
    return offsets[name]
