"""The merged folder as it lies on the disk: which weight files, what they name, dtypes, index, strays."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from merge_adapter.errors import MalformedError, NotFoundError
from merge_adapter.types import DType
from merge_adapter.verify.findings import Finding, fault, note, warning
from merge_adapter.verify.models.storage import Checkpoint, Layout, local_layout, same_bytes
from merge_adapter.verify.rounding import is_narrower

_DTYPES = {DType.FLOAT32: torch.float32, DType.BFLOAT16: torch.bfloat16, DType.FLOAT16: torch.float16}


@dataclass(frozen=True)
class FilesEvidence:
    """What the headers say."""

    findings: tuple[Finding, ...]
    layout: Layout | None
    """None when the folder cannot be loaded at all."""
    tensors: int = 0
    bytes: int = 0
    dtypes: tuple[str, ...] = ()


def judge_files(
    merged: Path, base: Checkpoint, *, dtype: DType, loose: frozenset[str] = frozenset()
) -> FilesEvidence:
    """Headers and index of the merged folder against the base's.

    `loose` are tensors of the base that its architecture does not load; they may be left out.
    """
    try:
        found = local_layout(merged)
        held = Checkpoint(merged, found.files)
    except (NotFoundError, MalformedError) as error:
        return FilesEvidence(
            (fault("files", "", f"the merged weights cannot be read: {error.message}"),), None
        )
    with held:
        findings = [
            *_index(found, held),
            *_strays(merged, found),
            *_other_formats(merged),
            *_tensors(held, base, dtype, loose),
        ]
        total = sum((merged / file).stat().st_size for file in found.files)
        dtypes = tuple(sorted({stored.dtype for stored in held.tensors.values()}))
        return FilesEvidence(tuple(findings), found, len(held.tensors), total, dtypes)


def _index(found: Layout, held: Checkpoint) -> Iterable[Finding]:
    for name in held.duplicates:
        yield fault("files", name, "lies in more than one shard")
    if found.index is None:
        return
    listed, present = set(found.weight_map), set(held.tensors)
    for name in sorted(listed - present)[:5]:
        yield fault(
            "files", name, f"is in {found.index} but in none of its shards ({len(listed - present)} such)"
        )
    for name in sorted(present - listed)[:5]:
        yield fault(
            "files",
            name,
            f"lies in {held.tensors[name].file} but not in the index ({len(present - listed)} such)",
        )
    for name in sorted(listed & present):
        if held.tensors[name].file != found.weight_map[name]:
            yield fault(
                "files",
                name,
                f"the index says {found.weight_map[name]}, it lies in {held.tensors[name].file}",
            )
    size = sum(_bytes(held, name) for name in present)
    if found.total_size is None:
        yield warning("files", found.index, "has no metadata.total_size")
    elif found.total_size != size:
        text = f"metadata.total_size is {found.total_size:,}, the tensors take {size:,} bytes"
        yield fault("files", found.index, text)


def _bytes(held: Checkpoint, name: str) -> int:
    tensor = held[name]
    return tensor.numel() * tensor.element_size()


def _strays(folder: Path, found: Layout) -> Iterable[Finding]:
    used = {*found.files, found.index}
    for path in sorted(folder.iterdir()):
        if path.name in used or not path.is_file():
            continue
        if path.name in ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"):
            text = "left in the merged folder: transformers would load the adapter a second time"
            yield fault("files", path.name, text)
        elif path.name.endswith((".safetensors", ".safetensors.index.json")) or path.name.startswith(
            "pytorch_model"
        ):
            yield fault(
                "files",
                path.name,
                "holds or names weights beside those the model loads: unmerged or stale ones",
            )


def _other_formats(folder: Path) -> Iterable[Finding]:
    """Copies for other runtimes, wherever they lie: nobody has merged those."""
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".h5", ".msgpack", ".onnx", ".gguf", ".ot", ".tflite") and path.is_file():
            text = "weights in another format, which this gate does not judge; were they made from the merged ones?"
            yield warning("files", path.relative_to(folder).as_posix(), text)


def _tensors(held: Checkpoint, base: Checkpoint, dtype: DType, loose: frozenset[str]) -> Iterable[Finding]:
    asked = _DTYPES.get(dtype)
    for name, stored in held.tensors.items():
        actual = stored.torch_dtype
        if actual is None or not actual.is_floating_point:
            continue
        origin = base.tensors.get(name)
        reference = origin.torch_dtype if origin is not None else None
        if asked is not None:
            if actual != asked:
                # a wider one loses nothing, and transformers itself keeps some modules of some models in fp32
                say = fault if is_narrower(actual, asked) else warning
                yield say("files", name, f"stored as {_spelled(actual)}, asked for {_spelled(asked)}")
        elif reference is not None and reference.is_floating_point and is_narrower(actual, reference):
            text = f"stored as {_spelled(actual)}, the base holds {_spelled(reference)}; if that is meant, say --dtype"
            yield fault("files", name, text)
        elif reference is not None and actual != reference:
            yield warning(
                "files", name, f"stored as {_spelled(actual)}, the base holds {_spelled(reference)}"
            )
    missing = [name for name in base.tensors if name not in held and name in loose]
    if missing:
        text = f"{len(missing)} tensors of the base that its architecture does not load are left out"
        yield note("files", missing[0], text)


def unloaded_tensors(
    merged: Path, found: Layout, base: Checkpoint, names: Iterable[str]
) -> Iterable[Finding]:
    """Tensors that no loaded model shows (the loader reports them as unexpected), byte for byte in the files."""
    with Checkpoint(merged, found.files) as held:
        for name in names:
            if name in held and name in base and not same_bytes(held[name], base[name]):
                yield fault("files", name, "differs from the base outside the adapter's targets")
            elif name in held and name not in base:
                yield fault("files", name, "is in neither the base nor the adapter, and no module loads it")


def _spelled(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
