"""The folders of one job: configs and headers of base and merged model from the start, weights as they pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from merge_adapter.checkpoint.folder import Folder
from merge_adapter.checkpoint.header import build_header
from merge_adapter.checkpoint.layout import Layout
from merge_adapter.checkpoint.output import OutputShard
from merge_adapter.merge import write_index
from merge_adapter.package import Packaged, package
from merge_adapter.plan import MergePlan
from merge_adapter.staging.needs import hashes_of, is_heavy
from merge_adapter.staging.window import Window, head_of, sparse_file
from merge_adapter.types import FileOrigin, MergeSettings, Repository, Resolved


@dataclass(frozen=True)
class Place:
    """Where things lie while a merge passes through."""

    base: Path
    """The base's configs, and its weight files at their full size, without data but for what is in use."""
    window: Window | None
    """Fetches into `base`; None for a base that is a folder of this machine, which is here whole."""
    frame: Path
    """The merged model's configs, and its weight files as planned, without data: what the gate opens."""
    merged: Path
    """What is published but for the weights."""
    shards: Path
    """Merged weights on their way."""
    packaged: Packaged
    """What `merged` held at first."""

    @contextmanager
    def bring(self, shard: OutputShard) -> Iterator[Path]:
        """The base's file that `shard` is a copy of, here for as long as the context lasts."""
        if self.window is not None:
            self.window.fetch(shard.source)
        try:
            yield self.base / shard.source
        finally:
            if self.window is not None:
                self.window.drop(shard.source)


def set_up(
    folder: Path, sources: Resolved, plan: MergePlan, layout: Layout, settings: MergeSettings
) -> Place:
    """Make the folders in the empty `folder`. Fetches configs, tokenizers and headers, and no weights."""
    repository = sources.base.repository
    base, frame, merged, shards = (folder / name for name in ("base", "frame", "merged", "shards"))
    for made in (frame, merged, shards):
        made.mkdir()
    window = None
    if repository.origin.repo_id is None:
        base = repository.folder(repository.files)
    else:
        base.mkdir()
        window = Window(repository, layout, base, hashes=hashes_of(sources))
        copy_small(repository, base)
    packaged = package(sources, plan, merged, settings=settings)
    for path in [path for path in merged.rglob("*") if path.is_file()]:
        link = frame / path.relative_to(merged)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    stored = {file.path: file for file in layout.files}
    for shard in plan.outputs:
        if shard.origin is FileOrigin.COPIED:
            head = head_of(repository, stored[shard.source])
        else:
            head, _ = build_header(shard.tensors, shard.metadata)
        sparse_file(frame / shard.path, head, shard.bytes)
    if plan.index is not None:
        write_index(plan, frame)
    return Place(base, window, frame, merged, shards, packaged)


def copy_small(repository: Repository, folder: Path) -> None:
    """Every file of `repository` but weights and what is hidden, below `folder`."""
    for path in repository.files:
        if is_heavy(path) or path.startswith(".") or (folder / path).exists():
            continue
        place = folder / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(repository.read(path))


def passing(sources: Resolved, place: Place) -> Resolved:
    """`sources` with the base read where it passes."""
    if place.window is None:
        return sources
    return replace(sources, base=replace(sources.base, repository=Folder(place.base)))
