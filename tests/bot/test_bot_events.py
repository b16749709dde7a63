"""What is read out of a webhook, and what is not."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from merge_adapter.bot.events import (
    MAIN,
    CommentEvent,
    Ignored,
    PushEvent,
    event_from_json,
    event_to_json,
    read_payload,
)
from merge_adapter.bot.inbox import Inbox, Known, Stored
from merge_adapter.bot.probe import payload
from merge_adapter.bot.settings import BotSettings
from merge_adapter.bot.store import Store
from merge_adapter.errors import MalformedError

SETTINGS = BotSettings(watch=("Ada", "acme/only-this"))
NEW, OLD = "a" * 40, "b" * 40


def read(body: Any, settings: BotSettings = SETTINGS) -> Any:
    return read_payload(body if isinstance(body, bytes) else json.dumps(body).encode(), settings)


def push(repo_id: str = "ada/style", **changes: Any) -> dict[str, Any]:
    refs = [{"ref": MAIN, "oldSha": OLD, "newSha": NEW}]
    return {**payload(repo_id, action="update", scope="repo.content", refs=refs), **changes}


def comment(text: str, **changes: Any) -> dict[str, Any]:
    body = payload("ada/style", action="create", scope="discussion.comment")
    return {
        **body,
        "discussion": {"num": 3, "id": "d", "title": "", "status": "open", "isPullRequest": False},
        "comment": {"id": "6abc", "author": {"id": "x"}, "hidden": False, "content": text},
        **changes,
    }


def test_a_push_to_main_is_read() -> None:
    assert read(push()) == PushEvent("ada/style", MAIN, OLD, NEW)


def test_the_head_is_read_from_headsha_where_no_refs_are_told() -> None:
    """The Hub's field is `headSha`; the client's own class reads `head_sha` and finds nothing."""
    body = payload("ada/style", action="create", scope="repo")
    body["repo"]["headSha"] = NEW
    assert read(body) == PushEvent("ada/style", MAIN, None, NEW)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (push("eve/style"), "not watched"),
        (push("acme/other"), "not watched"),
        (push(updatedRefs=[{"ref": "refs/pr/1", "oldSha": None, "newSha": NEW}]), "main branch did not move"),
        (push(updatedRefs=[{"ref": "refs/heads/dev", "oldSha": OLD, "newSha": NEW}]), "did not move"),
        (push(updatedRefs=[{"ref": MAIN, "oldSha": OLD, "newSha": None}]), "did not move"),
        (push(event={"action": "delete", "scope": "repo"}), "delete of repo"),
        (push(event={"action": "move", "scope": "repo"}), "move of repo"),
        (push(event={"action": "update", "scope": "repo.config"}), "repo.config"),
        (push("ada/../x"), "no name"),
        (push("ada"), "no name"),
        (comment("hello"), "nobody is mentioned"),
        (
            comment("@merge-adapter merge", event={"action": "update", "scope": "discussion.comment"}),
            "nothing",
        ),
    ],
)
def test_what_starts_nothing_says_why(body: dict[str, Any], reason: str) -> None:
    found = read(body)
    assert isinstance(found, Ignored) and reason in found.reason


def test_other_kinds_of_repositories_are_ignored() -> None:
    body = push()
    body["repo"]["type"] = "dataset"
    assert isinstance(read(body), Ignored)


def test_a_watched_repository_of_an_unwatched_owner_counts() -> None:
    assert isinstance(read(push("acme/only-this")), PushEvent)
    assert isinstance(read(push("anyone/x"), replace(SETTINGS, watch=("*",))), PushEvent)


def test_a_comment_with_a_mention_is_read() -> None:
    assert read(comment("@merge-adapter merge")) == CommentEvent("ada/style", 3, "6abc")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{",
        b"\xff\xfe",
        b"[" * 100_000,
        {},
        push(webhook={"id": "x", "version": 2}),
        push(webhook=None),
        push(repo=[]),
        push(event={}),
        push(updatedRefs=["main"]),
        comment("@x y", comment={"id": "../../x", "content": "@x y"}),
        comment("@x y", discussion={"num": -1}),
        comment("@x y", discussion={"num": 0}),
        comment("@x y", discussion={"num": True}),
        comment("@x y", discussion={"num": 10**30}),
    ],
)
def test_what_is_no_payload_is_refused(body: Any) -> None:
    with pytest.raises(MalformedError):
        read(body)


def test_a_refusal_says_what_is_missing() -> None:
    with pytest.raises(MalformedError, match="event in the webhook's body is missing, expected an object"):
        read_payload(json.dumps(push(event=None)).encode(), BotSettings(watch=("*",)))
    with pytest.raises(MalformedError, match="repo in the webhook's body is a list, expected an object"):
        read_payload(json.dumps(push(repo=[])).encode(), BotSettings(watch=("*",)))


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
        max_leaves=8,
    ),
    st.sampled_from(["event", "repo", "webhook", "discussion", "comment", "updatedRefs"]),
)
def test_no_shape_of_a_field_breaks_the_reader(value: Any, name: str) -> None:
    """Whatever a field holds, the payload is read, ignored or refused."""
    for body in (push(), comment("@merge-adapter merge")):
        with contextlib.suppress(MalformedError):
            assert isinstance(read({**body, name: value}), (PushEvent, CommentEvent, Ignored))


def test_events_survive_the_inbox(tmp_path: Path) -> None:
    """Stored once per key, in order per repository, and gone only when settled."""
    first, second = PushEvent("ada/x", MAIN, OLD, NEW), PushEvent("ada/x", MAIN, NEW, OLD)
    other = CommentEvent("ada/y", 1, "c")
    for event in (first, other):
        assert event_from_json(event_to_json(event)) == event
    with Store(tmp_path / "db") as store:
        inbox = Inbox(store)
        assert isinstance(inbox.put(first).result(), Stored)
        assert isinstance(inbox.put(first).result(), Known)
        assert isinstance(inbox.put(replace(first, repo_id="ADA/x")).result(), Known)
        for event in (second, other):
            inbox.put(event).result()
        assert [pending.event for pending in inbox.due()] == [first, other]
        inbox.settle(inbox.due()[0], "nothing")
        assert [pending.event for pending in inbox.due()] == [second, other]
        inbox.postpone(inbox.due()[0], "the Hub is down")
        assert [pending.event for pending in inbox.due()] == [other]
        assert inbox.waiting() == 2
    with Store(tmp_path / "db") as store:
        assert Inbox(store).waiting() == 2
        assert isinstance(Inbox(store).put(second).result(), Known)
