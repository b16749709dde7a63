"""What two threads, two processes or a bad moment could break: each case once lost a job, did it twice, or hung."""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from merge_adapter.bot import worker
from merge_adapter.bot.housekeeping import Housekeeping
from merge_adapter.bot.inbox import Inbox
from merge_adapter.bot.intake import Intake
from merge_adapter.bot.jobs import Job, JobOptions, JobRequest, JobState, Outcome, Reply, Source
from merge_adapter.bot.queue import Hold, Queue
from merge_adapter.bot.rows import find_job, list_jobs
from merge_adapter.bot.runners.base import LOG_FILE, Interrupted, Watch
from merge_adapter.bot.runners.local import LocalRunner
from merge_adapter.bot.server import WorkerProcess
from merge_adapter.bot.settings import BotSettings
from merge_adapter.bot.store import Store
from merge_adapter.bot.submission import Duplicate, Submitted
from merge_adapter.bot.vault import open_vault
from merge_adapter.bot.worker import Worker, queue_for
from merge_adapter.errors import HubError, StorageError
from merge_adapter.hub import Hub

DONE = Outcome(JobState.DONE, 0, verdict="pass")
FIRST, SECOND = "a" * 40, "b" * 40


def push(sha: str = FIRST, adapter: str = "ann/style", **changes: Any) -> JobRequest:
    return replace(JobRequest(adapter, sha, Source.WEBHOOK, private=False), **changes)


def submit(queue: Queue, request: JobRequest) -> str:
    submission = queue.submit(request)
    assert isinstance(submission, Submitted), submission
    return submission.job_id


def job_of(queue: Queue, job_id: str) -> Job:
    job = find_job(queue.store, job_id)
    assert job is not None
    return job


# ---------------------------------------------------------------------------------------------- the store


def test_a_request_given_up_before_its_turn_does_not_stop_the_writer(store: Store) -> None:
    """asyncio cancels the future of a request that a stopping server cuts off."""
    begun, go_on = threading.Event(), threading.Event()

    def slow(_: sqlite3.Connection) -> None:
        begun.set()
        go_on.wait(60)

    first = store.submit(slow)
    assert begun.wait(60)
    given_up: Future[None] = store.submit(lambda db: pytest.fail("it was given up"))
    assert given_up.cancel()
    go_on.set()
    first.result(60)
    assert not first.cancel()
    assert store.submit(lambda db: 7).result(60) == 7


def test_nothing_waits_for_ever_on_a_store_that_closes(tmp_path: Path) -> None:
    """Whatever is written while it closes is written or refused."""
    for number in range(20):
        store = Store(tmp_path / f"{number}.sqlite3")
        start = threading.Barrier(5)

        def write(store: Store = store, start: threading.Barrier = start) -> list[Future[int]]:
            start.wait(60)
            futures = []
            try:
                for _ in range(200):
                    futures.append(store.submit(lambda db: 1))
            except StorageError:
                pass
            return futures

        with ThreadPoolExecutor(4) as pool:
            callers = [pool.submit(write) for _ in range(4)]
            start.wait(60)
            store.close()
            futures = [future for caller in callers for future in caller.result()]
        assert not wait_for(futures, timeout=60).not_done


# ---------------------------------------------------------------------------------------------- the queue


def test_a_branch_set_back_gets_its_job_though_that_commit_was_merged_before(queue: Queue) -> None:
    first = submit(queue, push(observed=1.0))
    lease = queue.claim("w")
    assert lease is not None
    queue.finish(lease, DONE)
    assert queue.submit(push(observed=2.0)) == Duplicate(first)
    second = submit(queue, push(SECOND, observed=3.0))
    back = queue.submit(push(observed=4.0))
    assert isinstance(back, Submitted) and back.replaced == (second,)
    assert queue.submit(push(observed=5.0)) == Duplicate(back.job_id)


def test_a_job_that_is_being_stopped_stands_for_nothing(queue: Queue) -> None:
    """Set back while the first job has been told to stop: it will not end in a merge, so another is needed."""
    first = submit(queue, push(observed=1.0))
    lease = queue.claim("w")
    assert lease is not None
    submit(queue, push(SECOND, observed=2.0))
    again = submit(queue, push(observed=3.0))
    assert again != first and queue.claim("x") is None, "two jobs of one target at once"
    queue.finish(lease, Outcome(JobState.CANCELLED))
    heir = queue.claim("x")
    assert heir is not None and heir.job.id == again


