"""What must hold when several requests, threads or processes meet."""

from __future__ import annotations

import hashlib
import json
import socket
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import httpx2
import pytest
from huggingface_hub import CommitOperationAdd

import localhub.__main__ as program
from localhub.accounts import Accounts
from localhub.database import Database
from localhub.gitstore import GitStore
from localhub.hub import open_hub
from localhub.jobs import Jobs
from localhub.repositories import Repositories

T = TypeVar("T")
TOGETHER = 8
LONG = 120.0
"""Seconds that nothing here takes, however slow the machine."""


@pytest.fixture
def eager_switching() -> Iterator[None]:
    """Let threads take turns after every few instructions."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def at_once(actions: list[Callable[[], T]]) -> list[T]:
    """The results of actions that all start at the same moment."""
    gate = threading.Barrier(len(actions))

    def run(action: Callable[[], T]) -> T:
        gate.wait(LONG)
        return action()

    with ThreadPoolExecutor(len(actions)) as pool:
        return list(pool.map(run, actions))


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def raw(hub) -> Iterator[httpx2.Client]:
    """Requests without the client's retries."""
    with httpx2.Client(
        base_url=hub.url, headers={"Authorization": "Bearer hf_alice"}, timeout=LONG
    ) as client:
        yield client


# --------------------------------------------------------------------------------------------- parts


def test_a_repository_has_one_lock(tmp_path, eager_switching):
    """Also when several threads ask for it for the first time."""
    database = Database(tmp_path / "hub.sqlite")
    accounts = Accounts(database)
    accounts.add("alice")
    repository = Repositories(database, accounts).create("model", "alice", "m", private=False)
    for number in range(50):
        store = GitStore(tmp_path / str(number))
        assert len(set(map(id, at_once([partial(store.lock, repository)] * TOGETHER)))) == 1


def test_locks_that_a_killed_hub_left_hold_up_nobody(tmp_path):
    """git keeps them as files, and refuses to move a ref that has one."""
    hub = open_hub(tmp_path)
    hub.accounts.add("alice")
    repository = hub.repositories.create("model", "alice", "m", private=False)
    hub.git.create(repository, "alice")
    left = hub.git.path(repository) / "refs" / "heads" / "main.lock"
    left.touch()
    git = open_hub(tmp_path).git.open(repository)
    head = git.resolve("main")
    sha = git.add_commit("refs/heads/main", git.tree_id(head), [head], "after", "alice")
    assert git.resolve("main") == sha


def test_transactions_of_threads_wait_for_each_other(tmp_path):
    """What one reads is what it writes on: nothing is lost, nobody is told that the database is locked."""
    database = Database(tmp_path / "hub.sqlite")
    database.write("INSERT INTO secrets VALUES ('count', '0')")

    def count() -> None:
        for _ in range(50):
            with database.writing():
                row = database.one("SELECT value FROM secrets")
                database.write("UPDATE secrets SET value = ?", str(int(row["value"]) + 1))

    at_once([count] * TOGETHER)
    assert database.one("SELECT value FROM secrets")["value"] == str(50 * TOGETHER)


def test_a_commit_that_fails_keeps_nobody_out(tmp_path):
    """It is rolled back, and what waited for it is forgotten."""
    database = Database(tmp_path / "hub.sqlite")
    done = []
    database.one("PRAGMA foreign_keys = ON")
    database.write("CREATE TABLE child (parent TEXT REFERENCES secrets (name) DEFERRABLE INITIALLY DEFERRED)")
    with pytest.raises(sqlite3.IntegrityError), database.writing():
        database.write("INSERT INTO child VALUES ('nobody')")
        database.after_commit(lambda: done.append("wrong"))
    with ThreadPoolExecutor(1) as pool:
        pool.submit(database.write, "INSERT INTO secrets VALUES ('a', 'b')").result(LONG)
    with database.writing():
        database.after_commit(lambda: done.append("right"))
        assert done == []
    assert done == ["right"]
    assert database.all("SELECT * FROM child") == []


