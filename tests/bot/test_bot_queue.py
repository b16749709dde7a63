"""The queue keeps every job, gives it to one worker at a time, and ends it once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from merge_adapter.bot.jobs import JobKind, JobOptions, JobRequest, JobState, Outcome, Source, Stage
from merge_adapter.bot.queue import Hold, Queue
from merge_adapter.bot.rows import JobFilter, Viewer, count_jobs, find_job, list_jobs
from merge_adapter.bot.store import Store
from merge_adapter.bot.submission import Duplicate, OverLimit, Submitted
from merge_adapter.errors import StorageError

DONE = Outcome(JobState.DONE, 0, verdict="pass", publication={"url": "http://hub/a/b/discussions/1"})


def push(adapter: str = "ann/style", sha: str = "a" * 40, **changes: object) -> JobRequest:
    return replace(JobRequest(adapter, sha, Source.WEBHOOK, private=False), **changes)


def submit(queue: Queue, request: JobRequest) -> str:
    submission = queue.submit(request)
    assert isinstance(submission, Submitted)
    return submission.job_id


def test_a_job_is_claimed_once_and_finished(queue: Queue, store: Store) -> None:
    """Submitted, leased, finished: every fact is stored and the token is forgotten."""
    job_id = submit(queue, push(token=b"sealed", options=JobOptions(base_model="b/c")))
    lease = queue.claim("w1")
    assert lease is not None and lease.job.id == job_id and lease.job.request.token == b"sealed"
    assert queue.claim("w2") is None
    assert queue.hold(lease, Stage("merge", 10, 100)) is Hold.HELD
    running = find_job(store, job_id)
    assert running is not None and running.stage == Stage("merge", 10, 100)
    assert queue.finish(lease, DONE) is Hold.HELD
    job = find_job(store, job_id)
    assert job is not None
    assert (job.state, job.verdict, job.exit_code) == (JobState.DONE, "pass", 0)
    assert job.publication == {"url": "http://hub/a/b/discussions/1"}
    assert job.request.token is None and job.request.options == JobOptions(base_model="b/c")
    assert queue.claim("w1") is None


def test_two_workers_of_one_name_are_told_apart(queue: Queue, clock: Any) -> None:
    """The fence is owner and attempt: a restarted worker of the same name is another holder."""
    submit(queue, push())
    old = queue.claim("w")
    clock.now += 61
    new = queue.claim("w")
    assert old is not None and new is not None and new.attempt == old.attempt + 1
    assert queue.hold(old) is Hold.LOST
    assert queue.finish(old, DONE) is Hold.LOST
    assert queue.retry(old, DONE) is Hold.LOST
    assert queue.release(old) is Hold.LOST
    assert queue.finish(new, DONE) is Hold.HELD


def test_a_held_lease_does_not_expire(queue: Queue, clock: Any) -> None:
    submit(queue, push())
    lease = queue.claim("w1")
    assert lease is not None
    for _ in range(5):
        clock.now += 50
        assert queue.claim("w2") is None
        assert queue.hold(lease) is Hold.HELD


def test_a_push_counts_once_a_person_may_ask_again(queue: Queue) -> None:
    """Replayed webhooks start nothing even when the job has ended; people are refused only while it is open."""
    job_id = submit(queue, push())
    assert queue.submit(push()) == Duplicate(job_id)
    lease = queue.claim("w")
    assert lease is not None
    assert queue.submit(push(source=Source.PAGE, requested_by="ann")) == Duplicate(job_id)
    queue.finish(lease, Outcome(JobState.REFUSED, 6, "gated"))
    assert queue.submit(push()) == Duplicate(job_id)
    assert isinstance(queue.submit(push(source=Source.COMMENT, requested_by="ann")), Submitted)


def test_a_push_that_failed_for_want_of_network_may_come_again(queue: Queue) -> None:
    submit(queue, push())
    lease = queue.claim("w")
    assert lease is not None
    queue.finish(lease, Outcome(JobState.FAILED, 5, "Hub down"))
    assert isinstance(queue.submit(push()), Submitted)


def test_different_options_users_and_kinds_are_different_jobs(queue: Queue) -> None:
    submit(queue, push())
    for other in (
        push(options=JobOptions(target_repo="ann/x")),
        push(token=b"t", requested_by="bob", options=JobOptions(target_repo="bob/y")),
        push(kind=JobKind.VERIFY, options=JobOptions(merged="ann/style-merged")),
    ):
        assert isinstance(queue.submit(other), Submitted)


def test_a_newer_commit_cancels_older_jobs(queue: Queue, store: Store) -> None:
    """Waiting ones end at once, running ones at their next heartbeat; other adapters are left alone."""
    first, other = submit(queue, push(observed=1.0)), submit(queue, push("ann/other", observed=1.0))
    lease = queue.claim("w")
    assert lease is not None and lease.job.id == first
    second = queue.submit(push(sha="b" * 40, observed=2.0))
    assert isinstance(second, Submitted) and second.replaced == (first,)
    assert queue.hold(lease) is Hold.CANCELLED
    third = queue.submit(push(sha="c" * 40, observed=3.0))
    assert isinstance(third, Submitted) and set(third.replaced) == {first, second.job_id}
    queue.finish(lease, Outcome(JobState.CANCELLED, message="replaced"))
    states = {job.id: job.state for job in list_jobs(store)}
    assert states == {
        first: JobState.CANCELLED,
        second.job_id: JobState.CANCELLED,
        third.job_id: JobState.QUEUED,
        other: JobState.QUEUED,
    }


def test_an_older_observation_arriving_late_changes_nothing(queue: Queue) -> None:
    """Whoever asked the Hub first and stored last must not cancel the newer commit's job."""
    newer = submit(queue, push(sha="b" * 40, observed=2.0))
    assert queue.submit(push(sha="a" * 40, observed=1.0)) == Duplicate(newer)
    lease = queue.claim("w")
    assert lease is not None and lease.job.request.revision == "b" * 40
    assert queue.hold(lease) is Hold.HELD