def test_a_clock_set_back_loses_no_push(queue: Queue, clock: Any) -> None:
    """An hour of pushes would else count as older than the last one before."""
    first = submit(queue, push(observed=clock.now))
    clock.now -= 3600
    newer = queue.submit(push(SECOND, observed=clock.now))
    assert isinstance(newer, Submitted) and newer.replaced == (first,)


@pytest.mark.parametrize("way", ["retry", "release"])
def test_a_job_cancelled_before_its_worker_knew_is_not_begun_again(queue: Queue, way: str) -> None:
    job_id = submit(queue, push())
    lease = queue.claim("w")
    assert lease is not None
    assert queue.cancel(job_id, reason="enough")
    if way == "retry":
        queue.retry(lease, Outcome(JobState.FAILED, 5, "away"))
    else:
        queue.release(lease)
    job = job_of(queue, job_id)
    assert (job.state, job.message) == (JobState.CANCELLED, "enough") and queue.claim("w") is None


@pytest.mark.parametrize("fate", ["handed back", "its worker died"])
def test_a_job_that_runs_elsewhere_is_cancelled_by_a_worker_that_stops_it_there(
    queue: Queue, clock: Any, fate: str
) -> None:
    """Ended in the table alone it would go on, cost money, and publish."""
    job_id = submit(queue, push(observed=1.0))
    lease = queue.claim("w")
    assert lease is not None
    queue.hold(lease, remote="run-1")
    if fate == "handed back":
        queue.release(lease)
    newer = submit(queue, push(SECOND, observed=2.0))
    clock.now += 61
    heir = queue.claim("x")
    assert heir is not None and (heir.job.id, heir.job.cancel is None) == (job_id, False)
    assert heir.job.remote == "run-1" and queue.hold(heir) is Hold.CANCELLED
    assert queue.claim("y") is None, "the newer job ran beside it"
    queue.finish(heir, Outcome(JobState.CANCELLED))
    last = queue.claim("y")
    assert last is not None and last.job.id == newer


def test_a_job_that_runs_elsewhere_keeps_its_target_while_no_worker_follows_it(
    queue: Queue, clock: Any
) -> None:
    shared = JobOptions(target_repo="ann/shared")
    submit(queue, push(options=shared))
    lease = queue.claim("w")
    assert lease is not None
    queue.hold(lease, remote="run-1")
    queue.retry(lease, Outcome(JobState.FAILED, 5, "GitHub is away"), goes_on=True)
    submit(queue, push(adapter="ann/other", options=JobOptions(target_repo="Ann/SHARED")))
    assert queue.claim("w") is None
    clock.now += 20
    heir = queue.claim("w")
    assert heir is not None and (heir.job.remote, heir.job.round) == ("run-1", 0)
    queue.retry(heir, Outcome(JobState.FAILED, 5, "its own network"))
    clock.now += 100
    fresh = [queue.claim("w") for _ in range(2)]
    assert [one and (one.job.remote, one.job.round) for one in fresh] == [(None, 1), None]


# ------------------------------------------------------------------------------------------- the worker


def work(
    tmp_path: Path,
    settings: BotSettings,
    run: Callable[[Job, Watch], Outcome | Interrupted],
    until: Callable[[Job], bool],
    eventually: Any,
) -> Job:
    """A job of a runner that does `run`, once `until` holds for it."""

    class Scripted:
        def run(self, job: Job, token: str, watch: Watch, *, slot: int) -> Outcome | Interrupted:
            return run(job, watch)

    with Store(settings.database) as store:
        queue = queue_for(store, settings)
        job_id = submit(queue, push())
        worker = Worker(queue, Scripted(), settings, open_vault(settings))
        worker.start()
        try:
            eventually(lambda: until(job_of(queue, job_id)))
        finally:
            worker.stop()
        return job_of(queue, job_id)


@pytest.fixture
def alone(tmp_path: Path, make_settings: Any) -> BotSettings:
    """Settings of a worker whose Hub is never asked."""
    retries = {"first_wait": 0.05, "longest_wait": 0.3, "attempts": 1000}
    return make_settings("http://127.0.0.1:9", tmp_path / "bot", workers=1, **retries)


