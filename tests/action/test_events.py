"""Events in GitHub's own shapes, and what is made of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from merge_adapter.action.events import Changed, Everything, Named, Nothing, Trigger, read_trigger
from merge_adapter.action.runner import Runner, read_runner
from merge_adapter.errors import InputError, PolicyError

BASE = "f95f852bd8fca8fcc58a9a2d6c842781e32a215e"
HEAD = "ec26c3e57ca3a959ca5aad62de7213c562f8c821"
ZERO = "0" * 40
REPOSITORY = {"id": 186853002, "full_name": "octocat/adapters", "default_branch": "main", "fork": False}
FORK = {"id": 186853003, "full_name": "mallory/adapters", "default_branch": "main", "fork": True}


def runner(name: str, event: dict[str, Any], sha: str = HEAD) -> Runner:
    return Runner(
        workspace=Path.cwd(), event_name=name, event=event, repository="octocat/adapters", sha=sha,
        server_url="https://github.com", api_url="https://api.github.com",
        run_id="1", run_attempt="1", workflow="w", job="j", outputs=None, summary=None,
    )  # fmt: skip


def trigger(name: str, event: dict[str, Any], sha: str = HEAD) -> Trigger:
    return read_trigger(runner(name, event, sha))


def push(**changes: Any) -> dict[str, Any]:
    return {
        "ref": "refs/heads/main", "before": BASE, "after": HEAD, "created": False, "deleted": False,
        "forced": False, "base_ref": None, "repository": REPOSITORY, "pusher": {"name": "octocat"},
        "commits": [{"id": HEAD, "message": "Train it longer"}],
    } | changes  # fmt: skip


def pull_request(
    head_repo: dict[str, Any] | None = REPOSITORY, action: str = "synchronize"
) -> dict[str, Any]:
    return {
        "action": action,
        "number": 7,
        "pull_request": {
            "number": 7,
            "state": "open",
            "head": {"label": "x:patch", "ref": "patch", "sha": HEAD, "repo": head_repo},
            "base": {"label": "octocat:main", "ref": "main", "sha": BASE, "repo": REPOSITORY},
        },
        "repository": REPOSITORY,
    }


def test_a_push_asks_for_what_changed_and_reports_on_its_commit() -> None:
    assert trigger("push", push()) == Trigger("push", Changed(BASE, HEAD), sha=HEAD)


@pytest.mark.parametrize(
    ("ref", "trunk"), [("refs/heads/patch", "main"), ("refs/heads/main", None), ("refs/tags/v1", None)]
)
def test_a_new_branch_is_compared_with_the_default_branch(ref: str, trunk: str | None) -> None:
    """It has no commit before it. The default branch itself and a tag have nothing to be compared with."""
    event = push(ref=ref, before=ZERO, created=True)
    assert trigger("push", event).wanted == Changed(None, HEAD, trunk=trunk)


def test_a_deleted_branch_is_nothing_to_do() -> None:
    assert isinstance(trigger("push", push(after=ZERO, deleted=True)).wanted, Nothing)


def test_a_pull_request_of_the_repository_itself() -> None:
    assert trigger("pull_request", pull_request()) == Trigger(
        "pull_request", Changed(BASE, HEAD, pull_request=7), sha=HEAD, pull_request=7
    )


@pytest.mark.parametrize("head_repo", [FORK, None], ids=["fork", "fork deleted since"])
def test_a_pull_request_from_a_fork_is_known_as_one(head_repo: dict[str, Any] | None) -> None:
    assert trigger("pull_request", pull_request(head_repo)).from_fork


@pytest.mark.parametrize(("head", "expected"), [(FORK, True), (None, True), (REPOSITORY, False)])
def test_whatever_event_brings_the_code_of_a_fork_it_is_known_as_one(
    head: dict[str, Any] | None, expected: bool
) -> None:
    """A review carries the pull request; `workflow_run` has the secrets, whoever's commit it follows."""
    run = {"action": "completed", "workflow_run": {"head_repository": head}, "repository": REPOSITORY}
    assert trigger("pull_request_review", pull_request(head)).from_fork is expected
    assert trigger("workflow_run", run).from_fork is expected


def test_a_closed_pull_request_is_nothing_to_do() -> None:
    assert isinstance(trigger("pull_request", pull_request(action="closed")).wanted, Nothing)


def test_pull_request_target_is_refused() -> None:
    """It runs with the repository's secrets on code that anyone can propose."""
    with pytest.raises(PolicyError, match="pull_request_target"):
        trigger("pull_request_target", pull_request(FORK))


@pytest.mark.parametrize("action", ["published", "released", "prereleased"])
def test_a_release_asks_for_every_adapter_of_its_tag(action: str) -> None:
    event = {"action": action, "release": {"id": 1, "tag_name": "v1"}, "repository": REPOSITORY}
    assert trigger("release", event) == Trigger("release", Everything(), sha=HEAD, release=1)


@pytest.mark.parametrize("action", ["edited", "created", "deleted", "unpublished"])
def test_an_edited_release_is_left_alone(action: str) -> None:
    """The action edits the notes itself; going by that event would never end."""
    event = {"action": action, "release": {"id": 1}, "repository": REPOSITORY}
    assert isinstance(trigger("release", event).wanted, Nothing)


def test_a_dispatch_names_an_adapter_and_its_commit() -> None:
    event = {
        "action": "merge-adapter",
        "branch": "main",
        "client_payload": {"adapter": "acme/adapter", "revision": HEAD},
        "repository": REPOSITORY,
    }
    assert trigger("repository_dispatch", event).wanted == Named((f"acme/adapter@{HEAD}",), hub_only=True)


