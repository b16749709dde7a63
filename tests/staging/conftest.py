"""A Hub with a base in several small shards and an adapter of it."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

import pytest
from passing_world import OWNER, TOKEN, World

from localhub.process import LocalHub
from merge_adapter.hub import Hub
from merge_adapter.pipeline import MergeRequest, merge_to_folder
from merge_adapter.resolve import SourceRequest
from merge_adapter.types import Silent

_COUNT = itertools.count()


@pytest.fixture(scope="session")
def sharded_base(lm_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`lm_base` in eight shards, in the first of which no adapter here changes anything."""
    import torch
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("sharded")
    model = AutoModelForCausalLM.from_pretrained(lm_base, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="300KB")
    for path in lm_base.iterdir():
        if path.suffix != ".safetensors" and not (folder / path.name).exists():
            shutil.copy(path, folder / path.name)
    return folder


@pytest.fixture(scope="session")
def staging_hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalHub]:
    with LocalHub(tmp_path_factory.mktemp("staging-hub"), tokens={OWNER: TOKEN}) as running:
        yield running


@pytest.fixture
def world(staging_hub: LocalHub, sharded_base: Path, lm_adapter: Path, tmp_path: Path) -> World:
    return World(staging_hub.url, sharded_base, lm_adapter, tmp_path / "world", _COUNT)


@pytest.fixture
def base(world: World) -> str:
    return world.push(world.base_folder, "base")


@pytest.fixture
def merged_weights(sharded_base: Path, lm_adapter: Path, tmp_path: Path) -> Callable[[], dict[str, str]]:
    """The sha256 of the weights that a plain merge of the same makes."""

    def merge() -> dict[str, str]:
        source = SourceRequest((str(lm_adapter),), base_model=str(sharded_base))
        done = merge_to_folder(
            MergeRequest(source, gate=None),
            tmp_path / "plain",
            hub=Hub("http://127.0.0.1:9"),
            progress=Silent(),
        )
        weights = done.folder.glob("*.safetensors")
        return {path.name: sha256(path.read_bytes()).hexdigest() for path in weights}

    return merge
