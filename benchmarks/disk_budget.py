"""`python -m benchmarks.disk_budget`: from Hub to Hub with little disk, over a line of limited bandwidth.

An embedded Hub behind a proxy that limits each direction; the real client; a Llama-shaped base in many shards. First
each stage alone, over the same line: downloading the base, merging it, uploading the result. Then the whole, side by
side, within a budget of three shards, with the disk sampled all the while: work folders, the client's cache, xet's.
Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.models import Size, base_model, lora

_PAUSE = 0.02
"""Seconds between two looks at the disk."""


def main() -> None:
    options = _options()
    with tempfile.TemporaryDirectory(prefix="merge-adapter-bench-") as name:
        work = Path(name)
        (work / "tmp").mkdir()
        # before the client is imported, which reads its settings once
        os.environ.update(HF_HOME=str(work / "home"), HF_XET_CACHE=str(work / "home" / "xet"))
        os.environ.pop("HF_TOKEN", None)
        tempfile.tempdir = str(work / "tmp")
        print(json.dumps(_measure(options, work), indent=2))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.disk_budget", description=__doc__)
    parser.add_argument("--layers", type=int, default=16, help="11 MB each")
    parser.add_argument("--shards", type=int, default=12)
    parser.add_argument("--rate", type=float, default=5.0, help="MB a second, each way")
    parser.add_argument("--outputs", action="store_true", help="the outputs part too, read back from the Hub")
    return parser.parse_args()


def _measure(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    from localhub.faults import FaultProxy
    from localhub.process import LocalHub

    size = Size("passing", 768, 1344, options.layers, 12, 12, options.shards, vocab=1024)
    base = base_model(size, work / "base")
    _make_unlike(base)
    adapter = lora(size, base, work / "adapter", rank=16)
    with LocalHub(work / "hub", tokens={"ann": "hf_ann"}) as hub:
        _push(hub.url, base, adapter)
        rate = options.rate * 1e6
        with FaultProxy(hub.url, download=rate, upload=rate) as proxy:
            alone = _alone(proxy.url, work)
            before = proxy.down.bytes, proxy.up.bytes
            figures = _together(proxy.url, work, outputs=options.outputs)
            carried = {"down": proxy.down.bytes - before[0], "up": proxy.up.bytes - before[1]}
    slowest = max(alone.values())
    return {
        "model_bytes": sum(path.stat().st_size for path in base.glob("*.safetensors")),
        "largest_shard_bytes": max(path.stat().st_size for path in base.glob("*.safetensors")),
        "megabytes_per_second": options.rate,
        "alone_seconds": {name: round(value, 1) for name, value in alone.items()},
        "passing_over_slowest": round(figures["stages"]["total"] / slowest, 2),
        "line_bytes": carried,
        **figures,
    }


def _push(url: str, base: Path, adapter: Path) -> None:
    from huggingface_hub import HfApi

    api = HfApi(endpoint=url, token="hf_ann")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": "ann/base"})
    )
    for folder in (base, adapter):
        api.create_repo(f"ann/{folder.name}")
        api.upload_folder(repo_id=f"ann/{folder.name}", folder_path=folder)


def _alone(url: str, work: Path) -> dict[str, float]:
    """Seconds of each stage by itself: download, merge, upload."""
    from huggingface_hub import HfApi

    from merge_adapter.checkpoint.layout import find_layout
    from merge_adapter.hub import Hub, Upload, hand_over
    from merge_adapter.merge import merge
    from merge_adapter.pipeline import plan_merge
    from merge_adapter.staging.window import Window
    from merge_adapter.types import MergeSettings, Silent

    hub = Hub(url, "hf_ann")
    sources, _ = plan_merge(_request("ann/adapter"), hub=hub)
    found: dict[str, float] = {}
    fetched, merged = work / "fetched", work / "merged"
    fetched.mkdir()
    merged.mkdir()
    layout = find_layout(sources.base.repository)
    with _timed(found, "download"):
        window = Window(sources.base.repository, layout, fetched)
        for file in layout.files:
            window.fetch(file.path)
    local, plan = plan_merge(_request(str(work / "adapter"), str(work / "base")), hub=hub)
    with _timed(found, "merge"):
        made = merge(plan, local, merged, settings=MergeSettings(), progress=Silent())
    HfApi(endpoint=url, token="hf_ann").create_repo("ann/alone")
    _make_unlike(merged)  # or the run would find its own result on the Hub
    with _timed(found, "upload"):
        for file in made.files:
            if file.path.endswith(".safetensors"):
                upload = Upload(file.path, merged / file.path, file.bytes, file.sha256)
                hand_over(hub, "ann/alone", "main", upload)
    return found


def _together(url: str, work: Path, *, outputs: bool) -> dict[str, Any]:
    """The whole within three shards."""
    from merge_adapter.hub import Hub
    from merge_adapter.pipeline import plan_merge, run
    from merge_adapter.publish import PublishSettings
    from merge_adapter.staging.needs import measure, weights_of
    from merge_adapter.types import MergeSettings, Silent

    hub = Hub(url, "hf_ann")
    request = _request("ann/adapter", outputs=outputs)
    sources, plan = plan_merge(request, hub=hub)
    layout = weights_of(sources, MergeSettings())
    fixed = measure(sources, plan, layout).fixed
    budget = fixed + 3 * max(file.bytes for file in layout.files)
    for folder in ("fetched", "merged"):
        for path in (work / folder).iterdir():
            path.unlink()
    watched = (work / "tmp", work / "home")
    began = time.monotonic()
    with _sampled(watched) as peaks:
        outcome = run(request, PublishSettings(), hub=hub, progress=Silent(), disk_budget=budget)
    return {
        "budget_bytes": budget,
        "fixed_bytes": fixed,
        "peak_bytes": max(peaks),
        "samples": len(peaks),
        "stages": dict(outcome.stages or {}),
        "seconds": round(time.monotonic() - began, 1),
        "verdict": outcome.verdict.value,
        "publication": outcome.report.get("publication"),
    }


def _request(adapter: str, base: str | None = None, *, outputs: bool = False) -> Any:
    from merge_adapter.pipeline import MergeRequest
    from merge_adapter.resolve import SourceRequest
    from merge_adapter.verify.settings import VerifySettings

    return MergeRequest(
        SourceRequest((adapter,), base_model=base), gate=VerifySettings(outputs=outputs, probe_tokens=128)
    )


def _make_unlike(folder: Path) -> None:
    """Give every tensor content of its own: the Hub keeps equal parts once, and nobody would have to send them."""
    import torch
    from safetensors.torch import load_file, save_file

    generator = torch.Generator().manual_seed(int.from_bytes(folder.name.encode()[-6:], "big"))
    for path in sorted(folder.glob("*.safetensors")):
        held = {
            name: (torch.randn(tensor.shape, generator=generator) * 0.02).to(tensor.dtype)
            for name, tensor in load_file(path).items()
        }
        save_file(held, path, metadata={"format": "pt"})


@contextmanager
def _timed(into: dict[str, float], name: str) -> Iterator[None]:
    began = time.monotonic()
    yield
    into[name] = time.monotonic() - began


@contextmanager
def _sampled(folders: tuple[Path, ...]) -> Iterator[list[int]]:
    """Bytes on the disk below `folders`, looked at again and again, beyond what lay there before."""
    from merge_adapter.staging.window import disk_use

    first = disk_use(folders)
    found = [0]
    done = threading.Event()

    def look() -> None:
        while not done.wait(_PAUSE):
            found.append(disk_use(folders) - first)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()


if __name__ == "__main__":
    main()
