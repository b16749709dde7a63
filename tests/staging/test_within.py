"""From Hub to Hub within a disk budget, on the real client and a running Hub."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from passing_world import WEIGHTS, World

from localhub.faults import Answer, Cut, FaultProxy, LoseAnswer, Rule
from merge_adapter.errors import InputError, StorageError
from merge_adapter.pipeline import RunOutcome, plan_merge, run
from merge_adapter.publish import Outbox, PublishSettings
from merge_adapter.publish.contents import Gone
from merge_adapter.report.terminal import plan_document
from merge_adapter.types import MergeResult, Operation, OutputFile, PublishTo, Silent, Verdict
from merge_adapter.types import OnFail as Fail
from merge_adapter.verify.settings import VerifySettings

Weights = Callable[[], dict[str, str]]
COPIED = "model-00001-of-00008.safetensors"


def passed_through(
    world: World,
    adapter: str,
    *,
    gate: VerifySettings | None = WEIGHTS,
    url: str | None = None,
    shards: float = 3,
    **settings: Any,
) -> RunOutcome:
    return run(
        world.request(adapter, gate),
        PublishSettings(**settings),
        hub=world.hub(url),
        progress=Silent(),
        disk_budget=world.budget(adapter, shards=shards),
    )


def test_the_draft_holds_what_a_plain_merge_makes(world: World, base: str, merged_weights: Weights) -> None:
    adapter = world.adapter(base)
    outcome = passed_through(world, adapter)
    assert outcome.publication is not None
    assert outcome.publication.draft
    assert outcome.publication.operation is Operation.CREATED
    target = outcome.publication.repo
    assert world.pulls(target) == [(1, "draft")]
    assert world.weights(target, "refs/pr/1") == merged_weights()
    verification = outcome.report["verification"]
    assert verification["weights"]["verdict"] == "pass"
    assert verification["weights"]["tensors"] == 48
    assert verification["modules"]["verdict"] == "pass"
    assert verification["files"]["verdict"] == "pass"
    assert verification["mutants"]
    assert verification["verdict"] == "inconclusive"  # the outputs part was switched off
    assert outcome.merged is None
    assert set(outcome.stages or {}) == {"fetch", "merge", "judge", "send", "total"}


def test_the_outputs_are_read_back_from_the_draft_which_is_then_ready(world: World, base: str) -> None:
    """Nothing of the model is here any more: its weights come and go while it answers."""
    adapter = world.adapter(base)
    outcome = passed_through(world, adapter, gate=VerifySettings(probe_tokens=64))
    assert outcome.reasons[0].startswith("every tensor is base + adapter")
    assert outcome.verdict is Verdict.PASS
    assert outcome.publication is not None
    assert not outcome.publication.draft
    assert world.pulls(outcome.publication.repo) == [(1, "open")]
    outputs = outcome.report["verification"]["outputs"]
    assert outputs["verdict"] == "pass"
    assert outputs["documents_merged"] > 0
    listed = world.hub().open(outcome.publication.repo, revision="refs/pr/1")
    assert json.loads(listed.read("merge_report.json"))["verification"]["verdict"] == "pass"
    again = passed_through(world, adapter, gate=VerifySettings(probe_tokens=64))
    assert again.publication is not None
    assert again.publication.operation is Operation.UNCHANGED


def test_a_shard_without_a_change_is_never_downloaded_and_the_bytes_are_told(world: World, base: str) -> None:
    adapter = world.adapter(base)
    with FaultProxy(world.url) as proxy:
        outcome = passed_through(world, adapter, url=proxy.url)
        carried = proxy.down.bytes
    entries = {file["path"]: file for file in outcome.report["output"]["files"]}
    assert entries[COPIED]["origin"] == "copied"
    assert entries[COPIED]["source"] == "base"
    changed = sum(file["bytes"] for file in entries.values() if file["origin"] == "merged")
    publication = outcome.report["publication"]
    assert publication["bytes_saved"] == entries[COPIED]["bytes"]
    assert changed <= publication["bytes_uploaded"] < changed + 1_000_000
    assert outcome.report["merge"]["bytes_changed"] <= changed
    assert carried > changed


def test_a_hub_that_refuses_the_copy_gets_the_shard_sent(
    world: World, base: str, merged_weights: Weights
) -> None:
    adapter = world.adapter(base)
    with FaultProxy(world.url, [Rule(Answer(409), method="POST", path="/lfs-files/duplicate")]) as proxy:
        outcome = passed_through(world, adapter, url=proxy.url)
    assert outcome.publication is not None
    assert world.weights(outcome.publication.repo, "refs/pr/1") == merged_weights()
    assert outcome.publication.bytes_saved == 0


def test_a_budget_that_holds_everything_changes_nothing(world: World, base: str) -> None:
    adapter = world.adapter(base)
    outcome = run(
        world.request(adapter, None),
        PublishSettings(),
        hub=world.hub(),
        progress=Silent(),
        disk_budget=10**12,
    )
    assert outcome.merged is not None
    assert outcome.stages is None


def test_the_smallest_budget_is_named_before_anything_is_downloaded_and_works(
    world: World, base: str
) -> None:
    adapter = world.adapter(base)
    budget = world.budget(adapter, shards=1)
    with FaultProxy(world.url) as proxy:
        with pytest.raises(StorageError, match="is too small") as refused:
            run(
                world.request(adapter),
                PublishSettings(),
                hub=world.hub(proxy.url),
                progress=Silent(),
                disk_budget=budget,
            )
        whole = sum(path.stat().st_size for path in world.base_folder.glob("*.safetensors"))
        assert proxy.down.bytes < whole / 4
        assert not world.api.repo_exists(f"{adapter}-merged")
    smallest = refused.value.hint.split("works is ")[1].split("MB")[0]
    planned = plan_document(*plan_merge(world.request(adapter), hub=world.hub()))
    assert planned["least_disk_budget_bytes"] <= int(smallest) * 1_000_000
    assert planned["least_disk_budget_bytes"] > (int(smallest) - 1) * 1_000_000
    outcome = run(
        world.request(adapter),
        PublishSettings(),
        hub=world.hub(),
        progress=Silent(),
        disk_budget=int(smallest) * 1_000_000,
    )
    assert outcome.publication is not None


def test_nothing_can_be_kept_here(world: World, base: str, tmp_path: Path) -> None:
    adapter = world.adapter(base)
    budget = world.budget(adapter)
    with pytest.raises(InputError, match="cannot be kept"):
        run(
            world.request(adapter),
            PublishSettings(),
            hub=world.hub(),
            progress=Silent(),
            output=tmp_path / "out",
            disk_budget=budget,
        )
    with pytest.raises(StorageError, match="only pass through where the result is published"):
        passed_through(world, adapter, publish_to=PublishTo.NONE)


def _spoiled(monkeypatch: pytest.MonkeyPatch, path: str, *, told: bool = False) -> None:
    """Turn one bit of one merged shard over after it was written, as a failing disk would.

    `told`: as a processor would that rounds another way, so that the merge itself names the hash of what it wrote.
    """
    import merge_adapter.staging.run as module

    real = module.merge

    def merge(plan: Any, sources: Any, destination: Path, **options: Any) -> MergeResult:
        made = real(plan, sources, destination, **options)
        if path not in [file.path for file in made.files]:
            return made
        content = bytearray((destination / path).read_bytes())
        content[-1] ^= 0x40
        (destination / path).write_bytes(content)
        if not told:
            return made
        digest = sha256(content).hexdigest()
        files = tuple(replace(one, sha256=digest) if one.path == path else one for one in made.files)
        return replace(made, files=files)

    monkeypatch.setattr(module, "merge", merge)


def test_a_draft_with_other_weights_is_not_taken_for_this_merge(
    world: World, base: str, monkeypatch: pytest.MonkeyPatch, merged_weights: Weights
) -> None:
    """Sources, settings and verdict are those of the draft; the shards that were judged here must go there."""
    adapter = world.adapter(base)
    right = merged_weights()
    with monkeypatch.context() as patch:
        _spoiled(patch, "model-00003-of-00008.safetensors", told=True)
        left = passed_through(world, adapter, gate=None)
    assert left.publication is not None
    assert world.weights(left.publication.repo, "refs/pr/1") != right
    outcome = passed_through(world, adapter, gate=VerifySettings(probe_tokens=64))
    assert outcome.verdict is Verdict.PASS
    assert world.pulls(left.publication.repo) == [(1, "open")]
    assert world.weights(left.publication.repo, "refs/pr/1") == right


@pytest.mark.parametrize("number", [2, 6])
def test_a_shard_with_a_fault_never_leaves(
    world: World, base: str, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Neither the first that is made nor one behind others that were sent already."""
    adapter = world.adapter(base)
    _spoiled(monkeypatch, f"model-0000{number}-of-00008.safetensors")
    outcome = passed_through(world, adapter)
    assert outcome.verdict is Verdict.FAIL
    assert outcome.publication is None
    assert "weights" in outcome.report["verification"]
    target = f"{adapter}-merged"
    if world.api.repo_exists(target):
        assert [status for _, status in world.pulls(target)] in ([], ["closed"])
        assert world.weights(target) == {}


