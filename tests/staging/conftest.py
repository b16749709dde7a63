"""A Hub with a base in several small shards and an adapter of it; and what a run on them leaves behind."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi

from localhub.process import LocalHub
from merge_adapter.hub import Hub
from merge_adapter.hub.session import Patience
from merge_adapter.pipeline import MergeRequest, plan_merge
from merge_adapter.resolve import SourceRequest
from merge_adapter.staging.needs import copied_by_hub, measure, weights_of
from merge_adapter.staging.units import schedule
from merge_adapter.types import MergeSettings
from merge_adapter.verify.settings import VerifySettings

TOKEN = "hf_passing"
OWNER = "passing"
WEIGHTS = VerifySettings(outputs=False)
"""The gate without its outputs part: quick, and at best inconclusive."""
IMPATIENT = Patience(attempts=4, first_wait=0.05, longest_wait=0.2)


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


@dataclass
class World:
    """A Hub, and repositories of one owner on it. Names are new each time, so that tests do not meet."""

    url: str
    base_folder: Path
    adapter_folder: Path
    scratch: Path
    _count: Iterator[int] = field(default_factory=itertools.count)

    @property
    def api(self) -> HfApi:
        return HfApi(endpoint=self.url, token=TOKEN)

    def hub(self, url: str | None = None) -> Hub:
        return Hub(url or self.url, TOKEN, patience=IMPATIENT)

    def push(self, folder: Path, stem: str) -> str:
        """Upload a folder as a repository; its id."""
        repo_id = f"{OWNER}/{stem}-{next(self._count)}"
        self.api.create_repo(repo_id)
        self.api.upload_folder(repo_id=repo_id, folder_path=folder)
        return repo_id

    def adapter(self, base: str, folder: Path | None = None) -> str:
        """An adapter of the base `base`."""
        copy = self.scratch / f"adapter-{next(self._count)}"
        shutil.copytree(folder or self.adapter_folder, copy)
        config = json.loads((copy / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = base
        (copy / "adapter_config.json").write_text(json.dumps(config))
        return self.push(copy, "adapter")

    def request(self, adapter: str, gate: VerifySettings | None = WEIGHTS) -> MergeRequest:
        return MergeRequest(SourceRequest((adapter,)), gate=gate)

    def budget(self, adapter: str, *, shards: float = 3) -> int:
        """What is needed throughout, and room for so many of the largest shards."""
        sources, plan = plan_merge(self.request(adapter), hub=self.hub())
        layout = weights_of(sources, MergeSettings())
        fixed = measure(sources, plan, layout).fixed
        copied = frozenset(copied_by_hub(sources, plan))
        units = schedule(plan, layout, fetched=True, copied=copied).units
        return fixed + int(shards * max(shard.bytes for unit in units for shard in unit.outputs))

    def pulls(self, repo_id: str) -> list[tuple[int, str]]:
        """Number and status of every pull request."""
        found = self.api.get_repo_discussions(repo_id, discussion_type="pull_request")
        return sorted((one.num, one.status) for one in found)

    def weights(self, repo_id: str, revision: str = "main") -> dict[str, str]:
        """sha256 of every weight file."""
        tree = self.api.list_repo_tree(repo_id, recursive=True, revision=revision)
        return {one.path: one.lfs.sha256 for one in tree if one.path.endswith(".safetensors")}  # type: ignore[union-attr]

    def environment(self, home: Path, url: str | None = None) -> dict[str, str]:
        """Of a process with a home, a cache and a temporary folder of its own."""
        temporary = home / "tmp"
        temporary.mkdir(parents=True, exist_ok=True)
        own = {"HF_HOME": home / "hf", "HF_XET_CACHE": home / "hf" / "xet", "TMPDIR": temporary}
        return {
            **os.environ,
            **{name: str(place) for name, place in own.items()},
            "HF_ENDPOINT": url or self.url,
            "HF_TOKEN": TOKEN,
        }

    def start(
        self, adapter: str, home: Path, *options: object, url: str | None = None
    ) -> subprocess.Popen[str]:
        """`merge-adapter run` as a process."""
        return subprocess.Popen(
            [sys.executable, "-m", "merge_adapter", "run", adapter, "--json", *map(str, options)],
            env=self.environment(home, url),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


@pytest.fixture(scope="session")
def staging_hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalHub]:
    with LocalHub(tmp_path_factory.mktemp("staging-hub"), tokens={OWNER: TOKEN}) as running:
        yield running


@pytest.fixture
def world(staging_hub: LocalHub, sharded_base: Path, lm_adapter: Path, tmp_path: Path) -> World:
    return World(staging_hub.url, sharded_base, lm_adapter, tmp_path / "world", _COUNT)


_COUNT = itertools.count()


@pytest.fixture
def base(world: World) -> str:
    return world.push(world.base_folder, "base")


@pytest.fixture
def merged_weights(sharded_base: Path, lm_adapter: Path, tmp_path: Path) -> Callable[[], dict[str, str]]:
    """The sha256 of the weights that a plain merge of the same makes."""

    def merge() -> dict[str, str]:
        from hashlib import sha256

        from merge_adapter.pipeline import merge_to_folder
        from merge_adapter.types import Silent

        source = SourceRequest((str(lm_adapter),), base_model=str(sharded_base))
        done = merge_to_folder(
            MergeRequest(source, gate=None),
            tmp_path / "plain",
            hub=Hub("http://127.0.0.1:9"),
            progress=Silent(),
        )
        found: dict[str, Any] = {}
        for path in done.folder.glob("*.safetensors"):
            found[path.name] = sha256(path.read_bytes()).hexdigest()
        return found

    return merge
