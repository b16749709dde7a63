"""Repositories on a Hub of this machine for merges that pass through, and processes that make them."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import HfApi

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
        self, adapter: str, home: Path, *options: object, url: str | None = None, json: bool = True
    ) -> subprocess.Popen[str]:
        """`merge-adapter run` as a process."""
        shown = ["--json"] if json else []
        return subprocess.Popen(
            [sys.executable, "-m", "merge_adapter", "run", adapter, *shown, *map(str, options)],
            env=self.environment(home, url),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
