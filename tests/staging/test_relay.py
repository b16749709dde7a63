"""The four stages side by side: order, errors, and that nothing is left running."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest

from merge_adapter.checkpoint.output import OutputShard
from merge_adapter.staging.ledger import Ledger
from merge_adapter.staging.relay import Made, Stages, relay
from merge_adapter.staging.units import Unit
from merge_adapter.types import FileOrigin, OutputFile


def unit(number: int) -> Unit:
    name = f"{number}.safetensors"
    return Unit((OutputShard(name, 10, (), FileOrigin.MERGED, name, {}),), (name,), 10)


class Log:
    """Stages that note what they did."""

    def __init__(self) -> None:
        self.done: list[tuple[str, str]] = []
        self._lock = threading.Lock()

    def note(self, stage: str, unit: Unit) -> None:
        with self._lock:
            self.done.append((stage, unit.name))

    @property
    def stages(self) -> Stages:
        def merge(one: Unit) -> Made:
            self.note("merge", one)
            return (OutputFile(one.name, 10, "", FileOrigin.MERGED),)

        return Stages(
            fetch=lambda one: self.note("fetch", one),
            merge=merge,
            judge=lambda one, _: self.note("judge", one),
            release=lambda one: self.note("release", one),
            send=lambda one, _: self.note("send", one),
        )


def ledger(count: int, limit: int = 30) -> Ledger:
    return Ledger(limit, dict.fromkeys(range(count), 10))


def test_every_unit_passes_every_stage_in_order() -> None:
    log, units = Log(), [unit(number) for number in range(5)]
    relay(units, log.stages, ledger(5))
    for stage in ("fetch", "merge", "judge", "release", "send"):
        assert [name for kind, name in log.done if kind == stage] == [one.name for one in units]
    for one in units:
        assert [kind for kind, name in log.done if name == one.name] == [
            "fetch", "merge", "judge", "release", "send",
        ]  # fmt: skip


def test_a_shard_is_never_sent_before_it_was_judged() -> None:
    """The judge refuses the third: the first two may have left, the third and those behind it have not."""
    log, units = Log(), [unit(number) for number in range(5)]

    def judge(one: Unit, _: Made) -> None:
        if one is units[2]:
            raise ValueError("not what it must be")

    with pytest.raises(ValueError, match="not what it must be"):
        relay(units, replace(log.stages, judge=judge), ledger(5))
    sent = {name for kind, name in log.done if kind == "send"}
    assert sent <= {units[0].name, units[1].name}


@pytest.mark.parametrize("stage", ["fetch", "merge", "judge", "release", "send"])
def test_the_error_of_any_stage_ends_all_of_them(stage: str) -> None:
    log, units = Log(), [unit(number) for number in range(4)]

    def fail(one: Unit, *_: object) -> Made:
        if one is units[1]:
            raise OSError(f"{stage} broke")
        return (OutputFile(one.name, 10, "", FileOrigin.MERGED),)

    before = threading.active_count()
    with pytest.raises(OSError, match=f"{stage} broke"):
        relay(units, replace(log.stages, **{stage: fail}), ledger(4))
    assert threading.active_count() == before


def test_an_interruption_ends_all_of_them() -> None:
    log, units = Log(), [unit(number) for number in range(4)]

    def merge(one: Unit) -> Made:
        raise KeyboardInterrupt

    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        relay(units, replace(log.stages, merge=merge), ledger(4))
    assert threading.active_count() == before


def test_no_units_are_soon_done() -> None:
    assert relay([], Log().stages, ledger(0)).total >= 0
