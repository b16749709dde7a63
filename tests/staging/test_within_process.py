"""`merge-adapter run --disk-budget` as a process: what it takes of the disk, killed in the middle, twice at once."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from passing_world import World

from localhub.faults import Delay, FaultProxy, Rule
from merge_adapter.errors import ExitCode
from merge_adapter.staging.window import disk_use

WAIT_SECONDS = 240.0
FAST = ("--probe-tokens", "64")
Weights = Callable[[], dict[str, str]]


@contextmanager
def sampled(folder: Path) -> Iterator[list[int]]:
    """Bytes on the disk below `folder`, again and again."""
    found = [0]
    done = threading.Event()

    def look() -> None:
        while not done.wait(0.005):
            found.append(disk_use([folder]))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()


def test_the_disk_never_holds_more_than_the_budget(world: World, base: str, tmp_path: Path) -> None:
    """Work folders, the client's cache and xet's, from the first moment to the last; the budget is three shards."""
    adapter = world.adapter(base)
    home = tmp_path / "home"
    budget = world.budget(adapter, shards=3)
    whole = 2 * sum(path.stat().st_size for path in world.base_folder.glob("*.safetensors"))
    assert budget < world.budget(adapter, shards=0) + whole
    with sampled(home) as bytes_used:
        process = world.start(adapter, home, "--disk-budget", budget, *FAST)
        out, said = process.communicate(timeout=WAIT_SECONDS)
    assert process.returncode == ExitCode.DONE, said
    assert json.loads(out)["verification"]["verdict"] == "pass"
    assert 0 < max(bytes_used) <= budget
    assert list((home / "tmp").glob("merge-adapter-*/*")) == []  # nothing stays behind


def _killed(world: World, adapter: str, home: Path, rule: Rule, *options: object) -> None:
    """Start a run, and kill it when it waits at the first request that `rule` strikes."""
    with FaultProxy(world.url) as proxy:
        proxy.add(rule)
        process = world.start(adapter, home, *options, url=proxy.url)
        deadline = time.monotonic() + WAIT_SECONDS
        while not rule.struck and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.kill()
        _, said = process.communicate()
        assert rule.struck, said


@pytest.mark.parametrize("where", ["while a shard is sent", "at the commit"])
def test_a_run_that_is_killed_is_finished_by_the_next(
    world: World, base: str, tmp_path: Path, merged_weights: Weights, where: str
) -> None:
    """kill -9 leaves a draft without files, and a work folder; the next run fills that draft and clears up."""
    adapter = world.adapter(base)
    home = tmp_path / "home"
    budget = world.budget(adapter)
    paths = {"while a shard is sent": (r"/preupload/", 2), "at the commit": (r"/commit/", 0)}
    path, skip = paths[where]
    rule = Rule(Delay(WAIT_SECONDS), method="POST", path=path, skip=skip)
    _killed(world, adapter, home, rule, "--disk-budget", budget, "--no-verify")
    target = f"{adapter}-merged"
    assert world.pulls(target) == [(1, "draft")]
    assert world.weights(target, "refs/pr/1") == {}  # no half commit
    assert list((home / "tmp").glob("merge-adapter-*/.*"))
    process = world.start(adapter, home, "--disk-budget", budget, *FAST)
    _, said = process.communicate(timeout=WAIT_SECONDS)
    assert process.returncode == ExitCode.DONE, said
    assert world.pulls(target) == [(1, "open")]
    assert world.weights(target, "refs/pr/1") == merged_weights()
    assert list((home / "tmp").glob("merge-adapter-*/.*")) == []


def test_a_killed_run_of_the_whole_model_leaves_no_copy_of_it(
    world: World, base: str, tmp_path: Path
) -> None:
    """Without a budget the merged model lies in a work folder too, and the next run clears it."""
    adapter = world.adapter(base)
    home = tmp_path / "home"
    _killed(world, adapter, home, Rule(Delay(WAIT_SECONDS), method="POST", path=r"/commit/"), "--no-verify")
    assert list((home / "tmp").glob("merge-adapter-*/.*/*/merged/*.safetensors"))
    process = world.start(adapter, home, "--no-verify")
    _, said = process.communicate(timeout=WAIT_SECONDS)
    assert process.returncode == ExitCode.NOT_EQUIVALENT, said
    assert list((home / "tmp").glob("merge-adapter-*/.*")) == []


def test_two_at_once_make_one_pull_request(
    world: World, base: str, tmp_path: Path, merged_weights: Weights
) -> None:
    """On one machine, with one temporary folder: each has a work folder of its own."""
    adapter = world.adapter(base)
    budget = world.budget(adapter)
    runs = [world.start(adapter, tmp_path / "home", "--disk-budget", budget, *FAST) for _ in range(2)]
    said = [process.communicate(timeout=WAIT_SECONDS)[1] for process in runs]
    assert [process.returncode for process in runs] == [0, 0], said
    target = f"{adapter}-merged"
    assert [status for _, status in world.pulls(target) if status != "closed"] == ["open"]
    number = next(number for number, status in world.pulls(target) if status == "open")
    assert world.weights(target, f"refs/pr/{number}") == merged_weights()


def test_a_person_is_told_the_verdict_and_the_bytes(world: World, base: str, tmp_path: Path) -> None:
    """No folder is left to look into: what stands on the terminal has to do."""
    adapter = world.adapter(base)
    budget = world.budget(adapter)
    process = world.start(adapter, tmp_path / "home", "--disk-budget", budget, "--no-verify", json=False)
    out, said = process.communicate(timeout=WAIT_SECONDS)
    assert process.returncode == ExitCode.NOT_EQUIVALENT, said
    assert "The gate was not run" in out
    assert "created (draft)" in out
    assert "the Hub had" in out
    assert "Passed through in" in said


def test_too_small_a_budget_is_an_error_of_input(world: World, base: str, tmp_path: Path) -> None:
    adapter = world.adapter(base)
    process = world.start(adapter, tmp_path / "home", "--disk-budget", "1MB")
    _, said = process.communicate(timeout=WAIT_SECONDS)
    assert process.returncode == ExitCode.INPUT
    assert "The smallest budget that works is" in said
    assert not world.api.repo_exists(f"{adapter}-merged")


def test_a_size_that_is_none_is_an_error_of_input(world: World, tmp_path: Path) -> None:
    process = world.start("a/b", tmp_path / "home", "--disk-budget", "much")
    _, said = process.communicate(timeout=WAIT_SECONDS)
    assert process.returncode == ExitCode.INPUT
    assert "expected a size such as 6GB" in said
