"""Which shards must be on the disk at the same time.

A unit is the smallest set of output shards that can be made and judged on its own, with the shards of the base that
this takes. Mostly it is one of each. It grows where a change writes tensors of several shards, reads one shard to write
another (a tied head that comes out untied), or where the gate must see tensors of several shards at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from merge_adapter.checkpoint.layout import Layout
from merge_adapter.checkpoint.output import OutputShard
from merge_adapter.plan import MergePlan


@dataclass(frozen=True)
class Unit:
    """Shards that are here together."""

    outputs: tuple[OutputShard, ...]
    """What is written."""
    sources: tuple[str, ...]
    """Files of the base that this takes."""
    source_bytes: int
    """Of those that have to be fetched."""

    @property
    def output_bytes(self) -> int:
        return sum(shard.bytes for shard in self.outputs)

    @property
    def bytes(self) -> int:
        """Disk that the unit needs when nothing else is there."""
        return self.source_bytes + self.output_bytes

    @property
    def name(self) -> str:
        """For messages: the files that it writes."""
        paths = [shard.path for shard in self.outputs]
        return paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more that belong together"

    def part_of(self, plan: MergePlan) -> MergePlan:
        """The plan of this unit alone."""
        written = {spec.name for shard in self.outputs for spec in shard.tensors}
        steps = tuple(step for step in plan.steps if any(spec.name in written for spec in step.change.writes))
        return replace(
            plan,
            steps=steps,
            outputs=self.outputs,
            index=None,
            bytes_read=self.source_bytes,
            bytes_written=self.output_bytes,
        )


@dataclass(frozen=True)
class Schedule:
    """All units in the order of their files, and what needs none."""

    units: tuple[Unit, ...]
    copied: tuple[OutputShard, ...]
    """Shards without a change: copied by the Hub itself, never here."""

    @property
    def largest(self) -> Unit | None:
        """The unit that needs most; None when nothing has to be here."""
        return max(self.units, key=lambda unit: unit.bytes, default=None)

    @property
    def least_bytes(self) -> int:
        """The smallest disk on which this can be done, files that are here for the whole time not counted."""
        return self.largest.bytes if self.largest is not None else 0


def schedule(
    plan: MergePlan,
    base: Layout,
    *,
    fetched: bool,
    copied: frozenset[str],
    together: Iterable[frozenset[str]] = (),
    wanted: Mapping[str, frozenset[str]] | None = None,
) -> Schedule:
    """Units for `plan`.

    `fetched` says whether the base has to be fetched; `copied` are paths of outputs that the Hub copies; `together` are
    sets of outputs that are to be judged at once; `wanted` names, for an output, more files of the base that it takes.
    """
    made = [shard for shard in plan.outputs if shard.path not in copied]
    home = {spec.name: shard.path for shard in made for spec in shard.tensors}
    sources: dict[str, set[str]] = {shard.path: {shard.source} for shard in made}
    groups = _Groups(home[name] for name in home)
    for step in plan.steps:
        written = sorted({home[spec.name] for spec in step.change.writes})
        groups.join(written)
        for path in written:
            sources[path] |= {base.home[name].path for name in step.change.reads if name in base.home}
    for paths in together:
        groups.join(sorted(path for path in paths if path in sources))
    for path, more in (wanted or {}).items():
        if path in sources:
            sources[path] |= more
    by_source: dict[str, list[str]] = {}
    for path, files in sources.items():
        for file in files:
            by_source.setdefault(file, []).append(path)
    for paths_of_source in by_source.values():
        groups.join(paths_of_source)
    sizes = {file.path: file.bytes for file in base.files}
    units = []
    for members in groups.sets([shard.path for shard in made]):
        needed = sorted({file for path in members for file in sources[path]})
        units.append(
            Unit(
                tuple(shard for shard in made if shard.path in members),
                tuple(needed),
                sum(sizes[file] for file in needed) if fetched else 0,
            )
        )
    return Schedule(tuple(units), tuple(shard for shard in plan.outputs if shard.path in copied))


class _Groups:
    """Disjoint sets of paths that grow together."""

    def __init__(self, paths: Iterable[str]) -> None:
        self._parent = {path: path for path in paths}

    def join(self, paths: Iterable[str]) -> None:
        first, *others = [*paths] or [""]
        for path in others:
            self._parent[self._root(path)] = self._root(first)

    def sets(self, order: Iterable[str]) -> list[set[str]]:
        """The sets, in the order in which `order` first meets them."""
        found: dict[str, set[str]] = {}
        for path in order:
            found.setdefault(self._root(path), set()).add(path)
        return list(found.values())

    def _root(self, path: str) -> str:
        self._parent.setdefault(path, path)
        while self._parent[path] != path:
            path = self._parent[path]
        return path
