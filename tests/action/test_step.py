"""Steps as a runner runs them: the entry point in a process of its own, the embedded Hub, GitHub's API description."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, get_session
from transformers import AutoModelForCausalLM

from merge_adapter.action.candidates import Candidate, find_candidates
from merge_adapter.action.events import Named, Trigger
from merge_adapter.action.inputs import Inputs
from merge_adapter.action.results import OUTPUTS
from merge_adapter.action.runner import read_runner
from merge_adapter.hub import Hub

HEAD = "ec26c3e57ca3a959ca5aad62de7213c562f8c821"
REPOSITORY = {"id": 186853002, "full_name": "octocat/adapters", "default_branch": "main"}
FORK = {"id": 186853003, "full_name": "mallory/adapters", "default_branch": "main"}
UNVERIFIED = {"verify": "false"}
"""Saves the gate's ten seconds where it is not what is tested."""


@pytest.fixture(scope="session")
def ada(hub: Any, tokens: dict[str, str]) -> HfApi:
    """The owner of models on the embedded Hub."""
    return HfApi(endpoint=hub.url, token=tokens["ada"])


@pytest.fixture(scope="session")
def base_on_hub(ada: HfApi, lm_base: Path) -> str:
    ada.create_repo("ada/action-base", exist_ok=True)
    ada.upload_folder(repo_id="ada/action-base", folder_path=lm_base)
    return "ada/action-base"


def adapter_on_hub(ada: HfApi, folder: Path, name: str, base: str) -> str:
    """A public adapter that names `base`; its commit."""
    ada.create_repo(name)
    config = json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": base}
    ada.upload_folder(repo_id=name, folder_path=folder, ignore_patterns=["adapter_config.json", "README.md"])
    commit = ada.upload_file(
        path_or_fileobj=json.dumps(config).encode(), path_in_repo="adapter_config.json", repo_id=name
    )
    return str(commit.oid)


@pytest.fixture
def adapters_in_workspace(
    workspace: Path, lm_base: Path, lm_adapter: Path, git: Callable[..., str]
) -> tuple[str, str]:
    """A repository with a base, a good adapter and, in a second commit, that adapter trained anew and a broken one.

    Returns the two commits.
    """
    shutil.copytree(lm_base, workspace / "base")
    shutil.copytree(lm_adapter, workspace / "adapters/good")
    git("add", "--all")
    git("commit", "--quiet", "-m", "first")
    before = git("rev-parse", "HEAD")
    shutil.copytree(lm_adapter, workspace / "adapters/broken")
    (workspace / "adapters/broken/adapter_model.safetensors").write_bytes(b"not safetensors at all")
    config = workspace / "adapters/good/adapter_config.json"
    config.write_text(config.read_text() + "\n")
    git("add", "--all")
    git("commit", "--quiet", "-m", "second")
    return before, git("rev-parse", "HEAD")


def pull_request(before: str, after: str, head_repo: dict[str, Any]) -> dict[str, Any]:
    return {
        "action": "synchronize",
        "number": 7,
        "pull_request": {
            "number": 7,
            "head": {"ref": "patch", "sha": after, "repo": head_repo},
            "base": {"ref": "main", "sha": before, "repo": REPOSITORY},
        },
        "repository": REPOSITORY,
    }