def test_one_at_a_time_per_target(queue: Queue, clock: Any) -> None:
    """Two adapters may share a target; their jobs run one after the other, others pass them by."""
    options = JobOptions(target_repo="ann/shared")
    submit(queue, push("ann/one", options=options))
    clock.now += 1
    submit(queue, push("ann/two", options=options))
    clock.now += 1
    submit(queue, push("ann/three"))
    first, second = queue.claim("w1"), queue.claim("w2")
    assert first is not None and second is not None
    assert (first.job.request.adapter, second.job.request.adapter) == ("ann/one", "ann/three")
    assert queue.claim("w3") is None
    queue.finish(first, DONE)
    third = queue.claim("w3")
    assert third is not None and third.job.request.adapter == "ann/two"


def test_people_go_before_pushes_and_pushes_before_catching_up(queue: Queue, clock: Any) -> None:
    for adapter, source in (("a/b", Source.BACKFILL), ("a/w", Source.WEBHOOK), ("a/p", Source.PAGE)):
        submit(queue, push(adapter, source=source))
        clock.now += 1
    order = [lease.job.request.adapter for lease in iter(lambda: queue.claim("w"), None)]
    assert order == ["a/p", "a/w", "a/b"]


def test_retries_wait_longer_each_time_and_end(queue: Queue, store: Store, clock: Any) -> None:
    job_id = submit(queue, push())
    failed = Outcome(JobState.FAILED, 5, "the Hub is down", "Wait.")
    waits = []
    for _ in range(2):
        lease = queue.claim("w")
        assert lease is not None
        assert queue.retry(lease, failed) is Hold.HELD
        job = find_job(store, job_id)
        assert job is not None and job.state is JobState.QUEUED and job.message == "the Hub is down"
        assert queue.claim("w") is None
        waits.append(job.not_before - clock.now)
        clock.now = job.not_before
    assert 10 <= waits[0] <= 12.5 and 20 <= waits[1] <= 25
    lease = queue.claim("w")
    assert lease is not None
    queue.retry(lease, failed)
    job = find_job(store, job_id)
    assert job is not None and job.state is JobState.FAILED
    assert job.message == "the Hub is down (tried 3 times)" and job.exit_code == 5