def test_what_runs_elsewhere_is_followed_when_it_could_not_be_asked(
    tmp_path: Path, alone: BotSettings, eventually: Any
) -> None:
    """Told a moment before the network failed, it is stored; only an end that was seen starts another."""
    seen: list[tuple[str | None, int]] = []

    def run(job: Job, watch: Watch) -> Outcome:
        seen.append((job.remote, job.round))
        watch.runs_at(job.remote or f"run-{job.round}")
        if len(seen) == 1:
            raise HubError("away")
        return DONE if len(seen) == 3 else Outcome(JobState.FAILED, 5, "its own network")

    job = work(tmp_path, alone, run, lambda job: not job.open, eventually)
    assert seen == [(None, 0), ("run-0", 0), (None, 1)] and job.state is JobState.DONE


def test_a_full_disk_ends_no_slot_and_no_job(tmp_path: Path, alone: BotSettings, eventually: Any) -> None:
    """A folder that cannot be made, a report that cannot be kept, a job that found no room: tried again."""
    alone.data.mkdir(parents=True)
    blocked = alone.data / "jobs"
    blocked.write_text("no folder")
    full = Outcome(JobState.FAILED, 2, "the disk is full", error_type="StorageError")
    answers = iter([OSError(28, "No space left on device"), full])

    def run(job: Job, watch: Watch) -> Outcome:
        answer = next(answers, DONE)
        if isinstance(answer, OSError):
            raise answer
        return answer

    def until(job: Job) -> bool:
        if job.failures and blocked.is_file():
            blocked.unlink()
        return not job.open

    job = work(tmp_path, alone, run, until, eventually)
    assert job.state is JobState.DONE and job.failures >= 3


def test_a_log_that_cannot_be_written_holds_up_no_job(tmp_path: Path) -> None:
    """/dev/full refuses every byte. Whoever reads a job's output must go on, or the job blocks on a full pipe."""
    (tmp_path / LOG_FILE).symlink_to("/dev/full")
    watch = Watch(tmp_path, "")
    for _ in range(3):
        watch.line("text")
    watch.line('{"stage": "merge", "done": 1, "total": 2, "unit": "bytes"}')
    assert watch.stage is not None and watch.stage.label == "merge"
    watch.close()