def test_a_dispatch_becomes_a_verified_pull_request_once(
    act: Callable[..., Any],
    hub: Any,
    tokens: dict[str, str],
    ada: HfApi,
    base_on_hub: str,
    lm_adapter: Path,
    runner_obeys: Callable[[str], list[Any]],
) -> None:
    """The way of the README: an adapter is pushed, the workflow runs, and a ready pull request is on the Hub.

    The second run of the same commit changes nothing and says so.
    """
    sha = adapter_on_hub(ada, lm_adapter, "ada/dispatched", base_on_hub)
    event = {
        "action": "merge-adapter",
        "client_payload": {"adapter": "ada/dispatched", "revision": sha},
        "repository": REPOSITORY,
    }
    env = {"HF_ENDPOINT": hub.url}
    inputs = {"hf-token": tokens["ada"], "probe-tokens": "64"}
    step = act("repository_dispatch", event, inputs=inputs, env=env)
    assert step.code == 0, step.log
    assert step.outputs["verdict"] == "pass"
    assert step.outputs["operation"] == "created"
    assert step.outputs["repo"] == "ada/dispatched-merged"
    assert step.outputs["adapter-revision"] == sha
    assert step.outputs["base-model"] == base_on_hub
    assert step.outputs["pull-request-url"].startswith(hub.url)
    number = int(step.outputs["pull-request-number"])
    details = ada.get_discussion_details("ada/dispatched-merged", number)
    assert (details.status, details.git_reference) == ("open", f"refs/pr/{number}")
    files = ada.list_repo_files("ada/dispatched-merged", revision=details.git_reference)
    assert {"model.safetensors", "config.json", "tokenizer.json", "merge_report.json"} <= set(files)
    report = json.loads((step.workspace / step.outputs["report"]).read_text())
    assert report["verification"]["verdict"] == "pass"
    assert "✅ pass" in step.summary
    assert "```mermaid" in step.summary
    assert step.outputs["pull-request-url"] in step.summary
    assert tokens["ada"] not in step.log.replace(f"::add-mask::{tokens['ada']}", "")
    assert [command.name for command in step.commands][:2] == ["add-mask", "group"]

    again = act("repository_dispatch", event, inputs=inputs, env=env)
    assert again.code == 0, again.log
    assert again.outputs["operation"] == "unchanged"
    assert again.outputs["pull-request-number"] == str(number)
    assert again.outputs["verdict"] == "pass"


def test_a_push_merges_what_changed_one_after_the_other(
    act: Callable[..., Any], github_api: Any, adapters_in_workspace: tuple[str, str]
) -> None:
    """The broken adapter does not keep the good one from its turn; each has its result and its check."""
    before, after = adapters_in_workspace
    event = {"before": before, "after": after, "ref": "refs/heads/main", "repository": REPOSITORY}
    step = act(
        "push",
        event,
        inputs=UNVERIFIED
        | {"publish": "none", "base-model": "base", "path": "adapters", "github-token": "ghs_x"},
        env={"GITHUB_API_URL": github_api.url, "GITHUB_SHA": after},
    )
    assert step.code == 2, step.log
    broken, good = step.results
    assert (broken["adapter"], broken["verdict"], broken["exit-code"]) == ("./adapters/broken", "error", 2)
    assert "adapter_model.safetensors" in broken["error"]
    assert (good["adapter"], good["verdict"], good["exit-code"]) == ("./adapters/good", "inconclusive", 0)
    assert step.outputs["verdict"] == "error"
    assert step.outputs["report"] == "", "there were several"
    assert (step.workspace / good["report"]).is_file()
    checks = {one.body["name"]: one.body for one in github_api.sent("POST", ".*/check-runs")}
    assert checks["merge-adapter: ./adapters/broken"]["conclusion"] == "failure"
    assert checks["merge-adapter: ./adapters/good"]["conclusion"] == "neutral"
    assert {check["head_sha"] for check in checks.values()} == {after}
    assert [one.authorization for one in github_api.requests] == ["token ghs_x"] * len(github_api.requests)
    assert not github_api.sent("POST", ".*/comments")


def test_a_pull_request_from_a_fork_is_merged_and_nothing_more(
    act: Callable[..., Any], github_api: Any, hub: Any, adapters_in_workspace: tuple[str, str]
) -> None:
    """No token is read although the workflow hands them over, GitHub hears nothing of it, nothing is published."""
    before, after = adapters_in_workspace
    step = act(
        "pull_request",
        pull_request(before, after, FORK),
        inputs=UNVERIFIED
        | {
            "adapter": "adapters/good",
            "base-model": "base",
            "hf-token": "hf_must_not_be_read",
            "github-token": "ghs_must_not_be_read",
            "target-repo": "ada/stolen",
            "trust-remote-code": "true",
        },
        env={"HF_ENDPOINT": hub.url, "GITHUB_API_URL": github_api.url, "HF_TOKEN": "hf_nor_this"},
    )
    assert step.code == 0, step.log
    assert step.outputs["verdict"] == "inconclusive"
    assert step.outputs["operation"] == step.outputs["pull-request-url"] == ""
    assert github_api.requests == []
    assert "must_not_be_read" not in step.log + step.summary, "not even as a mask"
    assert "hf_nor_this" not in step.log + step.summary
    assert any("comes from a fork" in text for text in step.annotations("notice"))
    assert (
        json.loads((step.workspace / step.outputs["report"]).read_text())["settings"]["trust_remote_code"]
        is False
    )