def test_a_job_that_kills_its_workers_is_given_up(queue: Queue, store: Store, clock: Any) -> None:
    job_id = submit(queue, push())
    for _ in range(3):
        assert queue.claim("w") is not None
        clock.now += 61
    assert queue.claim("w") is None
    job = find_job(store, job_id)
    assert job is not None and job.state is JobState.FAILED and "died during this job, 3 times" in job.message


def test_a_released_job_is_taken_at_once_and_costs_no_attempt(queue: Queue) -> None:
    submit(queue, push())
    for _ in range(10):
        lease = queue.claim("w")
        assert lease is not None and lease.job.failures == 0
        assert queue.release(lease) is Hold.HELD


def test_a_cancelled_job_whose_worker_died_ends(queue: Queue, store: Store, clock: Any) -> None:
    job_id = submit(queue, push())
    queue.claim("w")
    assert queue.cancel(job_id, reason="ann said so")
    clock.now += 61
    assert queue.claim("w2") is None
    job = find_job(store, job_id)
    assert job is not None and (job.state, job.message) == (JobState.CANCELLED, "ann said so")
    assert not queue.cancel(job_id, reason="again")


def test_open_jobs_per_user_are_limited(queue: Queue) -> None:
    for name in ("ann/1", "ann/2"):
        queue.submit(push(name, source=Source.PAGE, requested_by="ann"), limit=2)
    third = push("ann/3", source=Source.PAGE, requested_by="ann")
    assert queue.submit(third, limit=2) == OverLimit(2)
    assert isinstance(queue.submit(replace(third, requested_by="bob"), limit=2), Submitted)


def test_lists_filter_search_and_keep_private_jobs_private(queue: Queue, store: Store) -> None:
    submit(queue, push("ann/open"))
    submit(queue, push("acme/secret", private=True))
    submit(queue, push("ann/mine", private=True, requested_by="bob", source=Source.PAGE))

    def names(**filters: object) -> set[str]:
        return {job.request.adapter for job in list_jobs(store, JobFilter(**filters))}

    assert names() == {"ann/open", "acme/secret", "ann/mine"}
    assert names(viewer=Viewer()) == {"ann/open"}
    assert names(viewer=Viewer("bob", ("acme",))) == {"ann/open", "acme/secret", "ann/mine"}
    assert names(viewer=Viewer("ann")) == {"ann/open", "ann/mine"}
    assert names(viewer=Viewer("eve", ("acm", "acme/secret"))) == {"ann/open"}
    assert names(text="SECRET") == {"acme/secret"}
    assert names(text="%") == set()
    assert names(states=(JobState.RUNNING,)) == set()
    assert count_jobs(store, JobFilter(viewer=Viewer())) == {JobState.QUEUED: 1}
    for job in list_jobs(store):
        assert Viewer("eve").may_see(job) == (job.request.adapter == "ann/open")


