"""Who gets disk, who waits, and that nobody waits for ever."""

from __future__ import annotations

import random
import threading
from queue import SimpleQueue

import pytest

from merge_adapter.staging.ledger import Halted, Ledger


def test_a_fetch_waits_for_what_is_taken_to_be_given_back() -> None:
    ledger = Ledger(30, {0: 10, 1: 10, 2: 10})
    ledger.take_base(0, 10)
    ledger.take_base(1, 10)
    ledger.take_output(0)
    assert ledger.taken == 30
    waiting = threading.Thread(target=ledger.take_output, args=(1,))
    waiting.start()
    ledger.drop_base(0)
    waiting.join()
    assert ledger.taken == ledger.peak == 30


def test_a_fetch_never_takes_the_room_of_a_merge_before_it() -> None:
    """Two bases that fill the disk would leave no room to merge either of them."""
    ledger = Ledger(20, {0: 10, 1: 10})
    ledger.take_base(0, 10)
    order: SimpleQueue[str] = SimpleQueue()

    def fetch() -> None:
        ledger.take_base(1, 10)
        order.put("base 1")

    thread = threading.Thread(target=fetch)
    thread.start()
    ledger.take_output(0)
    order.put("output 0")
    ledger.drop_base(0)
    ledger.drop_output(0)
    thread.join()
    assert [order.get(), order.get()] == ["output 0", "base 1"]


def test_halt_ends_every_wait() -> None:
    ledger = Ledger(10, {0: 10})
    ledger.take_base(0, 0)
    ledger.take_output(0)
    caught: list[bool] = []

    def fetch() -> None:
        with pytest.raises(Halted):
            ledger.take_base(1, 10)
        caught.append(True)

    ledger = Ledger(10, {0: 10, 1: 0})
    ledger.take_base(0, 0)
    ledger.take_output(0)
    thread = threading.Thread(target=fetch)
    thread.start()
    ledger.halt()
    thread.join()
    assert caught == [True]
    with pytest.raises(Halted):
        ledger.check()


@pytest.mark.parametrize("seed", range(20))
def test_any_units_pass_through_the_least_room_that_holds_each_alone(seed: int) -> None:
    """Sizes at random, a limit as small as it may be: all units come out, and the limit holds."""
    draw = random.Random(seed)
    sizes = [(draw.randint(0, 9), draw.randint(1, 9)) for _ in range(12)]
    limit = max(base + output for base, output in sizes)
    ledger = Ledger(limit, {number: output for number, (_, output) in enumerate(sizes)})
    fetched: SimpleQueue[int] = SimpleQueue()
    merged: SimpleQueue[int] = SimpleQueue()

    def fetch() -> None:
        for number, (base, _) in enumerate(sizes):
            ledger.take_base(number, base)
            fetched.put(number)

    def merge() -> None:
        for _ in sizes:
            number = fetched.get()
            ledger.take_output(number)
            merged.put(number)

    def send() -> None:
        for _ in sizes:
            number = merged.get()
            ledger.drop_base(number)
            ledger.drop_output(number)

    threads = [threading.Thread(target=work, daemon=True) for work in (fetch, merge, send)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)
    assert ledger.taken == 0
    assert ledger.peak <= limit
