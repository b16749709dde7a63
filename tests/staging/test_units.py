"""Which shards must be here at the same time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from merge_adapter.checkpoint.folder import Folder
from merge_adapter.checkpoint.layout import Layout, find_layout
from merge_adapter.hub import Hub
from merge_adapter.pipeline import MergeRequest, plan_merge
from merge_adapter.plan import MergePlan
from merge_adapter.resolve import SourceRequest
from merge_adapter.staging.units import Schedule, schedule

Planned = tuple[MergePlan, Layout]


@pytest.fixture
def planned(sharded_base: Path, lm_adapter: Path) -> Planned:
    request = MergeRequest(SourceRequest((str(lm_adapter),), base_model=str(sharded_base)))
    _, plan = plan_merge(request, hub=Hub("http://127.0.0.1:9"))
    return plan, find_layout(Folder(sharded_base))


def names(found: Schedule) -> list[list[str]]:
    return [[shard.path for shard in unit.outputs] for unit in found.units]


def test_each_shard_passes_alone_where_nothing_binds_it(planned: Planned) -> None:
    plan, layout = planned
    found = schedule(plan, layout, fetched=True, copied=frozenset())
    assert names(found) == [[shard.path] for shard in plan.outputs]
    assert [unit.sources for unit in found.units] == [(shard.source,) for shard in plan.outputs]
    largest = max(shard.bytes for shard in plan.outputs)
    assert found.least_bytes == 2 * largest


def test_a_local_base_needs_no_room(planned: Planned) -> None:
    plan, layout = planned
    found = schedule(plan, layout, fetched=False, copied=frozenset())
    assert {unit.source_bytes for unit in found.units} == {0}
    assert found.least_bytes == max(shard.bytes for shard in plan.outputs)


def test_what_the_hub_copies_is_in_no_unit(planned: Planned) -> None:
    plan, layout = planned
    first = plan.outputs[0].path
    found = schedule(plan, layout, fetched=True, copied=frozenset({first}))
    assert [first] not in names(found)
    assert [shard.path for shard in found.copied] == [first]


def test_shards_that_are_judged_together_pass_together(planned: Planned) -> None:
    plan, layout = planned
    paths = [shard.path for shard in plan.outputs]
    pairs = [frozenset(paths[1:3]), frozenset(paths[2:4])]
    found = schedule(plan, layout, fetched=True, copied=frozenset(), together=pairs)
    assert names(found) == [[paths[0]], paths[1:4], *([path] for path in paths[4:])]
    assert found.largest is not None
    assert found.largest.outputs == plan.outputs[1:4]
    assert "2 more that belong together" in found.largest.name


def test_a_change_that_reads_another_shard_brings_it_along(planned: Planned) -> None:
    """As a tied head does that comes out untied: it starts from the embedding in the first shard."""
    plan, layout = planned
    last, first = plan.outputs[-1], plan.outputs[0]
    at = next(
        number
        for number, step in enumerate(plan.steps)
        if step.change.writes[0].name in {spec.name for spec in last.tensors}
    )
    change = replace(plan.steps[at].change, source=first.tensors[0].name)
    steps = (*plan.steps[:at], replace(plan.steps[at], change=change), *plan.steps[at + 1 :])
    found = schedule(replace(plan, steps=steps), layout, fetched=True, copied=frozenset({first.path}))
    assert found.units[-1].sources == (first.source, last.source)
    assert found.units[-1].source_bytes == sum(
        file.bytes for file in layout.files if file.path in found.units[-1].sources
    )


def test_the_plans_of_all_units_are_the_plan(planned: Planned) -> None:
    plan, layout = planned
    parts = [unit.part_of(plan) for unit in schedule(plan, layout, fetched=True, copied=frozenset()).units]
    assert sum(len(part.steps) for part in parts) == len(plan.steps)
    assert tuple(shard for part in parts for shard in part.outputs) == plan.outputs
    assert all(part.index is None for part in parts)