def test_a_fork_cannot_borrow_any_identity(
    act: Callable[..., Any],
    hub: Any,
    tokens: dict[str, str],
    ada: HfApi,
    workspace: Path,
    lm_base: Path,
    lm_adapter: Path,
    tmp_path: Path,
) -> None:
    """A private base that token, variable or stored login could open stays closed: nobody asks with them."""
    ada.create_repo("ada/private-base", private=True, exist_ok=True)
    ada.upload_file(
        path_or_fileobj=lm_base / "config.json", path_in_repo="config.json", repo_id="ada/private-base"
    )
    shutil.copytree(lm_adapter, workspace / "adapter")
    stored = tmp_path / "stored"
    stored.mkdir()
    (stored / "token").write_text(tokens["ada"])
    step = act(
        "pull_request",
        pull_request(HEAD, HEAD, FORK),
        inputs={"adapter": "adapter", "base-model": "ada/private-base", "hf-token": tokens["ada"]},
        env={"HF_ENDPOINT": hub.url, "HF_TOKEN": tokens["ada"], "HF_HOME": str(stored)},
    )
    assert step.code == 2, step.log
    assert "ada/private-base" in step.results[0]["error"]


def test_an_author_whom_nobody_knows_is_an_error(act: Callable[..., Any], hub: Any) -> None:
    """The Hub lists no models for a mistyped name; a schedule that stayed green would merge nothing for ever."""
    step = act("schedule", {}, inputs={"watch": "adda", "publish": "none"}, env={"HF_ENDPOINT": hub.url})
    assert step.code == 2
    assert "no user or organisation named adda" in step.log
    assert step.outputs["verdict"] == "error"


def test_an_author_without_adapters_is_none(act: Callable[..., Any], hub: Any) -> None:
    """Users and organisations alike: theirs may still come."""
    for known in ("stranger", "newcomers"):
        step = act("schedule", {}, inputs={"watch": known, "publish": "none"}, env={"HF_ENDPOINT": hub.url})
        assert step.code == 0, step.log
        assert f"{known} has no adapters" in step.log


def test_the_adapters_of_a_collection_are_found(hub: Any, tokens: dict[str, str], ada: HfApi) -> None:
    """In the collection's order, each folder with an adapter where none is at the root; other models are left out.

    One that cannot be looked into stops none: its own merge will tell why.
    """
    for name, file in (
        ("ada/shelf-adapter", "adapter_config.json"),
        ("ada/shelf-adapter", "checkpoint-5/adapter_config.json"),
        ("ada/shelf-model", "config.json"),
        ("ada/shelf-several", "a/adapter_config.json"),
        ("ada/shelf-several", "b/c/adapter_config.json"),
    ):
        ada.create_repo(name, exist_ok=True)
        ada.upload_file(path_or_fileobj=b"{}", path_in_repo=file, repo_id=name)
    collection = ada.create_collection("Best adapters", namespace="ada")
    ada.create_repo("ada/shelf-closed", exist_ok=True)
    for name in ("ada/shelf-model", "ada/shelf-closed", "ada/shelf-several", "ada/shelf-adapter"):
        ada.add_collection_item(collection.slug, name, "model")
    address = f"{hub.url}/api/models/ada/shelf-closed/settings"
    get_session().put(
        address, json={"disabled": True}, headers={"Authorization": f"Bearer {tokens['ada']}"}
    ).raise_for_status()
    found = find_candidates(
        Inputs(watch=collection.slug),
        Trigger("schedule", Named(), scheduled=True),
        read_runner({}),
        hub=Hub(endpoint=hub.url, token=tokens["ada"]),
        github=None,
    )
    assert found == (
        Candidate("ada/shelf-closed", hub_only=True),
        Candidate("ada/shelf-several", hub_only=True, subfolder="a"),
        Candidate("ada/shelf-several", hub_only=True, subfolder="b/c"),
        Candidate("ada/shelf-adapter", hub_only=True),
    )
    assert [one.name for one in found] == [
        "shelf-closed",
        "shelf-several-a",
        "shelf-several-b-c",
        "shelf-adapter",
    ]
    assert len({one.slug for one in found}) == 4


