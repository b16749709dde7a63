"""The layout of the merged checkpoint: the base's own, with the changed and added tensors in their places."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from merge_adapter.checkpoint.dtypes import TARGETS
from merge_adapter.checkpoint.header import build_header
from merge_adapter.checkpoint.layout import Layout, WeightFile
from merge_adapter.methods.change import FLOATING, TensorSpec
from merge_adapter.types import DType, FileOrigin

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class OutputShard:
    """One weight file of the merged folder."""

    path: str
    bytes: int
    tensors: tuple[TensorSpec, ...]
    """In the order of their data, as they are written."""
    origin: FileOrigin
    """COPIED when it is the base's file byte for byte, MERGED when a tensor was changed, else WRITTEN."""
    source: str = ""
    """The base's file with the same tensors; "" when there is none."""
    metadata: Mapping[str, str] = field(default_factory=dict)


def lay_out(
    layout: Layout, base: Mapping[str, TensorSpec], written: Iterable[TensorSpec], dtype: DType
) -> tuple[OutputShard, ...]:
    """The output's files: names, shard cuts and tensor order of the base.

    `base` holds the base's tensors as a merge sees them (dequantised where they are); tensors of the files
    that it lacks are left out. `written` are the changed and added tensors; added ones go to the end of the last file.
    """
    changed = {spec.name: spec for spec in written}
    added = [spec for name, spec in changed.items() if name not in base]
    shards = []
    for file in layout.files:
        specs = [changed.get(spec.name, base[spec.name]) for spec in file.specs if spec.name in base]
        if file is layout.files[-1]:
            specs += added
        touched = any(spec.name in changed for spec in specs)
        shards.append(_shard(file, [target_spec(spec, dtype) for spec in specs], touched=touched))
    return tuple(shards)


def target_spec(spec: TensorSpec, dtype: DType) -> TensorSpec:
    """The tensor in the dtype asked for; integers, booleans and AUTO leave it as it is."""
    if dtype is DType.AUTO or spec.dtype not in FLOATING:
        return spec
    return replace(spec, dtype=TARGETS[dtype])


def index_text(shards: Iterable[OutputShard], metadata: Mapping[str, Any]) -> bytes:
    """The index of these shards. `metadata` is the base index's own; its totals are counted anew."""
    shards = tuple(shards)
    totals: dict[str, Any] = {"total_size": sum(spec.nbytes for shard in shards for spec in shard.tensors)}
    if "total_parameters" in metadata:
        totals["total_parameters"] = sum(spec.elements for shard in shards for spec in shard.tensors)
    weight_map = {spec.name: shard.path for shard in shards for spec in shard.tensors}
    content = {"metadata": {**metadata, **totals}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def _shard(file: WeightFile, specs: list[TensorSpec], *, touched: bool) -> OutputShard:
    path = _safetensors_name(file.path) if file.pickled else file.path
    if not touched and not file.pickled and not file.derived and tuple(specs) == file.specs:
        return OutputShard(path, file.bytes, tuple(specs), FileOrigin.COPIED, file.path, file.header.metadata)
    metadata = file.header.metadata or {"format": "pt"}
    size = build_header(specs, metadata)[1].file_bytes
    origin = FileOrigin.MERGED if touched else FileOrigin.WRITTEN
    return OutputShard(path, size, tuple(specs), origin, file.path, metadata)


def _safetensors_name(path: str) -> str:
    """`pytorch_model-00001-of-00002.bin` -> `model-00001-of-00002.safetensors`."""
    folder, slash, name = path.rpartition("/")
    stem = name.removesuffix(".bin").replace("pytorch_model", "model", 1)
    return f"{folder}{slash}{stem}.safetensors"