def test_a_draft_that_is_not_wanted_is_closed(
    world: World, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The outputs part cannot pass what the Hub serves: with `--on-fail discard` no draft stays."""
    from merge_adapter.verify.shardwise import ShardGate

    adapter = world.adapter(base)
    real = ShardGate.ask

    def ask(self: ShardGate, merged: Path, settings: VerifySettings) -> None:
        real(self, merged, replace(settings, outputs=False))

    monkeypatch.setattr(ShardGate, "ask", ask)
    outcome = passed_through(world, adapter, gate=VerifySettings(probe_tokens=64), on_fail=Fail.DISCARD)
    assert outcome.verdict is Verdict.INCONCLUSIVE
    assert outcome.publication is None
    assert world.pulls(f"{adapter}-merged") == [(1, "closed")]


def test_a_new_repository_gets_it_on_main_when_it_has_passed(
    world: World, base: str, merged_weights: Weights
) -> None:
    adapter = world.adapter(base)
    outcome = passed_through(
        world, adapter, gate=VerifySettings(probe_tokens=64), publish_to=PublishTo.NEW_REPO
    )
    assert outcome.verdict is Verdict.PASS
    assert outcome.publication is not None
    assert outcome.publication.number is None
    assert world.weights(outcome.publication.repo) == merged_weights()
    assert [status for _, status in world.pulls(outcome.publication.repo)] == ["closed"]


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub's own LFS upload
def test_a_new_repository_gets_it_on_main_without_xet(
    world: World, base: str, merged_weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files that came whole have no xet hash; from the draft to main they stay within their repository."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    adapter = world.adapter(base)
    outcome = passed_through(
        world, adapter, gate=VerifySettings(probe_tokens=64), publish_to=PublishTo.NEW_REPO
    )
    assert outcome.publication is not None
    assert outcome.publication.number is None
    assert world.weights(outcome.publication.repo) == merged_weights()


def test_a_new_repository_gets_it_on_main_from_another_region(
    world: World, base: str, merged_weights: Weights
) -> None:
    """The Hub copies nothing from the base, and main is filled from the draft all the same."""
    adapter = world.adapter(base)
    with FaultProxy(world.url, [Rule(Answer(409), method="POST", path="/lfs-files/duplicate")]) as proxy:
        outcome = passed_through(
            world,
            adapter,
            gate=VerifySettings(probe_tokens=64),
            publish_to=PublishTo.NEW_REPO,
            url=proxy.url,
        )
    assert outcome.publication is not None
    assert outcome.publication.number is None
    assert world.weights(outcome.publication.repo) == merged_weights()


def test_an_update_goes_to_the_pull_request_that_is_open(world: World, base: str, tmp_path: Path) -> None:
    """The new merge passes by way of a draft of its own, and ends in the one that people look at."""
    adapter = world.adapter(base)
    gate = VerifySettings(probe_tokens=64)
    first = passed_through(world, adapter, gate=gate)
    config = json.loads((world.adapter_folder / "adapter_config.json").read_text())
    changed = {**config, "base_model_name_or_path": base, "lora_alpha": config["lora_alpha"] * 2}
    (tmp_path / "adapter_config.json").write_text(json.dumps(changed))
    world.api.upload_file(
        path_or_fileobj=tmp_path / "adapter_config.json", path_in_repo="adapter_config.json", repo_id=adapter
    )
    second = passed_through(world, adapter, gate=gate)
    assert first.publication is not None
    assert second.publication is not None
    assert second.verdict is Verdict.PASS
    assert second.publication.number == first.publication.number == 1
    assert world.pulls(first.publication.repo) == [(1, "open"), (2, "closed")]
    files = {file["path"]: file["sha256"] for file in second.report["output"]["files"]}
    held = world.weights(first.publication.repo, "refs/pr/1")
    assert held == {path: sha256 for path, sha256 in files.items() if path.endswith(".safetensors")}


def test_a_local_base_passes_through_too(
    world: World, base: str, sharded_base: Path, merged_weights: Weights
) -> None:
    from merge_adapter.pipeline import MergeRequest
    from merge_adapter.resolve import SourceRequest

    adapter = world.adapter(base)
    budget = world.budget(adapter, shards=2)
    outcome = run(
        MergeRequest(SourceRequest((adapter,), base_model=str(sharded_base)), gate=WEIGHTS),
        PublishSettings(),
        hub=world.hub(),
        progress=Silent(),
        disk_budget=budget,
    )
    assert outcome.publication is not None
    assert outcome.stages is not None
    assert world.weights(outcome.publication.repo, "refs/pr/1") == merged_weights()


def test_a_bad_line_only_takes_longer(world: World, base: str, merged_weights: Weights) -> None:
    """Answers cut off in the middle of a shard, a Hub that is down for a moment, the answer to the commit lost."""
    adapter = world.adapter(base)
    rules = [
        Rule(Cut(after=100_000), method="GET", path=r"/resolve/.*safetensors", skip=30, times=2),
        Rule(Answer(503), method="GET", path=r"/resolve/.*safetensors", skip=20, times=2),
        Rule(LoseAnswer(), method="POST", path="/commit/", times=1),
        Rule(LoseAnswer(), method="POST", path="/discussions$", times=1),
    ]
    with FaultProxy(world.url, rules) as proxy:
        outcome = passed_through(world, adapter, url=proxy.url)
    assert all(rule.struck for rule in rules[2:])
    assert outcome.publication is not None
    assert world.pulls(outcome.publication.repo) == [(1, "draft")]
    assert world.weights(outcome.publication.repo, "refs/pr/1") == merged_weights()


def test_a_shard_that_was_sent_is_held_by_nothing(
    world: World, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is still mapped takes its space though its name is gone."""
    adapter = world.adapter(base)
    held: list[list[str]] = []
    real = Outbox.send

    def send(self: Outbox, file: OutputFile, place: Path) -> Gone | None:
        maps = Path("/proc/self/maps").read_text().splitlines()
        held.append([line for line in maps if "/shards/" in line and line.endswith("(deleted)")])
        return real(self, file, place)

    monkeypatch.setattr(Outbox, "send", send)
    passed_through(world, adapter)
    assert held == [[]] * 7
