"""Webhooks that are really delivered, and jobs that really run."""

from __future__ import annotations

import time

import httpx2
import pytest
from huggingface_hub import CommitOperationAdd, WebhookPayload
from huggingface_hub.errors import HfHubHTTPError, JobNotFoundError

from localhub.process import LocalHub

WAIT_SECONDS = 120
"""What a job or webhook is waited for at most; each takes far less."""


@pytest.fixture
def hook(alice, repo, receiver):
    """A webhook on the test's repository."""
    made = alice.create_webhook(url=receiver.url, watched=[{"type": "model", "name": repo}], secret="s3cret")
    yield made
    if made.id in [one.id for one in alice.list_webhooks()]:
        alice.delete_webhook(made.id)


def test_a_push_arrives_with_secret_and_shas(alice, repo, receiver, hook):
    """Version 3: updatedRefs, headSha, and the client's own model of the payload reads it."""
    before = alice.model_info(repo).sha
    after = alice.upload_file(path_or_fileobj=b"1", path_in_repo="a", repo_id=repo).oid
    payload = receiver.wait(1)[0]
    headers = receiver.received[0][0]
    assert headers["X-Webhook-Secret"] == "s3cret"
    assert payload["event"] == {"action": "update", "scope": "repo.content"}
    assert payload["updatedRefs"] == [{"ref": "refs/heads/main", "oldSha": before, "newSha": after}]
    assert payload["repo"]["headSha"] == after
    assert payload["repo"]["name"] == repo
    assert payload["webhook"] == {"id": hook.id, "version": 3}
    assert WebhookPayload.model_validate(payload).updatedRefs[0].newSha == after


def test_every_event_of_a_pull_request(alice, bob, repo, receiver, hook):
    """In the order in which they happened."""
    bob.create_commit(repo, [CommitOperationAdd("x", b"1")], commit_message="PR", create_pr=True)
    bob.comment_discussion(repo, 1, "@bot merge")
    alice.merge_pull_request(repo, 1)
    payloads = receiver.wait(5)
    assert [(p["event"]["action"], p["event"]["scope"]) for p in payloads] == [
        ("create", "discussion"),
        ("update", "repo.content"),
        ("create", "discussion.comment"),
        ("update", "discussion"),
        ("update", "repo.content"),
    ]
    assert payloads[0]["discussion"]["isPullRequest"] is True
    assert payloads[0]["discussion"]["changes"] == {"base": "refs/heads/main"}
    assert payloads[1]["updatedRefs"][0]["ref"] == "refs/pr/1"
    assert payloads[1]["updatedRefs"][0]["oldSha"] is None
    assert payloads[2]["comment"]["content"] == "@bot merge"
    assert payloads[3]["discussion"]["status"] == "merged"
    assert payloads[4]["updatedRefs"][0]["ref"] == "refs/heads/main"
    for payload in payloads:
        WebhookPayload.model_validate(payload)


def test_failed_deliveries_are_tried_again(alice, repo, receiver, hook):
    """5xx twice, then it arrives, once."""
    receiver.answers += [500, 503]
    alice.upload_file(path_or_fileobj=b"1", path_in_repo="a", repo_id=repo)
    payloads = receiver.wait(3)
    assert payloads[0] == payloads[1] == payloads[2]


def test_a_burst_arrives_once_each_and_in_order(alice, repo, receiver, hook):
    """Many events while others are under way: none lost, none twice, none before an earlier one."""
    first = alice.create_discussion(repo, "Burst")
    for number in range(100):
        alice.comment_discussion(repo, first.num, str(number))
    alice.change_discussion_status(repo, first.num, "closed")
    payloads = receiver.until(lambda payloads: payloads and payloads[-1]["event"]["action"] == "update")
    spoken = [p["comment"]["content"] for p in payloads if p["event"]["scope"] == "discussion.comment"]
    assert spoken == [str(number) for number in range(100)]


def test_slow_or_dead_receivers_hold_up_nobody(alice, repo, receiver, hook):
    """A webhook that nobody takes does not keep the others, or the commit, waiting."""
    dead = alice.create_webhook(url="http://127.0.0.1:9/none", watched=[{"type": "user", "name": "alice"}])
    alice.upload_file(path_or_fileobj=b"1", path_in_repo="a", repo_id=repo)
    receiver.wait(1)
    alice.delete_webhook(dead.id)


def test_manage(alice, bob, repo, receiver, hook, hub):
    """Change, disable, enable, test, delete; others do not see it."""
    assert alice.get_webhook(hook.id).secret == "s3cret"
    with pytest.raises(HfHubHTTPError, match="404"):
        bob.get_webhook(hook.id)
    changed = alice.update_webhook(hook.id, domains=["discussion"], watched=[{"type": "org", "name": "acme"}])
    assert (changed.domains, changed.watched[0].name, changed.url) == (["discussion"], "acme", receiver.url)
    alice.update_webhook(hook.id, domains=["repo"], watched=[{"type": "user", "name": "alice"}])
    assert alice.disable_webhook(hook.id).disabled
    alice.upload_file(path_or_fileobj=b"1", path_in_repo="a", repo_id=repo)
    assert not alice.enable_webhook(hook.id).disabled
    headers = {"Authorization": "Bearer hf_alice"}
    httpx2.post(f"{hub.url}/api/settings/webhooks/{hook.id}/test", headers=headers).raise_for_status()
    assert len(receiver.wait(1)) == 1
    alice.delete_webhook(hook.id)
    assert hook.id not in [one.id for one in alice.list_webhooks()]


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://x", ""])
def test_urls_that_are_none(alice, url):
    """Only http and https are called."""
    with pytest.raises(HfHubHTTPError, match="must start with http"):
        alice.create_webhook(url=url, watched=[{"type": "user", "name": "alice"}])