def test_many_threads_and_two_stores_never_share_a_job(tmp_path: Path) -> None:
    """Two processes' worth of stores on one file: 200 jobs, each claimed exactly once."""
    path = tmp_path / "bot.sqlite3"
    with Store(path) as one, Store(path) as two:
        queues = (Queue(one), Queue(two))
        futures = [queues[n % 2].submit_soon(push(f"ann/{n}")) for n in range(200)]
        assert all(isinstance(f.result(), Submitted) for f in futures)
        claimed: list[str] = []

        def work(queue: Queue, name: str) -> None:
            while (lease := queue.claim(name)) is not None:
                claimed.append(lease.job.id)
                assert queue.finish(lease, DONE) is Hold.HELD

        threads = [threading.Thread(target=work, args=(queues[n % 2], f"w{n}")) for n in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(claimed) == len(set(claimed)) == 200


def test_one_bad_write_does_not_undo_its_neighbours(store: Store) -> None:
    """Writes that share a commit are independent."""

    def insert(number: int):
        def work(db):
            db.execute(
                "INSERT INTO events (key, repo_id, body, received, not_before, state) VALUES (?, 'r', '', 0, 0, 'x')",
                (str(number),),
            )
            if number == 1:
                raise RuntimeError("bad")
            return number

        return work

    futures = [store.submit(insert(number)) for number in range(3)]
    wait(futures)
    assert [f.exception() and str(f.exception()) for f in futures] == [None, "bad", None]
    assert [row["key"] for row in store.read("SELECT key FROM events ORDER BY id")] == ["0", "2"]


def test_a_full_disk_refuses_and_forgets_nothing(store: Store, queue: Queue) -> None:
    """No job is half stored; what was stored before is still there, and room makes it work again."""
    first = submit(queue, push("ann/first"))
    store.write(lambda db: db.execute(f"PRAGMA max_page_count = {_pages(store)}") and None)
    with pytest.raises(StorageError, match="disk"):
        for number in range(1000):
            queue.submit(push(f"ann/{number}", options=JobOptions(license="x" * 3000)))
    kept = len(list_jobs(store, limit=2000))
    store.write(lambda db: db.execute("PRAGMA max_page_count = 1000000") and None)
    submit(queue, push("ann/last"))
    jobs = list_jobs(store, limit=2000)
    assert len(jobs) == kept + 1 and jobs[-1].id == first


def _pages(store: Store) -> int:
    return store.read("PRAGMA page_count")[0][0]


@pytest.mark.parametrize("version", [1, 99])
def test_a_store_of_another_version_is_refused(tmp_path: Path, version: int) -> None:
    path = tmp_path / "bot.sqlite3"
    with Store(path) as store:
        store.write(lambda db: db.execute(f"PRAGMA user_version = {version}") and None)
    with pytest.raises(StorageError, match=f"schema {version}, expected"):
        Store(path)


def test_an_unusable_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        Store(tmp_path / "file" / "bot.sqlite3")


_CLIENT = """
import sys
from merge_adapter.bot.jobs import JobRequest, Source, JobState, Outcome
from merge_adapter.bot.queue import Queue
from merge_adapter.bot.store import Store
queue = Queue(Store(__import__("pathlib").Path(sys.argv[2])), lease_seconds=3600)
if sys.argv[1] == "submit":
    for number in range(100000):
        queue.submit(JobRequest(f"ann/{number}", "a" * 40, Source.WEBHOOK))
        print(number, flush=True)
else:
    lease = queue.claim("doomed")
    print(lease.job.id, flush=True)
    sys.stdin.read()
"""


def _client(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _CLIENT, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def _kill(process: subprocess.Popen[str]) -> str:
    """What it had written and was not read yet; `communicate` would pass over what `readline` took in with a line."""
    process.send_signal(signal.SIGKILL)
    assert process.stdout is not None
    with process:
        return process.stdout.read()


def test_every_job_acknowledged_before_kill_9_is_there(tmp_path: Path) -> None:
    path = tmp_path / "bot.sqlite3"
    process = _client("submit", str(path))
    assert process.stdout is not None
    seen = "".join(process.stdout.readline() for _ in range(20))
    acknowledged = len((seen + _kill(process)).split())
    with Store(path) as store:
        stored = sum(count_jobs(store).values())
        assert acknowledged <= stored <= acknowledged + 1
        assert store.read("PRAGMA integrity_check")[0][0] == "ok"


def test_the_job_of_a_worker_killed_with_kill_9_is_done_by_another(tmp_path: Path) -> None:
    path = tmp_path / "bot.sqlite3"
    with Store(path) as store, Store(path, clock=lambda: time.time() + 3700) as later:
        queue = Queue(store)
        job_id = submit(queue, push())
        process = _client("claim", str(path))
        assert process.stdout is not None and process.stdout.readline().strip() == job_id
        assert queue.claim("heir") is None
        _kill(process)
        assert queue.claim("heir") is None
        lease = Queue(later).claim("heir")
        assert lease is not None
        assert lease.job.id == job_id and lease.attempt == 2 and lease.job.failures == 1
        assert queue.finish(lease, DONE) is Hold.HELD