def test_a_pull_request_gets_a_comment_and_a_status_where_checks_are_closed(
    act: Callable[..., Any], github_api: Any, adapters_in_workspace: tuple[str, str]
) -> None:
    """Without `checks: write` the status says it; the comment is one, for both adapters."""
    before, after = adapters_in_workspace
    github_api.answer("POST", ".*/check-runs", 403, {"message": "Resource not accessible by integration"})
    step = act(
        "pull_request",
        pull_request(before, after, REPOSITORY),
        inputs=UNVERIFIED | {"publish": "none", "base-model": "base", "github-token": "ghs_x"},
        env={"GITHUB_API_URL": github_api.url},
    )
    assert step.code == 2, step.log
    states = {one.body["context"]: one.body["state"] for one in github_api.sent("POST", ".*/statuses/.*")}
    assert states == {
        "merge-adapter: ./adapters/broken": "failure",
        "merge-adapter: ./adapters/good": "success",
    }
    (comment,) = github_api.sent("POST", r"/repos/octocat/adapters/issues/7/comments")
    assert comment.body["body"].startswith("<!-- merge-adapter: ")
    assert "./adapters/broken" in comment.body["body"]
    assert "https://github.com/octocat/adapters/actions/runs/1658821493" in comment.body["body"]
    assert "may not" not in step.summary, "the status stood in"


def test_feedback_that_is_not_allowed_is_said_once_and_harms_nothing(
    act: Callable[..., Any], github_api: Any, adapters_in_workspace: tuple[str, str]
) -> None:
    before, after = adapters_in_workspace
    refused = {"message": "Resource not accessible by integration"}
    github_api.answer("POST", ".*", 403, refused)
    github_api.answer("GET", ".*", 404, refused)
    step = act(
        "pull_request",
        pull_request(before, after, REPOSITORY),
        inputs=UNVERIFIED | {"publish": "none", "base-model": "base", "github-token": "ghs_x"}
        | {"adapter": "adapters/broken\nadapters/broken/../broken"},
        env={"GITHUB_API_URL": github_api.url},
    )  # fmt: skip
    assert step.code == 2
    assert len(step.results) == 1, "the same folder, named twice"
    assert step.summary.count("may not set a commit status") == 1
    assert step.summary.count("may not comment on the pull request") == 1


def test_a_release_carries_report_and_card(
    act: Callable[..., Any], github_api: Any, workspace: Path, lm_base: Path, lm_adapter: Path
) -> None:
    """The released adapter is merged; report, page and card hang on the release, its notes say where the model is."""
    shutil.copytree(lm_base, workspace / "base")
    shutil.copytree(lm_adapter, workspace / "adapter")
    event = {"action": "published", "release": {"id": 1, "tag_name": "v1"}, "repository": REPOSITORY}
    step = act(
        "release",
        event,
        inputs=UNVERIFIED | {"publish": "none", "base-model": "base", "github-token": "ghs_x"},
        env={"GITHUB_API_URL": github_api.url},
    )
    assert step.code == 0, step.log
    uploads = github_api.sent("POST", r"/repos/.*/releases/\d+/assets")
    assert len(uploads) == 3
    assert b"LORA" in uploads[0].body
    (edited,) = github_api.sent("PATCH", r"/repos/.*/releases/\d+")
    assert "## Merged models" in edited.body["body"]
    assert "./adapter" in edited.body["body"]