def test_private_repositories_are_told_to_members_only(alice, bob, receiver):
    """Who may not see it hears nothing of it."""
    bobs = bob.create_webhook(url=receiver.url, watched=[{"type": "user", "name": "alice"}])
    alice.create_repo("alice/hush", private=True)
    alice.create_repo("alice/loud")
    assert {payload["repo"]["name"] for payload in receiver.wait(2)} == {"alice/loud"}
    bob.delete_webhook(bobs.id)


def test_job_runs_logs_and_ends(alice):
    """Output, environment, secrets, state."""
    code = "import os; print('hello', os.environ['A'], os.environ['B'] == 's')"
    job = alice.run_job(
        image="python:3.12", command=["python", "-c", code], env={"A": "1"}, secrets={"B": "s"}
    )
    assert job.owner.name == "alice"
    ended = alice.wait_for_job(job.id, timeout=WAIT_SECONDS, poll_interval=0.1)
    assert ended.status.stage == "COMPLETED"
    assert ended.secrets == {"B": ""}
    assert list(alice.fetch_job_logs(job_id=job.id)) == ["hello 1 True"]
    assert job.id in [one.id for one in alice.list_jobs(namespace="alice")]


def test_job_that_fails(alice):
    """The exit code is told."""
    job = alice.run_job(image="x", command=["python", "-c", "raise SystemExit(3)"], labels={"k": "v"})
    ended = alice.wait_for_job(job.id, timeout=WAIT_SECONDS, poll_interval=0.1)
    assert (ended.status.stage, ended.status.message) == ("ERROR", "Job failed with exit code: 3")
    assert job.id in [one.id for one in alice.list_jobs(labels={"k": "v"}, status="ERROR", namespace="alice")]
    missing = alice.run_job(image="x", command=["no-such-program"])
    ended = alice.wait_for_job(missing.id, timeout=WAIT_SECONDS, poll_interval=0.1)
    assert "Cannot start" in ended.status.message


def test_job_is_cancelled_with_its_children(alice, tmp_path):
    """The whole process group ends."""
    mark = tmp_path / "alive"
    job = alice.run_job(image="x", command=["sh", "-c", f"sleep 1000 & echo $! > {mark}; wait"])
    deadline = time.monotonic() + WAIT_SECONDS
    while not (mark.exists() and mark.read_text().endswith("\n")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    alice.cancel_job(job_id=job.id)
    assert alice.inspect_job(job_id=job.id).status.stage == "CANCELED"
    while _runs(int(mark.read_text())):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    """Whether a process is there and not a zombie that nobody has reaped."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_job_timeout(alice):
    """Ended when its time is up."""
    job = alice.run_job(image="x", command=["sleep", "1000"], timeout=1)
    ended = alice.wait_for_job(job.id, timeout=WAIT_SECONDS, poll_interval=0.1)
    assert "timeout" in ended.status.message


def test_jobs_of_others(bob, alice):
    """Neither seen nor started."""
    job = alice.run_job(image="x", command=["true"])
    with pytest.raises(HfHubHTTPError):
        bob.inspect_job(job_id=job.id, namespace="alice")
    with pytest.raises(HfHubHTTPError):
        bob.run_job(image="x", command=["true"], namespace="alice")
    with pytest.raises(JobNotFoundError):
        alice.inspect_job(job_id="0" * 24)


def test_webhook_starts_a_job(alice, repo):
    """The job finds payload, repository and secret in its environment."""
    code = "import os, json; print(os.environ['WEBHOOK_REPO_ID'], json.loads(os.environ['WEBHOOK_PAYLOAD'])['event'])"
    source = alice.run_job(
        image="x",
        command=["python", "-c", code],
        env={"WEBHOOK_REPO_ID": "", "WEBHOOK_PAYLOAD": '{"event": 0}'},
    )
    alice.wait_for_job(source.id, timeout=WAIT_SECONDS, poll_interval=0.1)
    hook = alice.create_webhook(job_id=source.id, watched=[{"type": "model", "name": repo}], domains=["repo"])
    assert hook.job.command[0] == "python"
    alice.upload_file(path_or_fileobj=b"1", path_in_repo="a", repo_id=repo)
    deadline = time.monotonic() + WAIT_SECONDS
    started = []
    while not started:
        assert time.monotonic() < deadline
        started = [one for one in alice.list_jobs(namespace="alice") if one.initiator.type == "webhook"]
        time.sleep(0.05)
    alice.wait_for_job(started[0].id, timeout=WAIT_SECONDS, poll_interval=0.1)
    assert next(iter(alice.fetch_job_logs(job_id=started[0].id))).startswith(f"{repo} {{'action': 'update'")
    alice.delete_webhook(hook.id)


def test_kill_loses_nothing_that_was_answered(tmp_path, receiver):
    """kill -9 between the commit and its delivery: after the restart both are there."""
    from huggingface_hub import HfApi

    with LocalHub(tmp_path / "hub", {"alice": "hf_alice"}) as hub:
        api = HfApi(endpoint=hub.url, token="hf_alice")
        api.create_repo("alice/m")
        receiver.answers += [500] * 2
        api.create_webhook(url=receiver.url, watched=[{"type": "model", "name": "alice/m"}])
        sha = api.upload_file(path_or_fileobj=b"1", path_in_repo="a", repo_id="alice/m").oid
        api.create_discussion("alice/m", "kept")
        hub.kill()
        hub.restart()
        assert api.model_info("alice/m").sha == sha
        assert [one.title for one in api.get_repo_discussions("alice/m")] == ["kept"]
        shas = [payload["repo"]["headSha"] for payload in receiver.wait(4)]
        assert set(shas) == {sha}
