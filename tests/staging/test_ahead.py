"""Files that are fetched before they are asked for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from passing_world import World

from merge_adapter.errors import HubError
from merge_adapter.pipeline import MergeRequest, merge_to_folder
from merge_adapter.resolve import SourceRequest
from merge_adapter.staging.ahead import Ahead
from merge_adapter.types import Origin, Silent


class Slow:
    """A repository whose files arrive when the test lets them."""

    origin = Origin(repo_id="a/b", revision="0" * 40)

    def __init__(self) -> None:
        self.files: Mapping[str, int] = {"one": 1, "two": 2, "three": 3}
        self.asked: list[str] = []
        self.asking = {path: Event() for path in self.files}
        self.may = {path: Event() for path in self.files}

    def read(self, path: str, **_: Any) -> bytes:
        return path.encode()

    def local(self, path: str) -> Path:
        self.asked.append(path)
        self.asking[path].set()
        self.may[path].wait()
        if path == "two":
            raise HubError("two is gone")
        return Path(path)

    def folder(self, paths: Iterable[str]) -> Path:
        return Path(*paths)


def test_files_come_in_order_and_one_is_used_while_the_next_is_on_its_way() -> None:
    slow = Slow()
    ahead = Ahead(slow, ["one", "two", "absent"])
    slow.may["one"].set()
    assert ahead.local("one") == Path("one")
    slow.asking["two"].wait()  # asked for by nobody
    assert slow.asked == ["one", "two"]
    slow.may["two"].set()
    with pytest.raises(HubError, match="two is gone"):
        ahead.local("two")
    slow.may["three"].set()
    assert ahead.local("three") == Path("three")  # not announced, and fetched all the same
    assert ahead.read("one") == b"one"
    assert ahead.files == slow.files
    assert ahead.origin.repo_id == "a/b"
    ahead.stop()


def test_after_stop_nothing_more_is_fetched() -> None:
    slow = Slow()
    ahead = Ahead(slow, ["one", "three"])
    slow.asking["one"].wait()
    ahead.stop()
    slow.may["one"].set()
    assert "three" not in slow.asked


def test_a_merge_of_a_base_on_the_hub_is_the_merge_of_a_local_one(
    world: World, base: str, merged_weights: Any, tmp_path: Path
) -> None:
    from hashlib import sha256

    adapter = world.adapter(base)
    done = merge_to_folder(
        MergeRequest(SourceRequest((adapter,)), gate=None),
        tmp_path / "out",
        hub=world.hub(),
        progress=Silent(),
    )
    weights = done.folder.glob("*.safetensors")
    assert {path.name: sha256(path.read_bytes()).hexdigest() for path in weights} == merged_weights()