def test_the_courier_is_woken_after_the_commit(tmp_path):
    """Before it, there is nothing for it to find."""
    hub = open_hub(tmp_path)
    hub.accounts.add("alice")
    hook = hub.webhooks.save(
        "alice",
        url="http://127.0.0.1:9",
        job=None,
        watched=[("user", "alice")],
        domains=["repo"],
        secret=None,
    )
    with hub.database.writing():
        hub.webhooks.queue(hook, {})
        assert not hub.webhooks.wake.is_set()
    assert hub.webhooks.wake.is_set()
    assert len(hub.webhooks.next_of_each()) == 1
    hub.webhooks.delete("alice", hook.id)
    hub.webhooks.queue(hook, {})
    assert hub.database.all("SELECT * FROM deliveries") == []


def test_a_restarted_hub_waits_for_its_port(monkeypatch):
    """Somebody's connection may have been given the number in between."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(OSError, match="in use"):
            program._listen(port, 0.0)
        monkeypatch.setattr(program.time, "sleep", lambda _: other.close())
        with program._listen(port, LONG) as mine:
            assert mine.getsockname()[1] == port


# ---------------------------------------------------------------------------------------------- jobs


@pytest.mark.parametrize("end", ["cancel", "stop"])
def test_a_job_that_is_just_starting_ends_too(tmp_path, monkeypatch, end):
    """Cancelled, or the Hub stopped, between the decision to start it and the start of its process."""
    jobs = Jobs(Database(tmp_path / "hub.sqlite"), tmp_path / "jobs", run=True)
    spawn, spawning, started = jobs._spawn, threading.Event(), []
    ending = threading.Event()

    def slowly(id, spec):
        spawning.set()
        # Until whoever ends the job has come as far as he can get.
        assert ending.wait(LONG)
        process = spawn(id, spec)
        started.append(process)
        return process

    monkeypatch.setattr(jobs, "_spawn", slowly)
    job = jobs.create("alice", {}, {"command": ["sleep", "1000"], "dockerImage": "x"})
    assert spawning.wait(LONG)
    finish = jobs._finish

    def finished(*arguments):
        finish(*arguments)
        ending.set()

    if end == "cancel":
        monkeypatch.setattr(jobs, "_finish", finished)
        jobs.cancel("alice", job.id)
    else:
        threading.Timer(0.05, ending.set).start()
        jobs.stop()
    try:
        assert started[0].poll() is not None
        until(lambda: not jobs._processes)
        assert jobs.get("alice", job.id).stage == ("CANCELED" if end == "cancel" else "ERROR")
    finally:
        started[0].kill()
        jobs.stop()


def test_a_hub_that_is_ending_leaves_new_jobs_to_the_next(tmp_path):
    """Recorded, and run after the next start."""
    database = Database(tmp_path / "hub.sqlite")
    jobs = Jobs(database, tmp_path / "jobs", run=True)
    jobs.stop()
    job = jobs.create("alice", {}, {"command": ["true"], "dockerImage": "x"})
    assert job.stage == "SCHEDULING"
    later = Jobs(database, tmp_path / "jobs", run=True)
    later.resume()
    until(lambda: later.get("alice", job.id).stage == "COMPLETED")
    later.stop()


# ------------------------------------------------------------------------------------- repositories


def test_a_name_is_made_and_deleted_by_many(raw, alice):
    """Each request is answered as if it had been alone; a deletion never takes a newer repository away."""
    body = {"name": "alice/in-and-out"}
    sound = []

    def make() -> None:
        for _ in range(10):
            answer = raw.post("/api/repos/create", json=body)
            assert answer.status_code in (200, 409), answer.text
            answer = raw.get("/api/models/alice/in-and-out")
            assert answer.status_code in (200, 404), answer.text
            sound.append(answer.status_code == 200)

    def delete() -> None:
        for _ in range(10):
            answer = raw.request("DELETE", "/api/repos/delete", json=body)
            assert answer.status_code in (200, 404), answer.text

    def look() -> None:
        for _ in range(10):
            assert raw.get("/api/models", params={"author": "alice"}).status_code == 200
            assert raw.get("/").status_code == 200

    at_once([make, make, make, delete, delete, delete, look])
    assert raw.post("/api/repos/create", json=body).status_code in (200, 409)
    alice.upload_file(path_or_fileobj=b"1", path_in_repo="a", repo_id="alice/in-and-out")
    assert any(sound)


def test_moves_and_commits_meet(raw, alice):
    """A commit finds the repository under its old name, under its new one, and in between."""
    alice.create_repo("alice/here")

    def move() -> None:
        for source, target in [("alice/here", "alice/there"), ("alice/there", "alice/here")] * 5:
            answer = raw.post("/api/repos/move", json={"fromRepo": source, "toRepo": target})
            assert answer.status_code == 200, answer.text

    def commit(number: int) -> int:
        for step in range(8):
            lines = [
                {"key": "header", "value": {"summary": "c"}},
                {"key": "file", "value": {"path": f"{number}-{step}", "content": "x"}},
            ]
            content = "\n".join(map(json.dumps, lines))
            answer = raw.post("/api/models/alice/here/commit/main", content=content)
            assert answer.status_code == 200, answer.text
        return 8

    at_once([move, lambda: commit(1), lambda: commit(2)])
    assert len(alice.list_repo_commits("alice/here")) == 17


def test_first_requests_of_a_repository_are_in_turn(raw, alice):
    """Commits without a parent, all at once, on repositories nobody has written to: all are kept."""
    for number in range(10):
        name = f"alice/fresh-{number}"
        alice.create_repo(name)

        def commit(step: int, name: str = name) -> int:
            lines = [
                {"key": "header", "value": {"summary": "c"}},
                {"key": "file", "value": {"path": str(step), "content": "x"}},
            ]
            return raw.post(
                f"/api/models/{name}/commit/main", content="\n".join(map(json.dumps, lines))
            ).status_code

        assert at_once([lambda step=step: commit(step) for step in range(TOGETHER)]) == [200] * TOGETHER
        assert len(alice.list_repo_commits(name)) == TOGETHER + 1


# -------------------------------------------------------------------------------------- discussions


def test_webhooks_tell_comments_in_the_order_they_are_shown_in(raw, alice, repo, receiver):
    """However many speak at once."""
    hook = alice.create_webhook(url=receiver.url, watched=[{"type": "model", "name": repo}])
    num = alice.create_discussion(repo, "Crowd").num

    def speak(who: int) -> None:
        for step in range(10):
            answer = raw.post(
                f"/api/models/{repo}/discussions/{num}/comment", json={"comment": f"{who} {step}"}
            )
            assert answer.status_code == 200, answer.text

    at_once([lambda who=who: speak(who) for who in range(TOGETHER)])
    shown = [
        event.content for event in alice.get_discussion_details(repo, num).events if event.type == "comment"
    ]
    assert len(shown) == 10 * TOGETHER + 1  # the first one opened the discussion
    heard = [payload["comment"]["content"] for payload in receiver.wait(len(shown))]
    assert heard == shown
    alice.delete_webhook(hook.id)


def test_no_edit_of_a_comment_is_lost(raw, alice, repo):
    """Each is in its history; what is hidden stays hidden, whoever edits meanwhile."""
    num = alice.create_discussion(repo, "Edits").num
    comment = alice.comment_discussion(repo, num, "first").id
    path = f"/api/models/{repo}/discussions/{num}/comment/{comment}"
    edits = [
        lambda step=step: raw.post(f"{path}/edit", json={"content": str(step)}).status_code
        for step in range(TOGETHER)
    ]
    assert at_once(edits) == [200] * TOGETHER
    (event,) = [one for one in alice.get_discussion_details(repo, num).events if one.id == comment]
    texts = {one["raw"] for one in event._event["data"]["history"]} | {event.content}
    assert texts == {"first", *map(str, range(TOGETHER))}
    assert event.number_of_edits == TOGETHER
    hide = lambda: raw.post(f"{path}/hide", json={}).status_code  # noqa: E731
    assert set(at_once([*edits, hide])) <= {200, 400}
    assert alice.get_discussion_details(repo, num).events[-1].hidden


@pytest.mark.parametrize("attempt", range(5))
def test_a_state_is_changed_once(raw, alice, repo, attempt):
    """Of those who close or merge a pull request at once one has done it, the others are told so."""
    num = alice.create_commit(
        repo, [CommitOperationAdd("x", b"1")], commit_message="x", create_pr=True
    ).pr_num
    path = f"/api/models/{repo}/discussions/{num}"
    close = lambda: raw.post(f"{path}/status", json={"status": "closed"}).status_code  # noqa: E731
    merge = lambda: raw.post(f"{path}/merge", json={}).status_code  # noqa: E731
    answers = at_once([close, merge] * (TOGETHER // 2))
    assert sorted(answers) == [200] + [409] * (TOGETHER - 1)
    details = alice.get_discussion_details(repo, num)
    assert details.status == ("closed" if answers.index(200) % 2 == 0 else "merged")
    assert sum(event.type == "status-change" for event in details.events) == 1
    assert len(alice.list_repo_commits(repo)) == (2 if details.status == "merged" else 1)


def test_a_collection_of_a_title_is_made_once(raw):
    """The others are told which one it is."""
    body = {"namespace": "alice", "title": "At once"}
    answers = at_once([lambda: raw.post("/api/collections", json=body)] * TOGETHER)
    assert sorted(answer.status_code for answer in answers) == [200] + [409] * (TOGETHER - 1)
    assert len({answer.json()["slug"] for answer in answers}) == 1


# --------------------------------------------------------------------------------------- large files


def test_the_same_file_is_uploaded_in_parts_to_two_repositories(raw, alice, repo):
    """Neither uses up the parts of the other, and a completion that is asked for twice is no error."""
    content = b"parts".ljust(17_000_000, b"\x01")
    oid = hashlib.sha256(content).hexdigest()
    alice.create_repo(f"{repo}-b")
    wanted = {
        "operation": "upload",
        "transfers": ["basic", "multipart"],
        "objects": [{"oid": oid, "size": len(content)}],
    }
    completions = []
    for name in (repo, f"{repo}-b"):
        answer = raw.post(f"/{name}.git/info/lfs/objects/batch", json=wanted).json()
        upload = answer["objects"][0]["actions"]["upload"]
        size = int(upload["header"].pop("chunk_size"))
        parts = []
        for number, url in sorted(upload["header"].items()):
            start = (int(number) - 1) * size
            etag = raw.put(url, content=content[start : start + size]).headers["etag"]
            parts.append({"partNumber": int(number), "etag": etag})
        completions.append((upload["href"], {"oid": oid, "parts": parts}))
    answers = at_once([lambda one=one: raw.post(one[0], json=one[1]) for one in completions * 3])
    assert [answer.status_code for answer in answers] == [200] * 6, [answer.text for answer in answers]
    url, body = completions[0]
    assert raw.post(url, json=body).status_code == 200


# ------------------------------------------------------------------------------------------ webhooks


def test_a_receiver_that_does_not_speak_http(raw, alice, repo):
    """A failed attempt like any other: noted, and tried again after a while, not at once and for ever."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def babble() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(65536)
                    connection.sendall(b"nonsense\r\n\r\n")

        thread = threading.Thread(target=babble)
        thread.start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/"
        hook = alice.create_webhook(url=url, watched=[{"type": "model", "name": repo}])
        alice.upload_file(path_or_fileobj=b"1", path_in_repo="a", repo_id=repo)

        def noted() -> bool:
            made = raw.get(f"/api/settings/webhooks/{hook.id}/deliveries").json()
            return made[0]["attempts"] >= 2 and "BadStatusLine" in made[0]["error"]

        try:
            until(noted)
        finally:
            alice.delete_webhook(hook.id)
            server.shutdown(socket.SHUT_RDWR)
            thread.join()
