"""Pushed, merged, offered: the real pipeline behind the real queue, with processes killed on the way."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

from merge_adapter.bot.jobs import JobKind, JobOptions, JobRequest, JobState, Source
from merge_adapter.bot.rows import JobFilter, find_job, list_jobs
from merge_adapter.bot.runners.base import LOG_FILE, REPORT_FILE
from merge_adapter.bot.server import start
from merge_adapter.bot.store import Store
from merge_adapter.bot.submission import Submitted
from merge_adapter.bot.vault import open_vault


def ended(store: Store, adapter: str) -> Any:
    found = [job for job in list_jobs(store, JobFilter(text=adapter)) if job.request.adapter == adapter]
    return found[0] if found and not found[0].open else None


def begun(settings: Any, job_id: str) -> bool:
    """Whether the merge said its first word. Its end is far on any machine: torch is imported, models are run."""
    log = settings.job_folder(job_id) / LOG_FILE
    return log.is_file() and bool(log.read_text())


def pull_requests(api: Any, repo_id: str) -> list[Any]:
    return list(api.get_repo_discussions(repo_id, discussion_type="pull_request"))


def test_a_push_ends_in_a_pull_request(
    hub: Any, tmp_path: Path, api: Any, push_adapter: Any, make_settings: Any, eventually: Any
) -> None:
    """The Hub itself delivers the webhook; the log holds stages and no token; a replay changes nothing."""
    settings = make_settings(hub.url, tmp_path / "bot", workers=1, lease_seconds=30.0)
    with start(settings) as bot:
        hook = api.create_webhook(
            url=bot.webhook_url, watched=[{"type": "user", "name": "ada"}], secret=settings.webhook_secret
        )
        try:
            repo_id, sha = push_adapter("ada/whole-way")
            job = eventually(lambda: ended(bot.queue.store, repo_id))
        finally:
            api.delete_webhook(hook.id)
        assert (job.state, job.verdict, job.exit_code) == (JobState.DONE, "pass", 0)
        assert job.request.revision == sha and job.publication["operation"] == "created"
        folder = settings.job_folder(job.id)
        report = json.loads((folder / REPORT_FILE).read_text())
        assert report["verification"]["verdict"] == "pass" and report["adapter"]["revision"] == sha
        log = (folder / LOG_FILE).read_text()
        assert "merge" in log and "hf_ada" not in log
        assert len(pull_requests(api, "ada/whole-way-merged")) == 1
        # the bot's own output and its pull request were told to it too, and started nothing
        assert {one.request.adapter for one in list_jobs(bot.queue.store)} == {repo_id}
        page = urlopen(f"{bot.url}/jobs/{job.id}").read().decode()
        assert "Open pull request 1" in page and "<svg" in page
        assert (
            urlopen(f"{bot.url}/jobs/{job.id}/report").headers["Content-Security-Policy"].endswith("sandbox")
        )


def test_refusals_are_final(
    hub: Any, tmp_path: Path, push_adapter: Any, make_settings: Any, eventually: Any
) -> None:
    """No base, a revoked token, a wrong candidate: ended once, with the message and the hint."""
    settings = make_settings(hub.url, tmp_path / "bot", workers=2, lease_seconds=30.0)
    repo_id, sha = push_adapter("ada/refusals")
    with start(settings) as bot:
        revoked = open_vault(settings).seal("hf_revoked")
        requests = (
            JobRequest(repo_id, sha, Source.PAGE, options=JobOptions(base_model="nobody/nothing")),
            JobRequest(repo_id, sha, Source.PAGE, token=revoked, requested_by="stranger"),
            JobRequest(repo_id, sha, Source.PAGE, kind=JobKind.VERIFY, options=JobOptions(merged="ada/none")),
        )
        found = []
        for request in requests:
            submission = bot.queue.submit(request)
            assert isinstance(submission, Submitted)
            found.append(submission.job_id)

        def all_ended() -> Any:
            jobs = [find_job(bot.queue.store, one) for one in found]
            waiting = any(job is None or (job.state is JobState.QUEUED and not job.failures) for job in jobs)
            return None if waiting or any(job.state is JobState.RUNNING for job in jobs if job) else jobs

        base, foreign, candidate = eventually(all_ended)
        assert base.state is JobState.REFUSED and "nobody/nothing" in base.message and base.exit_code == 2
        assert candidate.state is JobState.REFUSED and "ada/none" in candidate.message
        assert foreign.state is JobState.REFUSED and foreign.exit_code == 5 and foreign.failures == 0
        assert "does not accept" in foreign.message and "hf_revoked" not in foreign.message + foreign.hint


def _children_of(pid: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[1]) == pid:
                found.append(int(entry.name))
    return found


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.timeout(900)  # waits for leases and for merges that begin anew
def test_kill_9_of_worker_and_server_ends_in_exactly_one_pull_request_each(
    hub: Any,
    tmp_path: Path,
    api: Any,
    push_adapter: Any,
    push_event: Any,
    send: Any,
    make_settings: Any,
    bot_process: Any,
    eventually: Any,
) -> None:
    """Several adapters, and SIGKILL at random moments: every job is carried out, and seen once on the Hub.

    Merges of a killed worker notice that it is gone, and end. Replayed webhooks start nothing.
    """
    settings = make_settings(hub.url, tmp_path / "bot", workers=2, lease_seconds=2.0, attempts=20)
    pushed = dict(push_adapter(f"ada/killed-{number}") for number in range(3))
    dice = random.Random(8)
    kinds = ["server", "worker", dice.choice(("server", "worker"))]
    dice.shuffle(kinds)
    process, url = bot_process(settings)
    orphans: list[int] = []

    def done(store: Store) -> bool:
        return all(ended(store, repo_id) for repo_id in pushed)

    with Store(settings.database) as store:
        for repo_id, sha in pushed.items():
            assert send(f"{url}/webhook", push_event(repo_id, sha))[0] == 202
        for kind in kinds:
            # on a fast machine all may have ended by now; the server and its worker can be killed all the same
            eventually(lambda: any(job.state is JobState.RUNNING for job in list_jobs(store)) or done(store))
            time.sleep(dice.uniform(0.0, 2.0))
            (worker,) = eventually(partial(_children_of, process.pid))
            orphans += [worker, *_children_of(worker)]
            if kind == "worker":
                _kill(worker)
                continue
            _kill(process.pid)
            process.wait()
            process, url = bot_process(settings)
            for repo_id, sha in pushed.items():
                assert send(f"{url}/webhook", push_event(repo_id, sha))[0] == 200
        eventually(lambda: done(store), seconds=600)
        jobs = list_jobs(store)
        assert sorted((job.request.adapter, job.state, job.verdict) for job in jobs) == [
            (repo_id, JobState.DONE, "pass") for repo_id in sorted(pushed)
        ]
    eventually(lambda: all(_gone(pid) for pid in orphans))
    for repo_id in pushed:
        assert [one.status for one in pull_requests(api, f"{repo_id}-merged")] == ["open"]


def test_a_graceful_stop_hands_the_lease_back(
    hub: Any, tmp_path: Path, push_adapter: Any, make_settings: Any, eventually: Any
) -> None:
    """The next server takes the job at once, and the stop cost it no attempt."""
    settings = make_settings(hub.url, tmp_path / "bot", workers=1, lease_seconds=600.0)
    repo_id, sha = push_adapter("ada/handed-back")
    with start(settings) as bot:
        submission = bot.queue.submit(JobRequest(repo_id, sha, Source.PAGE))
        assert isinstance(submission, Submitted)
        eventually(lambda: begun(settings, submission.job_id))
    with Store(settings.database) as store:
        job = find_job(store, submission.job_id)
        assert job is not None and (job.state, job.failures, job.owner) == (JobState.QUEUED, 0, None)


def test_a_cancelled_job_is_stopped(
    hub: Any, tmp_path: Path, push_adapter: Any, make_settings: Any, eventually: Any
) -> None:
    settings = make_settings(
        hub.url, tmp_path / "bot", workers=1, lease_seconds=0.4, probe_tokens=4096, attempts=1000
    )
    repo_id, sha = push_adapter("ada/cancelled")
    with start(settings) as bot:
        submission = bot.queue.submit(JobRequest(repo_id, sha, Source.PAGE))
        assert isinstance(submission, Submitted)
        eventually(lambda: begun(settings, submission.job_id))
        bot.queue.cancel(submission.job_id, reason="cancelled by ada")
        job = eventually(lambda: ended(bot.queue.store, repo_id))
        assert (job.state, job.message) == (JobState.CANCELLED, "cancelled by ada")