def test_a_release_within_a_disk_budget_carries_report_and_card_too(
    act: Callable[..., Any],
    github_api: Any,
    hub: Any,
    tokens: dict[str, str],
    ada: HfApi,
    workspace: Path,
    lm_base: Path,
    lm_adapter: Path,
    tmp_path: Path,
) -> None:
    """Shards only pass through, so no merged folder is left: page and card come from where it was published."""
    sharded = tmp_path / "sharded"
    shutil.copytree(lm_base, sharded, ignore=shutil.ignore_patterns("*.safetensors"))
    AutoModelForCausalLM.from_pretrained(lm_base).save_pretrained(sharded, max_shard_size="300KB")
    ada.create_repo("ada/action-sharded-base")
    ada.upload_folder(repo_id="ada/action-sharded-base", folder_path=sharded)
    shutil.copytree(lm_adapter, workspace / "adapter")
    event = {"action": "published", "release": {"id": 1, "tag_name": "v1"}, "repository": REPOSITORY}
    step = act(
        "release",
        event,
        inputs=UNVERIFIED
        | {"base-model": "ada/action-sharded-base", "hf-token": tokens["ada"], "github-token": "ghs_x"}
        | {"target-repo": "ada/{name}-released", "path-in-repo": "/v1/", "disk-budget": "7MB"},
        env={"HF_ENDPOINT": hub.url, "GITHUB_API_URL": github_api.url},
    )
    assert step.code == 0, step.log
    assert "pass through" in step.log
    assert len(github_api.sent("POST", r"/repos/.*/releases/\d+/assets")) == 3
    card = (step.workspace / "merge-adapter-report/adapter/README.md").read_text()
    assert "ada/adapter-released" in card


def test_a_schedule_catches_up_and_opens_an_issue_for_what_fails(
    act: Callable[..., Any],
    github_api: Any,
    hub: Any,
    tokens: dict[str, str],
    base_on_hub: str,
    lm_adapter: Path,
) -> None:
    """Of an author's repositories the adapters are found; one cannot be merged, and someone hears of it."""
    bot = HfApi(endpoint=hub.url, token=tokens["merge-bot"])
    adapter_on_hub(bot, lm_adapter, "merge-bot/nightly", base_on_hub)
    adapter_on_hub(bot, lm_adapter, "merge-bot/orphan", "ada/no-such-base")
    bot.create_repo("merge-bot/no-adapter")
    step = act(
        "schedule",
        {"schedule": "17 4 * * *", "repository": REPOSITORY},
        inputs=UNVERIFIED | {"watch": "merge-bot", "hf-token": tokens["merge-bot"], "github-token": "ghs_x"},
        env={"HF_ENDPOINT": hub.url, "GITHUB_API_URL": github_api.url},
    )
    assert step.code == 2, step.log
    nightly, orphan = step.results
    assert (nightly["adapter"], nightly["operation"]) == ("merge-bot/nightly", "created")
    assert (orphan["adapter"], orphan["verdict"]) == ("merge-bot/orphan", "error")
    assert "ada/no-such-base" in orphan["error"]
    (issue,) = github_api.sent("POST", "/repos/octocat/adapters/issues")
    assert issue.body["title"] == "merge-bot/orphan could not be merged"
    assert not github_api.sent("POST", ".*/check-runs"), "a schedule has no commit to show a verdict on"


def test_nothing_to_do_is_no_failure(act: Callable[..., Any], adapters_in_workspace: tuple[str, str]) -> None:
    _, after = adapters_in_workspace
    event = {"before": after, "after": after, "ref": "refs/heads/main", "repository": REPOSITORY}
    step = act("push", event, inputs={"publish": "none"})
    assert step.code == 0, step.log
    assert step.outputs["verdict"] == ""
    assert step.results == []
    assert step.annotations("notice") == ["No adapter below '.' changed."]
    assert "Nothing to merge" in step.summary


