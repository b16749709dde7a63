"""A Hub on this machine, sources on it, and folders that look as if they had just been merged."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import HfApi

from localhub.process import LocalHub
from merge_adapter.hub import Hub
from merge_adapter.hub.session import Patience
from merge_adapter.report import document
from merge_adapter.types import Verdict, Verification

TOKENS = {name: f"hf_{name}{'x' * 24}" for name in ("ann", "bot", "corp", "eve")}
"""Shaped as real tokens are, so that a leak would be recognised as one."""
IMPATIENT = Patience(attempts=4, first_wait=0.05, longest_wait=0.2)


@dataclass(frozen=True)
class Merged:
    """A merged folder with its report and verdict."""

    folder: Path
    report: dict[str, Any]
    verification: Verification

    def rewrite(self, path: str, content: bytes) -> None:
        """Replace or add a file, in the folder and in its report."""
        (self.folder / path).write_bytes(content)
        files = self.report["output"]["files"]
        files[:] = [file for file in files if file["path"] != path]
        digest = hashlib.sha256(content).hexdigest()
        files.append({"path": path, "bytes": len(content), "sha256": digest, "origin": "written"})
        document.write(self.report, self.folder)

    def judged(self, verdict: Verdict, *reasons: str) -> Merged:
        """The same folder with another verdict in its report."""
        verification = Verification(verdict, reasons or ("because",))
        report = {**self.report, "verification": document.verification_entry(verification)}
        document.write(report, self.folder)
        return replace(self, report=report, verification=verification)


@dataclass
class World:
    """The Hub, and what a test puts on it. Every name is new, so that tests do not meet."""

    url: str
    base_folder: Path
    scratch: Path
    _count: Iterator[int] = field(default_factory=itertools.count)

    def api(self, user: str | None = None) -> HfApi:
        return HfApi(endpoint=self.url, token=TOKENS[user] if user else False)

    def hub(self, user: str | None = "bot", *, url: str | None = None) -> Hub:
        """Our Hub as `user`, who gives up soon."""
        return Hub(url or self.url, TOKENS[user] if user else None, patience=IMPATIENT)

    def name(self, owner: str, stem: str = "repo") -> str:
        return f"{owner}/{stem}-{next(self._count)}"

    def repository(self, repo_id: str, files: dict[str, bytes], *, private: bool = False) -> str:
        """A model repository of its owner with `files`; its commit."""
        api = self.api(repo_id.split("/")[0])
        api.create_repo(repo_id, private=private, exist_ok=True)
        folder = self.scratch / f"upload-{next(self._count)}"
        folder.mkdir()
        for path, content in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder).oid)

    def adapter(self, *, owner: str = "ann", card: str = "license: apache-2.0", private: bool = False) -> str:
        """An adapter's repository; its weights do not matter here."""
        repo_id = self.name(owner, "adapter")
        files = {"adapter_config.json": b'{"peft_type": "LORA"}', "README.md": f"---\n{card}\n---\n".encode()}
        self.repository(repo_id, files, private=private)
        return repo_id

    def base(self, *, owner: str = "corp", card: str = "license: apache-2.0", private: bool = False) -> str:
        """A repository with the small trained model, in two shards."""
        repo_id = self.name(owner, "base")
        files = {
            path.name: path.read_bytes() for path in self.base_folder.iterdir() if path.name != "README.md"
        }
        self.repository(repo_id, {**files, "README.md": f"---\n{card}\n---\n".encode()}, private=private)
        return repo_id

    def merged(self, adapter: str | None, base: str | None, *, seed: int = 0) -> Merged:
        """The base with its first shard changed, as a merge would leave it."""
        folder = self.scratch / f"merged-{next(self._count)}"
        shutil.copytree(self.base_folder, folder)
        shard = folder / "model-00001-of-00002.safetensors"
        _change(shard, seed)
        (folder / "README.md").write_text(
            f"---\nlicense: apache-2.0\nbase_model: {base or 'x/y'}\n---\n# Merged\n"
        )
        files = []
        for path in sorted(folder.iterdir()):
            content = path.read_bytes()
            origin = {"README.md": "written", shard.name: "merged"}.get(path.name, "copied")
            entry = {
                "path": path.name,
                "bytes": len(content),
                "sha256": hashlib.sha256(content).hexdigest(),
                "origin": origin,
            }
            files.append(entry)
        report = _report(self._source(adapter), self._source(base), files)
        merged = Merged(folder, report, Verification(Verdict.PASS, ()))
        return merged.judged(Verdict.PASS, "All tensors agree.")

    def _source(self, repo_id: str | None) -> dict[str, Any]:
        if repo_id is None:
            return {"id": "a-folder", "revision": None}
        sha = self.api(repo_id.split("/")[0]).model_info(repo_id).sha
        return {"id": repo_id, "revision": sha}

    def pulls(self, repo_id: str) -> list[tuple[int, str, str]]:
        """Number, status and author of every pull request, oldest first."""
        found = self.api(repo_id.split("/")[0]).get_repo_discussions(repo_id, discussion_type="pull_request")
        return sorted((one.num, one.status, one.author) for one in found)

    def merge_pull(self, repo_id: str, number: int) -> None:
        self.api(repo_id.split("/")[0]).merge_pull_request(repo_id, number)