def test_the_bots_dispatch_carries_its_options() -> None:
    """The shape that the bot's GitHub runner sends."""
    payload = {
        "job": "5f2c.0",
        "adapter": "acme/adapter",
        "revision": HEAD,
        "subfolder": "checkpoint-10",
        "options": {
            "dtype": "bfloat16",
            "base_model": "acme/base",
            "private": True,
            "license": None,
            "combine-with": "acme/two@v1:last\nacme/three",
            "weights": "1\n-0.5\n2",
            "density": 0.5,
        },
    }
    wanted = trigger("repository_dispatch", {"client_payload": payload}).wanted
    assert isinstance(wanted, Named)
    assert dict(wanted.inputs) == {
        "base-model": "acme/base",
        "combine-with": "acme/two@v1:last\nacme/three",
        "density": "0.5",
        "dtype": "bfloat16",
        "private": "true",
        "subfolder": "checkpoint-10",
        "weights": "1\n-0.5\n2",
    }


@pytest.mark.parametrize(
    "options",
    [
        {"trust_remote_code": True},
        {"hf-token": "hf_x"},
        {"verify": False},
        {"publish": "none"},
        {"allow_base": "*/*"},
        {"output": "/etc"},
        {"base_model": "/models/base"},
        {"combine_with": "acme/two\n/models/secret"},
        {"combine_with": "../secret"},
        {"dtype": ["float32"]},
        {"subfolder": "one", "sub_folder": "two"},
        {"target-repo": "acme/one", "target_repo": "acme/two"},
        ["dtype"],
        "dtype",
    ],
)
def test_a_dispatch_cannot_widen_trust_or_say_what_is_not_understood(options: Any) -> None:
    with pytest.raises(InputError, match="the event"):
        trigger("repository_dispatch", {"client_payload": {"adapter": "acme/x", "options": options}})


@pytest.mark.parametrize(
    ("payload", "expected"),
    [
        ({"options": {"subfolder": "one"}}, (("subfolder", "one"),)),
        ({"options": {"subfolder": "one"}, "subfolder": ""}, (("subfolder", "one"),)),
        ({"options": {"subfolder": "one"}, "subfolder": "one"}, (("subfolder", "one"),)),
        ({"subfolder": "one"}, (("subfolder", "one"),)),
        ({"subfolder": None, "options": None, "revision": ""}, ()),
    ],
)
def test_a_subfolder_counts_wherever_the_payload_says_it(payload: dict[str, Any], expected: Any) -> None:
    wanted = trigger("repository_dispatch", {"client_payload": {"adapter": "acme/x"} | payload}).wanted
    assert wanted == Named(("acme/x",), hub_only=True, inputs=expected)


@pytest.mark.parametrize(
    "payload",
    [
        {"adapter": "/etc"},
        {"adapter": "../secrets"},
        {"adapter": "acme/../x"},
        {"adapter": "acme"},
        {"adapter": "acme/x\n::error::y"},
        {"adapter": ["acme/x"]},
        {"adapter": "acme/x", "revision": "--upload-pack=x"},
        {"adapter": "acme/x", "revision": "a..b"},
        {"adapter": "acme/x", "revision": 7},
    ],
)
def test_a_dispatch_names_nothing_but_the_hub(payload: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="the event names"):
        trigger("repository_dispatch", {"client_payload": payload})


def test_what_a_person_typed_into_the_form_counts() -> None:
    assert trigger("workflow_dispatch", {"inputs": {"adapter": " ./adapters/one "}}).wanted == Named(
        ("./adapters/one",)
    )
    assert trigger("workflow_dispatch", {"inputs": {"adapter": "acme/one, acme/two"}}).wanted == Named(
        ("acme/one", "acme/two")
    )
    assert trigger("workflow_dispatch", {"inputs": None}).wanted == Named()


def test_a_schedule_is_watched_by_nobody() -> None:
    assert trigger("schedule", {"schedule": "17 4 * * *"}).scheduled


def test_other_events_leave_it_to_the_inputs() -> None:
    assert trigger("merge_group", {}) == Trigger("merge_group", Named())


@pytest.mark.parametrize(
    ("name", "event"),
    [
        ("push", push(after="HEAD; rm -rf /")),
        ("push", push(before="--output=x")),
        ("pull_request", {"action": "opened"}),
        ("pull_request", pull_request() | {"pull_request": {"number": "7", "head": {}, "base": {}}}),
        ("release", {"action": "published", "release": {"id": True}}),
    ],
)
def test_payloads_that_github_never_sends_are_refused(name: str, event: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        trigger(name, event)


def test_a_hostile_default_branch_is_not_used() -> None:
    event = push(ref="refs/heads/patch", before=ZERO, repository=REPOSITORY | {"default_branch": "--exec=x"})
    assert trigger("push", event).wanted == Changed(None, HEAD)


def test_an_event_that_is_no_json_is_an_error_of_the_surroundings(tmp_path: Path) -> None:
    file = tmp_path / "event.json"
    for text in ("{", "[]"):
        file.write_text(text)
        with pytest.raises(InputError, match="event"):
            read_runner({"GITHUB_EVENT_PATH": str(file)})


def test_outside_of_github_there_is_no_event() -> None:
    there = read_runner({})
    assert (there.event_name, there.event, there.outputs) == ("workflow_dispatch", {}, None)
