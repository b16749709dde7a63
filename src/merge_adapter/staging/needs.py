"""What a merge needs of a disk that cannot hold base and merged model, and whether it can be made there at all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from merge_adapter.checkpoint.base import read_base
from merge_adapter.checkpoint.layout import Layout, find_layout
from merge_adapter.checkpoint.quantization import quantization_of
from merge_adapter.errors import InputError, StorageError
from merge_adapter.methods.refuse import SOFT_PROMPTS
from merge_adapter.plan import MergePlan
from merge_adapter.sizes import human_bytes
from merge_adapter.staging.units import Schedule, schedule
from merge_adapter.types import FileOrigin, MergeSettings, Resolved, Strategy

if TYPE_CHECKING:
    from merge_adapter.hub import HubRepository

_ROOM = 4 << 20
"""Bytes for what is small and hard to foretell: reports, the upload's bookkeeping, file system blocks."""
_HEAVY = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf", ".ot", ".tflite")
_LEAVE_OUT = "Leave the disk budget out: then base and merged model must fit on the disk."


@dataclass(frozen=True)
class Needs:
    """Disk in bytes."""

    whole: int
    """What the merge takes without a budget: base, adapters, merged model."""
    fixed: int
    """What is here from the beginning to the end: adapters, tokenizers, configs, headers."""


def measure(sources: Resolved, plan: MergePlan, layout: Layout) -> Needs:
    """What the merge takes, from file lists and headers alone. Local sources are there already and cost nothing."""
    repositories = [one.repository for one in sources.adapters]
    repositories += [sources.base.repository]
    repositories += [sources.tokenizer] if sources.tokenizer is not None else []
    small = sum(
        size for repository in repositories for path, size in repository.files.items() if not is_heavy(path)
    )
    adapters = sum(
        file.bytes
        for file in plan.adapters
        if any(one.repository.origin.repo_id is not None for one in sources.adapters)
    )
    headers = sum(-(-file.header.data_start // 4096) * 4096 for file in layout.files)
    remote = sources.base.repository.origin.repo_id is not None
    # small files lie in the client's cache, beside the base's headers, and in the merged folder
    fixed = adapters + 3 * small + 3 * headers + _ROOM
    return Needs(whole=fixed + plan.disk_bytes + (layout.bytes if remote else 0), fixed=fixed)


def exceeds(budget: int, sources: Resolved, plan: MergePlan, settings: MergeSettings) -> bool:
    """Whether base and merged model together need more disk than `budget`."""
    return measure(sources, plan, weights_of(sources, settings)).whole > budget


def weights_of(sources: Resolved, settings: MergeSettings) -> Layout:
    """The base's weight files."""
    return read_base(sources.base, settings).layout


def check_possible(sources: Resolved, plan: MergePlan, layout: Layout) -> None:
    """Raise InputError, with the reason, for a merge that needs the whole model at once."""
    reason = _obstacle(sources, plan, layout)
    if reason:
        raise InputError(f"the merge cannot be made within a disk budget: {reason}", hint=_LEAVE_OUT)


def _obstacle(sources: Resolved, plan: MergePlan, layout: Layout) -> str:
    """Why the merge needs the whole model at once; "" where shards can pass through."""
    if plan.strategy is Strategy.MEMORY:
        return f"this adapter is merged on the loaded model ({plan.strategy_reason})"
    if plan.view is not None:
        return "the base is merged in another form than its files have, layers replicated"
    if quantization_of(sources.base.config) is not None:
        return "the base is stored quantised, and has to be here whole to be dequantised"
    if any(file.pickled for file in layout.files):
        return "the base's weights are pickled files, which can only be read whole"
    if sources.adapter.method in SOFT_PROMPTS:
        return "a soft prompt is judged on the whole model"
    return ""


def passage(sources: Resolved, plan: MergePlan, layout: Layout) -> Schedule:
    """What has to be here together for the merge alone. The gate, once it is open, may join more of it."""
    remote = sources.base.repository.origin.repo_id is not None
    return schedule(plan, layout, fetched=remote, copied=frozenset(copied_by_hub(sources, plan)))


def least_budget(sources: Resolved, plan: MergePlan) -> int | None:
    """The smallest disk budget in bytes, as far as file lists and headers tell; None where there is none."""
    layout = find_layout(sources.base.repository)
    if _obstacle(sources, plan, layout):
        return None
    return measure(sources, plan, layout).fixed + passage(sources, plan, layout).least_bytes


def as_option(budget: int) -> str:
    """As it is written after --disk-budget; rounded up, so that it does work."""
    return f"{-(-budget // 1_000_000)}MB"


def check_budget(budget: int, needs: Needs, units: Schedule) -> None:
    """Raise StorageError, naming the smallest budget that works, when `budget` is below it."""
    least = needs.fixed + units.least_bytes
    if budget >= least:
        return
    unit = units.largest
    what = f"{unit.name} with the part of the base that it takes" if unit is not None else "the small files"
    raise StorageError(
        f"the disk budget of {human_bytes(budget)} is too small: {what} needs {human_bytes(least - needs.fixed)}, and "
        f"{human_bytes(needs.fixed)} are needed throughout",
        hint=f"The smallest budget that works is {as_option(least)}. No weights of the base were downloaded.",
    )


def copied_by_hub(sources: Resolved, plan: MergePlan) -> Mapping[str, str]:
    """Outputs without a change that the Hub can copy from the base by itself, with their sha256."""
    base = _on_hub(sources)
    if base is None:
        return {}
    found = {}
    for shard in plan.outputs:
        entry = base.entries.get(shard.source)
        if shard.origin is FileOrigin.COPIED and entry is not None and entry.lfs and entry.xet_hash:
            found[shard.path] = entry.lfs.sha256
    return found


def hashes_of(sources: Resolved) -> Mapping[str, str]:
    """The sha256 that the Hub states for the base's large files."""
    base = _on_hub(sources)
    if base is None:
        return {}
    return {path: entry.lfs.sha256 for path, entry in base.entries.items() if entry.lfs}


def is_heavy(path: str) -> bool:
    """Whether a file holds weights, of whatever library."""
    return path.endswith(_HEAVY)


def _on_hub(sources: Resolved) -> HubRepository | None:
    from merge_adapter.hub import HubRepository

    repository = sources.base.repository
    return repository if isinstance(repository, HubRepository) else None