def test_a_killed_worker_leaves_no_folder_for_ever(
    tmp_path: Path, alone: BotSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody tries a job again that was cancelled meanwhile. Open jobs and other bots' are somebody's at work."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    settings = replace(alone, workers=0)
    with Store(settings.database) as store:
        queue = queue_for(store, settings)
        ended, waiting = submit(queue, push()), submit(queue, push(adapter="ann/other"))
        queue.cancel(ended, reason="not needed")
    folders = [tmp_path / f"merge-adapter-job-{job}-x1y2_z3" for job in (ended, waiting, "0" * 12)]
    for folder in folders:
        (folder / "base").mkdir(parents=True)
    stop = threading.Event()
    stop.set()
    worker._work(settings, stop)
    assert [folder.exists() for folder in folders] == [False, True, True]


_LAST_WORDS = """
import json, signal, sys
def end(*_):
    print(json.dumps({"verification": {"verdict": "pass", "reasons": []}}), flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
print("ready", file=sys.stderr, flush=True)
while True:
    signal.pause()
"""


def test_a_job_that_was_done_when_it_was_told_to_stop_is_done(tmp_path: Path, alone: BotSettings) -> None:
    """What is published is told as published, whoever cancelled it a moment before."""

    class Telling(Watch):
        def line(self, text: str) -> None:
            if "ready" in text:
                self.stop.set()

    watch = Telling(tmp_path, "")
    process = subprocess.Popen(
        [sys.executable, "-c", _LAST_WORDS],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    outcome = LocalRunner(alone)._follow(process, watch)
    watch.close()
    assert isinstance(outcome, Outcome) and (outcome.state, outcome.verdict) == (JobState.DONE, "pass")


def test_the_worker_is_started_again_once_that_works(
    tmp_path: Path, alone: BotSettings, eventually: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no process could be had for a while, the keeper keeps trying."""
    workers = WorkerProcess(replace(alone, log_file=str(tmp_path / "log")))
    workers.start()
    try:
        first = workers._process
        assert first is not None
        tried = threading.Event()
        program = sys.executable
        spawn = workers._spawn

        def failing() -> Any:
            tried.set()
            return spawn()

        monkeypatch.setattr(sys, "executable", str(tmp_path / "none"))
        monkeypatch.setattr(workers, "_spawn", failing)
        first.send_signal(signal.SIGKILL)
        assert tried.wait(60)
        monkeypatch.setattr(sys, "executable", program)
        eventually(lambda: workers.alive() and workers._process is not first)
    finally:
        workers.stop()


# ----------------------------------------------------------------------------- look-up and housekeeping


def test_an_event_that_finds_a_bug_holds_up_no_other_and_is_not_lost(
    settings: BotSettings, push_adapter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from merge_adapter.bot.events import PushEvent

    repo_id, sha = push_adapter("ada/behind-a-bug")
    hub = Hub(settings.endpoint, "hf_ada")
    real = hub.open

    def open_(name: str, **options: Any) -> Any:
        return {}["bug"] if name == "ada/bad" else real(name, **options)

    monkeypatch.setattr(hub, "open", open_)
    with Store(settings.database) as store:
        inbox = Inbox(store)
        for name in ("ada/bad", repo_id):
            inbox.put(PushEvent(name, "refs/heads/main", None, sha)).result()
        intake = Intake(inbox, hub, settings)
        intake.work_off()
        assert [job.request.adapter for job in list_jobs(store)] == [repo_id]
        (event,) = store.read("SELECT failures, note FROM events WHERE state = 'pending'")
        assert event["failures"] == 1 and "KeyError" in event["note"]


def test_an_event_that_is_postponed_keeps_no_later_one_of_its_repository_waiting(
    store: Store, clock: Any
) -> None:
    """Whatever makes one fail again and again, a discussion or a bug, pushes go on. Otherwise they stay in order."""
    from merge_adapter.bot.events import MAIN, CommentEvent, PushEvent

    inbox = Inbox(store)
    failing, first, second = (
        CommentEvent("ada/x", 1, "c"),
        *(PushEvent("ada/x", MAIN, None, sha * 40) for sha in "ab"),
    )
    for event in (failing, first, second):
        inbox.put(event).result()
    (due,) = inbox.due()
    assert due.event == failing
    inbox.postpone(due, "the Hub does not answer")
    (due,) = inbox.due()
    assert due.event == first
    inbox.settle(due, "done")
    assert [one.event for one in inbox.due()] == [second]
    clock.now += 10
    assert [one.event for one in inbox.due()] == [failing]


@pytest.mark.parametrize("where", ["the look-up", "the store"])
def test_a_disk_that_was_full_for_a_moment_costs_no_event_its_job(
    settings: BotSettings, push_adapter: Any, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """A StorageError is an InputError too, and bad input settles an event for good. This one is not its fault."""
    from merge_adapter.bot.events import PushEvent

    repo_id, sha = push_adapter("ada/full-for-a-moment")
    hub = Hub(settings.endpoint, "hf_ada")
    with Store(settings.database) as store:
        inbox = Inbox(store)
        inbox.put(PushEvent(repo_id, "refs/heads/main", None, sha)).result()
        target, name = (hub, "open") if where == "the look-up" else (inbox, "settle")
        real, full = getattr(target, name), iter([StorageError("the disk is full")])

        def once_full(*arguments: Any, **options: Any) -> Any:
            for error in full:
                raise error
            return real(*arguments, **options)

        monkeypatch.setattr(target, name, once_full)
        intake = Intake(inbox, hub, settings)
        intake.work_off()
        assert inbox.waiting() == 1 and list_jobs(store) == []
        store.write(lambda db: db.execute("UPDATE events SET not_before = 0") and None)
        intake.work_off()
        assert [job.request.adapter for job in list_jobs(store)] == [repo_id]


def test_an_asker_whose_discussion_fails_keeps_no_other_waiting(
    settings: BotSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    def say_once(hub: Hub, repo_id: str, number: int, text: str, *, marker: str) -> None:
        told.append(repo_id)
        if repo_id == "ann/failing":
            raise HubError("HTTP 500")

    monkeypatch.setattr("merge_adapter.bot.housekeeping.say_once", say_once)
    with Store(settings.database) as store:
        queue = queue_for(store, settings)
        for name in ("ann/failing", "ann/fine"):
            submit(queue, push(adapter=name, reply=Reply(name, 1)))
            lease = queue.claim("w")
            assert lease is not None
            queue.finish(lease, DONE)
        keeping = Housekeeping(queue, Hub(settings.endpoint, "hf_ada"), settings)
        keeping.answer()
        keeping.answer()  # not at once again
        assert told == ["ann/failing", "ann/fine"]
        assert [json.dumps(job.request.adapter) for job in queue.unanswered()] == ['"ann/failing"']