@pytest.fixture(scope="session")
def tokens() -> dict[str, str]:
    """Token by user name."""
    return TOKENS


@pytest.fixture(scope="session")
def local_hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalHub]:
    """The server; one for all tests of this folder."""
    with LocalHub(tmp_path_factory.mktemp("localhub"), TOKENS) as hub:
        yield hub


@pytest.fixture(scope="session")
def two_shards(tmp_path_factory: pytest.TempPathFactory, lm_base: Path) -> Path:
    """`lm_base` cut in two shards with an index."""
    folder = tmp_path_factory.mktemp("base")
    shutil.copytree(lm_base, folder, dirs_exist_ok=True)
    whole = folder / "model.safetensors"
    raw = _read_raw(whole)
    whole.unlink()
    names = sorted(raw)
    index: dict[str, str] = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{number:05}-of-00002.safetensors"
        _write_raw(folder / file, {name: raw[name] for name in part})
        index |= dict.fromkeys(part, file)
    content = {"metadata": {"total_size": 0}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def world(local_hub: LocalHub, two_shards: Path, tmp_path: Path, request: pytest.FixtureRequest) -> World:
    """Names carry a digest of the test's own, so that tests share the server but no repository."""
    start = int(hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:8], 16)
    return World(local_hub.url, two_shards, tmp_path, itertools.count(start))


@pytest.fixture(scope="session")
def shared_base(local_hub: LocalHub, two_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A base for tests that leave it as it is."""
    world = World(local_hub.url, two_shards, tmp_path_factory.mktemp("shared"), itertools.count())
    return world.base()


def _report(adapter: dict[str, Any], base: dict[str, Any], files: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "schema": 1,
        "tool": document.tool_entry(),
        "adapter": {**adapter, "method": "LORA", "tensors": 2, "consumed": 2},
        "base": base,
        "settings": {"strategy": "auto", "quantized_base": "refuse", "trust_remote_code": False},
        "output": {"dtype": "auto", "files": files},
        "merge": {
            "seconds": 0.5,
            "bytes_read": 1,
            "bytes_written": 1,
            "bytes_changed": 1,
            "peak_rss_bytes": 1,
            "tensors_changed": 1,
            "tensors_copied": 1,
            "strategy": "stream",
        },
        "verification": {"verdict": "pass", "reasons": []},
        "notes": [],
    }


def _read_raw(path: Path) -> dict[str, tuple[dict[str, Any], bytes]]:
    """Tensors of any dtype as header entry and bytes."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__", None)
    body = content[8 + length :]
    return {name: (entry, body[slice(*entry["data_offsets"])]) for name, entry in header.items()}


def _write_raw(path: Path, tensors: dict[str, tuple[dict[str, Any], bytes]]) -> None:
    header, body = {}, b""
    for name, (entry, content) in tensors.items():
        header[name] = {**entry, "data_offsets": [len(body), len(body) + len(content)]}
        body += content
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


def _change(shard: Path, seed: int) -> None:
    """Other bytes in the largest tensor, header and size as they were."""
    tensors = _read_raw(shard)
    name = max(tensors, key=lambda one: len(tensors[one][1]))
    entry, content = tensors[name]
    noise = np.random.default_rng(seed).integers(0, 50, len(content), dtype=np.uint8).tobytes()
    _write_raw(shard, {**tensors, name: (entry, noise)})