NO_START = {
    "an unknown value": ("push", {}, {"publish": "later"}, 2, "expected one of: pull-request, new-repo, none"),
    "a GPU that is not there": ("push", {}, {"device": "cuda", "publish": "none"}, 2, "--gpus all"),
    "an output elsewhere": ("push", {}, {"output": "../elsewhere", "publish": "none"}, 6, "outside the workspace"),
    "pull_request_target": ("pull_request_target", {}, {"publish": "none"}, 6, "on: pull_request"),
    "no token": ("repository_dispatch", {"client_payload": {"adapter": "a/b"}}, {}, 2, "Trusted Publisher"),
    "no adapter": ("schedule", {}, {"publish": "none"}, 2, "the input watch"),
    "no checkout": ("push", {"after": HEAD}, {"publish": "none"}, 2, "actions/checkout"),
    "a payload that is a path": (
        "repository_dispatch", {"client_payload": {"adapter": "/etc/passwd"}}, {"publish": "none"}, 2, "Hub id"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", NO_START)
def test_a_step_that_cannot_start_says_why_in_every_place(act: Callable[..., Any], case: str) -> None:
    """One annotation with cause and fix, the same in the summary, `error` in the output, the exit code's meaning."""
    event_name, event, inputs, code, said = NO_START[case]
    step = act(event_name, event, inputs=inputs)
    assert step.code == code, step.log
    (error,) = step.annotations("error")
    assert said in error
    assert step.outputs["verdict"] == "error"
    assert "could not start" in step.summary
    assert "Traceback" not in step.log


def test_a_merge_over_the_disk_budget_is_refused_before_it_begins(
    act: Callable[..., Any], workspace: Path, lm_base: Path, lm_adapter: Path
) -> None:
    shutil.copytree(lm_base, workspace / "base")
    shutil.copytree(lm_adapter, workspace / "adapter")
    step = act(inputs={"adapter": "adapter", "base-model": "base", "publish": "none", "disk-budget": "1MB"})
    assert step.code == 2
    assert "more than the disk budget of 1.0 MB" in step.results[0]["error"]


@pytest.mark.skipif(not Path("/sys").is_dir(), reason="no folder is known that nobody can write to")
def test_a_workspace_that_cannot_be_written_is_no_bug(
    act: Callable[..., Any], lm_base: Path, lm_adapter: Path
) -> None:
    step = act(
        inputs=UNVERIFIED | {"adapter": str(lm_adapter), "base-model": str(lm_base), "publish": "none"},
        env={"GITHUB_WORKSPACE": "/sys"},
    )
    assert step.code == 2, step.log
    assert "/sys cannot be written" in step.results[0]["error"]


def test_a_hint_that_names_an_option_says_what_it_is_here(
    act: Callable[..., Any], workspace: Path, lm_adapter: Path
) -> None:
    """The stages speak of the command line; the reader of an annotation has inputs."""
    shutil.copytree(lm_adapter, workspace / "adapter")
    step = act(inputs={"adapter": "adapter", "base-model": "adapter", "publish": "none"})
    (error,) = step.annotations("error")
    assert error.endswith("--base-model DIR An option --NAME is the input NAME of the action.")
    assert step.results[0]["hint"] in error


@pytest.mark.parametrize(
    ("inputs", "place"),
    [
        ({"target-repo": "acme/{name}-merged"}, "acme/lora-merged"),
        ({"target-repo": "acme/all", "path-in-repo": "{name}"}, "acme/all/lora"),
        ({"target-repo": "acme/one"}, "acme/one"),
        ({}, "/lora-merged"),
        ({"adapter": "acme/lora@v1, Acme/LoRA@v2"}, "Acme/LoRA-merged"),
    ],
    ids=["one name", "one folder", "no name", "by default", "two commits"],
)
def test_no_two_adapters_are_published_to_one_place(
    act: Callable[..., Any], workspace: Path, lm_adapter: Path, inputs: dict[str, str], place: str
) -> None:
    """The second would take the first one's place in its pull request, and both be told as published."""
    for run in ("monday", "tuesday"):
        shutil.copytree(lm_adapter, workspace / run / "lora")
    step = act(inputs={"adapter": "monday/lora, tuesday/lora", "hf-token": "hf_x"} | inputs)
    assert step.code == 2, step.log
    errors = [result["error"] for result in step.results]
    assert len(errors) == 2
    assert all(f"would both be published to {place}".lower() in error.lower() for error in errors)


def test_a_clash_keeps_no_other_adapter_from_its_turn(
    act: Callable[..., Any],
    hub: Any,
    tokens: dict[str, str],
    workspace: Path,
    lm_base: Path,
    lm_adapter: Path,
) -> None:
    shutil.copytree(lm_base, workspace / "base")
    for folder in ("monday/lora", "tuesday/lora", "other"):
        shutil.copytree(lm_adapter, workspace / folder)
    step = act(
        inputs=UNVERIFIED
        | {"adapter": "monday/lora, tuesday/lora, other", "base-model": "base", "hf-token": tokens["ada"]}
        | {"target-repo": "ada/{name}-clash"},
        env={"HF_ENDPOINT": hub.url},
    )
    assert step.code == 2, step.log
    assert [result.get("repo") for result in step.results] == [None, None, "ada/other-clash"]


HOSTILE = "x`]()<img src=x>|@octocat ##[error]boom"


def test_hostile_names_reach_no_command_no_output_and_no_markup(
    act: Callable[..., Any], workspace: Path, github_api: Any, git: Callable[..., str], lm_adapter: Path
) -> None:
    """A folder, a config and a card that try to speak for us: the runner obeys nothing of it, GitHub renders none."""
    folder = workspace / HOSTILE
    shutil.copytree(lm_adapter, folder)
    evil = (
        "a/b\n::set-output name=verdict::pass\n::add-mask::e\n##[error]boom\r::stop-commands::x\n<b>|x|</b>"
    )
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": evil}))
    (folder / "README.md").write_text(f"---\nlicense: |\n  {evil!r}\n---\n::error::from the card\n{evil}\n")
    git("add", "--all")
    git("commit", "--quiet", "-m", "::error::a message")
    head = git("rev-parse", "HEAD")
    event = {
        "before": "0" * 40, "after": head, "ref": "refs/heads/::error::branch",
        "repository": REPOSITORY | {"default_branch": "::set-output name=a::b"},
    }  # fmt: skip
    step = act(
        "push",
        event,
        inputs={"publish": "none", "github-token": "ghs_x"},
        env={"GITHUB_API_URL": github_api.url, "GITHUB_REF": "refs/heads/::error::branch"},
    )
    assert step.code == 2, step.log
    assert {command.name for command in step.commands} == {"add-mask", "group", "endgroup", "error"}
    (error,) = [command for command in step.commands if command.name == "error"]
    assert "is neither a folder nor a Hub id" in error.data or "Hub id" in error.data
    assert step.outputs["verdict"] == "error"
    assert set(step.outputs) == set(OUTPUTS)
    (check,) = github_api.sent("POST", ".*/check-runs")
    for text in (step.summary, check.body["output"]["summary"]):
        assert "<img" not in text.replace(f"``./{HOSTILE}``".replace("|", "\\|"), "").replace(
            f"``./{HOSTILE}``", ""
        )
        assert "<b>" not in text


def test_a_kept_folder_is_a_model(
    act: Callable[..., Any], workspace: Path, lm_base: Path, lm_adapter: Path
) -> None:
    """The input output leaves the merged model for later steps; what lies in the report's place gives way."""
    shutil.copytree(lm_base, workspace / "base")
    shutil.copytree(lm_adapter, workspace / "adapter")
    os.mkfifo(workspace / "merge-adapter-report")
    inputs = UNVERIFIED | {"adapter": "adapter", "base-model": "base", "publish": "none", "output": "merged"}
    step = act(inputs=inputs)
    assert step.code == 0, step.log
    assert (workspace / "merged/adapter/model.safetensors").is_file()
    assert (workspace / "merged/adapter/tokenizer.json").is_file()
    assert step.annotations("warning") == ["Merged, and not verified, as asked."]


def test_different_adapters_keep_their_files_apart() -> None:
    """The names of files are made of those of adapters, and no two of these become one."""
    references = ("./a/b", "./a--b", "a/b@v1", "a/b@v2", "./a b", "./a-b", ".", "./a/b/c", "./é", "./ü")
    assert len({Candidate(reference).slug for reference in references}) == len(references)
