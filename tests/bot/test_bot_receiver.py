"""The webhook's answers, the look-up behind them, and comments: against a running server and the embedded Hub."""

from __future__ import annotations

import json
import re
import resource
import shutil
import socket
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import urlopen

import pytest

from merge_adapter.bot.jobs import JobOptions, JobState, Outcome, Source
from merge_adapter.bot.probe import probe
from merge_adapter.bot.rows import list_jobs
from merge_adapter.bot.server import RunningBot, start
from merge_adapter.bot.settings import BotSettings
from merge_adapter.bot.sources import private_sources
from merge_adapter.bot.store import Store
from merge_adapter.bot.survey import survey
from merge_adapter.errors import HubError, InputError, StorageError
from merge_adapter.hub import Hub
from merge_adapter.hub.catalogue import adapter_folders


@pytest.fixture
def bot(settings: BotSettings) -> Iterator[RunningBot]:
    """A bot without workers: jobs stay in the queue, where they can be looked at."""
    with start(settings) as running:
        yield running


def settled(bot: RunningBot, eventually: Callable[..., Any]) -> list[str]:
    """The notes of all events, once none waits."""
    eventually(lambda: bot.inbox.waiting() == 0)
    return [row["note"] for row in bot.queue.store.read("SELECT note FROM events ORDER BY id")]


def jobs(bot: RunningBot) -> list[tuple[str, str, JobState]]:
    return [(j.request.adapter, j.request.revision, j.state) for j in list_jobs(bot.queue.store)]


def test_a_push_becomes_a_job_once(
    bot: RunningBot, push_adapter: Any, push_event: Any, send: Any, eventually: Any
) -> None:
    """Delivered three times, it is stored once; the job names the commit that the Hub names."""
    repo_id, sha = push_adapter("ada/push-once")
    event = push_event(repo_id, sha)
    assert send(bot.webhook_url, event)[0] == 202
    assert [send(bot.webhook_url, event)[0] for _ in range(2)] == [200, 200]
    settled(bot, eventually)
    assert jobs(bot) == [(repo_id, sha, JobState.QUEUED)]
    request = list_jobs(bot.queue.store)[0].request
    assert (request.source, request.private, request.token) == (Source.WEBHOOK, False, None)


def test_a_push_whose_job_failed_may_be_delivered_again(
    bot: RunningBot, push_adapter: Any, push_event: Any, send: Any, eventually: Any
) -> None:
    """The Hub's settings have a button that replays a webhook, which is what one tries when a job failed."""
    repo_id, sha = push_adapter("ada/came-to-nothing")
    event = push_event(repo_id, sha)
    for state in (JobState.FAILED, JobState.REFUSED):
        assert send(bot.webhook_url, event)[0] == 202
        settled(bot, eventually)
        lease = bot.queue.claim("w")
        assert lease is not None
        bot.queue.finish(lease, Outcome(state))
    send(bot.webhook_url, event)
    settled(bot, eventually)
    assert [state for _, _, state in jobs(bot)] == [JobState.REFUSED, JobState.FAILED]


@pytest.mark.parametrize(
    "secret", [None, "", "wrong", "s3cret-of-the-webhoo", "\u00e9".encode().decode("latin-1")]
)
def test_a_forged_webhook_is_refused(bot: RunningBot, send: Any, push_event: Any, secret: str | None) -> None:
    status, answer = send(bot.webhook_url, push_event("ada/x", "a" * 40), secret)
    assert status == 401 and "X-Webhook-Secret" in answer["error"]
    assert bot.inbox.waiting() == 0


def test_without_a_secret_nothing_is_accepted(settings: BotSettings, send: Any, push_event: Any) -> None:
    with start(replace(settings, webhook_secret="")) as bot:
        assert send(bot.webhook_url, push_event("ada/x", "a" * 40), "")[0] == 503
        assert bot.inbox.waiting() == 0


def test_a_body_too_large_or_malformed_is_refused(bot: RunningBot, send: Any) -> None:
    # refused by its declared length, before the body is sent: a client that sends on may find the connection closed
    connection = HTTPConnection(urlsplit(bot.url).netloc, timeout=30)
    connection.putrequest("POST", "/webhook")
    connection.putheader("X-Webhook-Secret", bot.settings.webhook_secret)
    connection.putheader("Content-Length", str(bot.settings.max_body + 1))
    connection.endheaders()
    assert connection.getresponse().status == 413
    connection.close()
    assert send(bot.webhook_url, b"{}")[0] == 400
    assert send(bot.webhook_url, b"nonsense")[0] == 400


def test_events_out_of_order_end_at_the_head(
    bot: RunningBot, push_adapter: Any, push_event: Any, send: Any, eventually: Any
) -> None:
    """The older push told last starts nothing: the Hub's head counts, not the payload."""
    repo_id, first = push_adapter("ada/out-of-order")
    _, second = push_adapter("ada/out-of-order", change="two")
    for sha, old in ((second, first), (first, None)):
        assert send(bot.webhook_url, push_event(repo_id, sha, old=old))[0] == 202
    settled(bot, eventually)
    assert jobs(bot) == [(repo_id, second, JobState.QUEUED)]


def test_a_newer_push_cancels_the_job_of_the_older(
    bot: RunningBot, push_adapter: Any, push_event: Any, send: Any, eventually: Any
) -> None:
    repo_id, first = push_adapter("ada/newer")
    send(bot.webhook_url, push_event(repo_id, first))
    settled(bot, eventually)
    _, second = push_adapter("ada/newer", change="two")
    send(bot.webhook_url, push_event(repo_id, second, old=first))
    settled(bot, eventually)
    assert jobs(bot) == [(repo_id, second, JobState.QUEUED), (repo_id, first, JobState.CANCELLED)]


def test_a_push_that_changes_no_adapter_starts_nothing(
    bot: RunningBot, api: Any, push_adapter: Any, push_event: Any, send: Any, eventually: Any
) -> None:
    """Notes, or a merged model under `merged/`, is not the adapter; nor is a repository without one."""
    repo_id, first = push_adapter("ada/readme-only")
    done = api.upload_file(repo_id=repo_id, path_in_repo="notes.txt", path_or_fileobj=b"hi")
    send(bot.webhook_url, push_event(repo_id, done.oid, old=first))
    api.create_repo("ada/no-adapter")
    plain = api.upload_file(repo_id="ada/no-adapter", path_in_repo="config.json", path_or_fileobj=b"{}")
    send(bot.webhook_url, push_event("ada/no-adapter", plain.oid))
    send(bot.webhook_url, push_event("ada/does-not-exist", "c" * 40))
    notes = settled(bot, eventually)
    assert notes[:2] == ["the adapter itself did not change", "no adapter in the repository"]
    assert "does-not-exist" in notes[2]
    assert jobs(bot) == []


def test_each_adapter_of_a_repository_is_a_job_of_its_own(
    bot: RunningBot,
    api: Any,
    lm_adapter: Path,
    push_adapter: Any,
    push_event: Any,
    send: Any,
    eventually: Any,
    tmp_path: Path,
) -> None:
    """All at the first push; then those whose files changed, whose older jobs alone are replaced."""
    folder = tmp_path / "several"
    for name in ("a", "b/c"):
        shutil.copytree(lm_adapter, folder / name)
    repo_id, first = push_adapter("ada/several", folder=folder)
    send(bot.webhook_url, push_event(repo_id, first))
    settled(bot, eventually)

    def found() -> set[tuple[str, str, JobState]]:
        return {
            (job.request.subfolder, job.request.revision, job.state) for job in list_jobs(bot.queue.store)
        }

    assert found() == {("a", first, JobState.QUEUED), ("b/c", first, JobState.QUEUED)}
    assert {job.request.target for job in list_jobs(bot.queue.store)} == {
        "ada/several-a-merged",
        "ada/several-b-c-merged",
    }
    config = json.loads((folder / "a" / "adapter_config.json").read_text())
    changed = json.dumps({**config, "inference_mode": not config.get("inference_mode")}).encode()
    done = api.upload_file(repo_id=repo_id, path_in_repo="a/adapter_config.json", path_or_fileobj=changed)
    send(bot.webhook_url, push_event(repo_id, done.oid, old=first))
    assert "2 adapters were pushed" in settled(bot, eventually)
    assert found() == {
        ("a", first, JobState.CANCELLED),
        ("a", done.oid, JobState.QUEUED),
        ("b/c", first, JobState.QUEUED),
    }


def test_beside_an_adapter_at_the_root_others_are_left_alone() -> None:
    root = ("adapter_config.json", "checkpoint-5/adapter_config.json", "adapter_model.safetensors")
    assert adapter_folders(root) == ("",)
    assert adapter_folders(root[1:]) == ("checkpoint-5",)
    assert adapter_folders(("my_adapter_config.json", "README.md")) == ()


def test_a_branch_set_back_to_a_known_commit_ends_at_that_commit(
    bot: RunningBot, hub: Any, push_adapter: Any, push_event: Any, send: Any, eventually: Any
) -> None:
    """The commit was told of before and its job cancelled by the newer one, which is the head no more."""
    repo_id, first = push_adapter("ada/set-back")
    send(bot.webhook_url, push_event(repo_id, first))
    settled(bot, eventually)
    _, second = push_adapter("ada/set-back", change="two")
    back = push_event(repo_id, first, old=second)
    send(bot.webhook_url, push_event(repo_id, second, old=first))
    settled(bot, eventually)
    before = jobs(bot)
    assert before[0] == (repo_id, second, JobState.QUEUED)
    assert (
        send(bot.webhook_url, {**back, "updatedRefs": [{**back["updatedRefs"][0], "oldSha": first}]})[0]
        == 202
    )
    settled(bot, eventually)
    assert jobs(bot) == before, "it was believed what is not so on the Hub"
    (place,) = hub.data.rglob("set-back.git")
    set_back = ["git", f"--git-dir={place}", "update-ref", "refs/heads/main", first]
    subprocess.run(set_back, check=True)  # as git push --force does
    assert send(bot.webhook_url, back)[0] == 202
    settled(bot, eventually)
    assert jobs(bot)[:2] == [(repo_id, first, JobState.QUEUED), (repo_id, second, JobState.CANCELLED)]
    assert send(bot.webhook_url, back)[0] == 200
    subprocess.run([*set_back[:-1], second], check=True)
    forth = push_event(repo_id, second, old=first)
    assert send(bot.webhook_url, forth)[0] == 202, "the same step as before, and not a replay of it"
    settled(bot, eventually)
    after = jobs(bot)
    assert after[:2] == [(repo_id, second, JobState.QUEUED), (repo_id, first, JobState.CANCELLED)]
    send(bot.webhook_url, back)
    settled(bot, eventually)
    assert jobs(bot) == after, "a late delivery was believed"


def test_rewritten_history_counts_as_a_change(
    bot: RunningBot, push_adapter: Any, push_event: Any, send: Any, eventually: Any
) -> None:
    repo_id, sha = push_adapter("ada/rewritten")
    send(bot.webhook_url, push_event(repo_id, sha, old="e" * 40))
    settled(bot, eventually)
    assert [job[1] for job in jobs(bot)] == [sha]


def test_a_private_adapter_is_a_private_job(
    bot: RunningBot, push_adapter: Any, push_event: Any, send: Any, eventually: Any
) -> None:
    repo_id, sha = push_adapter("ada/hidden", private=True)
    send(bot.webhook_url, push_event(repo_id, sha))
    settled(bot, eventually)
    assert list_jobs(bot.queue.store)[0].request.private
    assert b"ada/hidden" not in urlopen(f"{bot.url}/jobs").read()
    assert b"ada/hidden" not in urlopen(f"{bot.url}/metrics").read()


@contextmanager
def commented(api: Any, repo_id: str, text: str, *, token: str = "hf_ada") -> Iterator[dict[str, Any]]:
    """A discussion with a comment, as the webhook tells it."""
    from merge_adapter.bot.probe import payload

    discussion = api.create_discussion(repo_id, "please", token=token)
    comment = api.comment_discussion(repo_id, discussion.num, text, token=token)
    yield {
        **payload(repo_id, action="create", scope="discussion.comment"),
        "discussion": {"num": discussion.num, "id": "d"},
        "comment": {"id": comment.id, "hidden": False, "content": text},
    }


def said(api: Any, repo_id: str, number: int) -> list[str]:
    events = api.get_discussion_details(repo_id, number).events
    return [event.content for event in events if event.author == "merge-bot"]


@pytest.fixture
def commanded_bot(settings: BotSettings) -> Iterator[RunningBot]:
    """A bot with an account of its own, which answers comments."""
    with start(replace(settings, token="hf_merge_bot", watch=("ada", "demo"))) as running:
        yield running


def test_a_command_starts_a_job_and_is_answered(
    commanded_bot: RunningBot, api: Any, push_adapter: Any, send: Any, eventually: Any
) -> None:
    bot = commanded_bot
    repo_id, sha = push_adapter("ada/commanded")
    with commented(api, repo_id, "@merge-adapter merge --dtype float32") as event:
        assert send(bot.webhook_url, event)[0] == 202
    settled(bot, eventually)
    job = list_jobs(bot.queue.store)[0]
    assert (job.request.revision, job.request.requested_by) == (sha, "ada")
    assert job.request.options.dtype.value == "float32" and job.request.source is Source.COMMENT
    number = event["discussion"]["num"]
    answers = eventually(lambda: said(api, repo_id, number))
    assert f"job {job.id}" in answers[0] and "queued" in answers[0]
    bot.queue.cancel(job.id, reason="enough <b>")
    answers = eventually(lambda: said(api, repo_id, number)[1:])
    assert "was cancelled" in answers[0] and "<b>" not in answers[0]


def test_a_stranger_is_told_no(
    commanded_bot: RunningBot, api: Any, push_adapter: Any, send: Any, eventually: Any
) -> None:
    """Who may not write to the repository starts nothing; a text forged in the payload does not help."""
    bot = commanded_bot
    repo_id, _ = push_adapter("ada/not-yours")
    with commented(api, repo_id, "@merge-adapter merge", token="hf_stranger") as event:
        send(bot.webhook_url, event)
    settled(bot, eventually)
    assert "only those who may write" in said(api, repo_id, event["discussion"]["num"])[0]
    with commented(api, repo_id, "nothing at all") as event:
        forged = {**event, "comment": {**event["comment"], "content": "@merge-adapter merge"}}
        send(bot.webhook_url, forged)
    assert settled(bot, eventually)[-1] == "no command in the comment"
    assert jobs(bot) == []


def test_a_bad_command_is_answered_with_what_is_wrong(
    commanded_bot: RunningBot, api: Any, push_adapter: Any, send: Any, eventually: Any
) -> None:
    bot = commanded_bot
    repo_id, _ = push_adapter("ada/misspelt")
    for text, answer in (
        ("@merge-adapter merge --dtype int4", "expected one of"),
        ("@merge-adapter merge --target-repo stranger/loot", "belongs to somebody else"),
        ("@merge-adapter merge now", "Write merge \\[--base-model ID\\]"),
        ("@merge-adapter merge --adapter ada/never-was", "give the bot's token read access"),
    ):
        with commented(api, repo_id, text) as event:
            send(bot.webhook_url, event)
        settled(bot, eventually)
        assert answer in said(api, repo_id, event["discussion"]["num"])[0]
    assert jobs(bot) == []


def test_a_refused_look_up_does_not_hold_up_what_comes_after(
    commanded_bot: RunningBot, api: Any, push_adapter: Any, push_event: Any, send: Any, eventually: Any
) -> None:
    """A comment in a discussion that is not there is settled; the push behind it becomes a job."""
    bot = commanded_bot
    repo_id, sha = push_adapter("ada/held-up")
    with commented(api, repo_id, "@merge-adapter merge") as event:
        lost = {**event, "discussion": {"num": 999, "id": "d"}}
    send(bot.webhook_url, lost)
    send(bot.webhook_url, push_event(repo_id, sha))
    settled(bot, eventually)
    assert jobs(bot) == [(repo_id, sha, JobState.QUEUED)]


@pytest.mark.parametrize(
    ("role", "settings_say", "may"),
    [("write", False, True), ("read", False, False), ("contributor", False, False), ("read", True, True)],
)
def test_members_of_an_organisation_may_command_as_their_role_says(
    tmp_path: Path,
    make_settings: Any,
    lm_adapter: Path,
    send: Any,
    eventually: Any,
    role: str,
    settings_say: bool,
    may: bool,
) -> None:
    """Reading members may not, unless the bot's owner says that all may."""
    from huggingface_hub import HfApi

    from localhub.process import LocalHub

    users = {"ada": "hf_ada", "merge-bot": "hf_merge_bot", "max": "hf_max"}
    team = {"acme": ["ada", "merge-bot:write", f"max:{role}"]}
    with LocalHub(tmp_path / "hub", users, team) as hub:
        api = HfApi(endpoint=hub.url, token="hf_ada")
        api.create_repo("acme/of-the-team")
        api.upload_folder(repo_id="acme/of-the-team", folder_path=lm_adapter)
        settings = make_settings(
            hub.url, tmp_path / "bot", token="hf_merge_bot", watch=("acme",), members_may_command=settings_say
        )
        text = "@merge-adapter verify acme/of-the-team-merged"
        with (
            start(settings) as bot,
            commented(api, "acme/of-the-team", text, token="hf_max") as event,
        ):
            send(bot.webhook_url, event)
            settled(bot, eventually)
            found = list_jobs(bot.queue.store)
            assert [job.request.options.merged for job in found] == ["acme/of-the-team-merged"] * may
            if not may:
                (answer,) = said(api, "acme/of-the-team", event["discussion"]["num"])
                assert "only those who may write" in answer and "does not tell" not in answer


def test_a_bot_that_is_told_no_roles_says_so(
    commanded_bot: RunningBot, api: Any, push_adapter: Any, send: Any, eventually: Any
) -> None:
    """Its account is no member of the organisation. Nobody but an owner or maintainer is believed then."""
    bot = commanded_bot
    repo_id, _ = push_adapter("demo/of-a-team")
    with commented(api, repo_id, "@merge-adapter merge") as event:
        send(bot.webhook_url, event)
    settled(bot, eventually)
    assert jobs(bot) == []
    answers = eventually(lambda: said(api, repo_id, event["discussion"]["num"]))
    assert "does not tell this bot who of its members may" in answers[0]


def test_a_commenter_cannot_have_the_bot_publish_what_it_alone_may_read(
    bot: RunningBot, api: Any, base_on_hub: str, push_adapter: Any, send: Any, eventually: Any
) -> None:
    """Naming a target vouches for its readers, which is not a commenter's to do with the bot's own token."""
    api.create_repo("demo/closed-base", private=True, exist_ok=True)
    for name in ("config.json",):
        path = api.hf_hub_download(base_on_hub, name)
        api.upload_file(repo_id="demo/closed-base", path_in_repo=name, path_or_fileobj=path)
    repo_id, _ = push_adapter("ada/curious")
    with start(
        replace(bot.settings, data=bot.settings.data / "of-eve", port=0, maintainers=("stranger",))
    ) as other:
        text = "@merge-adapter merge --base-model demo/closed-base --target-repo ada/loot"
        with commented(api, repo_id, text, token="hf_stranger") as event:
            send(other.webhook_url, event)
        settled(other, eventually)
        assert jobs(other) == []
        (note,) = other.queue.store.read("SELECT note FROM events")
        assert "demo/closed-base is private" in note["note"]
        with commented(api, repo_id, "@merge-adapter verify demo/closed-base", token="hf_stranger") as event:
            send(other.webhook_url, event)
        settled(other, eventually)
        assert jobs(other) == []
        note = other.queue.store.read("SELECT note FROM events")[-1]
        assert "demo/closed-base is private and belongs to somebody else" in note["note"]


def test_a_job_is_as_private_as_what_it_reads(
    bot: RunningBot,
    api: Any,
    base_on_hub: str,
    lm_adapter: Path,
    push_adapter: Any,
    tmp_path: Path,
    send: Any,
    push_event: Any,
    eventually: Any,
) -> None:
    """Its log and its report show what a private base answers, though its adapter is open to all."""
    api.create_repo("demo/hidden-base", private=True, exist_ok=True)
    api.upload_folder(repo_id="demo/hidden-base", folder_path=api.snapshot_download(base_on_hub))
    shutil.copytree(lm_adapter, tmp_path / "of-hidden")
    config = tmp_path / "of-hidden" / "adapter_config.json"
    config.write_text(config.read_text().replace(base_on_hub, "demo/hidden-base"))
    of_hidden, sha = push_adapter("ada/of-hidden", folder=tmp_path / "of-hidden")
    of_open, other = push_adapter("ada/of-open")
    push_adapter("ada/hidden-second", private=True)
    send(bot.webhook_url, push_event(of_hidden, sha))
    send(bot.webhook_url, push_event(of_open, other))
    settled(bot, eventually)
    private = {job.request.adapter: job.request for job in list_jobs(bot.queue.store)}
    assert private[of_hidden].private and not private[of_open].private
    hub = Hub(bot.settings.endpoint, "hf_ada")
    assert {one.repo_id: one.private for one in survey((of_hidden, of_open), hub, bot.settings)} == {
        of_hidden: True,
        of_open: False,
    }
    for options in (
        JobOptions(adapters=("ada/hidden-second",)),
        JobOptions(base_model="demo/hidden-base"),
        JobOptions(merged="demo/hidden-base"),
    ):
        assert private_sources(replace(private[of_open], options=options), hub)


def test_a_commenter_has_a_limit_of_open_jobs_and_is_told(
    settings: BotSettings, api: Any, push_adapter: Any, send: Any, eventually: Any
) -> None:
    with start(replace(settings, token="hf_merge_bot", jobs_per_user=1)) as bot:
        repo_id, _ = push_adapter("ada/eager")
        for text in ("@merge-adapter merge", "@merge-adapter merge --dtype float32"):
            with commented(api, repo_id, text) as event:
                send(bot.webhook_url, event)
            settled(bot, eventually)
        assert len(jobs(bot)) == 1
        assert "you have 1 open jobs" in said(api, repo_id, event["discussion"]["num"])[0]


def test_adapters_named_in_a_command_are_pinned(
    commanded_bot: RunningBot, api: Any, push_adapter: Any, send: Any, eventually: Any
) -> None:
    """A retry merges the commits that stood there when it was asked for; what is not there is said at once."""
    bot = commanded_bot
    repo_id, _ = push_adapter("ada/one-of-two")
    other, sha = push_adapter("ada/two-of-two")
    for text in (
        f"@merge-adapter merge --adapter {other} --weight 0.5 --weight 0.5",
        "@merge-adapter merge --adapter ada/never-was",
        f"@merge-adapter merge --adapter {other} --weight 0.5",
    ):
        with commented(api, repo_id, text) as event:
            send(bot.webhook_url, event)
        settled(bot, eventually)
    (job,) = list_jobs(bot.queue.store)
    assert job.request.options.adapters == (f"{other}@{sha}",) and job.request.options.weights == (0.5, 0.5)
    notes = [row["note"] for row in bot.queue.store.read("SELECT note FROM events ORDER BY id")]
    assert "ada/never-was" in notes[1] and "2 adapters but 1 weights" in notes[2]


def test_the_hub_down_for_a_while_loses_nothing(
    tmp_path: Path, make_settings: Any, lm_adapter: Path, send: Any, push_event: Any, eventually: Any
) -> None:
    """Events accepted while the Hub is away are looked up when it is back."""
    from huggingface_hub import HfApi

    from localhub.process import LocalHub

    with LocalHub(tmp_path / "hub", tokens={"ada": "hf_ada"}) as hub:
        api = HfApi(endpoint=hub.url, token="hf_ada")
        api.create_repo("ada/patient")
        sha = api.upload_folder(repo_id="ada/patient", folder_path=lm_adapter).oid
        with start(make_settings(hub.url, tmp_path / "bot")) as bot:
            hub.stop()
            assert send(bot.webhook_url, push_event("ada/patient", sha))[0] == 202
            eventually(lambda: bot.queue.store.read("SELECT failures FROM events")[0][0] > 0)
            assert jobs(bot) == []
            hub.start()
            settled(bot, eventually)
            assert jobs(bot) == [("ada/patient", sha, JobState.QUEUED)]


def test_a_full_disk_is_said_and_the_event_can_come_again(
    bot: RunningBot, send: Any, push_event: Any, eventually: Any
) -> None:
    store = bot.queue.store
    pages = store.read("PRAGMA page_count")[0][0]
    store.write(lambda db: db.execute(f"PRAGMA max_page_count = {pages}") and None)
    statuses = []
    for number in range(3000):
        event = push_event(f"ada/{'x' * 60}-{number}", f"{number:040x}")
        statuses.append(send(bot.webhook_url, event)[0])
        if statuses[-1] != 202:
            break
    assert statuses[-1] == 503

    def room_again() -> bool:
        """A full disk fails every write of a group; a look-up that goes on beside this one may be in it."""
        try:
            store.write(lambda db: db.execute("PRAGMA max_page_count = 1000000") and None)
        except StorageError:
            return False
        return True

    eventually(room_again)
    assert send(bot.webhook_url, event)[0] == 202


def test_a_burst_of_1000_webhooks_loses_none(
    settings: BotSettings,
    bot_process: Any,
    push_event: Any,
    send: Any,
    record_property: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each is stored before its answer; the time of the answers is reported, not judged."""
    _, url = bot_process(settings)
    seconds: list[float] = []

    def one(number: int) -> int:
        begun = time.perf_counter()
        status, _ = send(f"{url}/webhook", push_event(f"ada/burst-{number}", f"{number:040x}"))
        seconds.append(time.perf_counter() - begun)
        return status

    with ThreadPoolExecutor(16) as pool:
        statuses = list(pool.map(one, range(1000)))
    assert statuses == [202] * 1000
    with Store(settings.database) as store:
        assert store.read("SELECT count(*) FROM events WHERE repo_id LIKE 'ada/burst-%'")[0][0] == 1000
    at_client = statistics.quantiles(seconds, n=100)[98]
    text = urlopen(f"{url}/metrics").read().decode()
    buckets = re.findall(r'webhook_seconds_bucket\{le="([0-9.]+)"\} (\d+)', text)
    at_server = next((bound for bound, count in buckets if int(count) >= 990), "more")
    record_property("p99_seconds", round(at_client, 4))
    with capsys.disabled():
        median = statistics.median(seconds)
        print(
            f"\n1,000 webhooks, at the client: p50 {median * 1e3:.1f} ms, p99 {at_client * 1e3:.1f} ms; ",
            end="",
        )
        print(f"at the server: p99 at most {at_server} s")


def test_health_and_metrics(bot: RunningBot, send: Any, push_event: Any) -> None:
    send(bot.webhook_url, push_event("ada/x", "a" * 40), "forged")
    health = json.loads(urlopen(f"{bot.url}/health").read())
    assert health["status"] == "ok" and health["problems"] == []
    text = urlopen(f"{bot.url}/metrics").read().decode()
    assert 'merge_adapter_webhooks_total{outcome="refused"} 1' in text
    assert "merge_adapter_webhook_seconds_count 1" in text
    for line in text.splitlines():
        assert line.startswith("# ") or len(line.split()) == 2


def test_head_is_answered_as_get_is(bot: RunningBot) -> None:
    """Monitors ask so. Nothing is begun by it: what only takes POST says so."""
    parts = urlsplit(bot.url)
    for path, status in (
        ("/health", 200),
        ("/metrics", 200),
        ("/", 200),
        ("/jobs/none", 404),
        ("/webhook", 405),
    ):
        connection = HTTPConnection(parts.hostname or "", parts.port, timeout=60)
        connection.request("HEAD", path)
        answer = connection.getresponse()
        assert (answer.status, answer.read()) == (status, b""), path
        connection.close()


def test_health_tells_of_a_disk_that_takes_nothing_more(
    settings: BotSettings, bot_process: Any, send: Any, push_event: Any
) -> None:
    """As long as webhooks cannot be stored, whoever asks is told; the process itself may write no byte meanwhile."""
    process, url = bot_process(settings)

    def health() -> int:
        try:
            with urlopen(f"{url}/health") as answer:
                return int(answer.status)
        except HTTPError as error:
            with error:
                assert "cannot be used" in json.loads(error.read())["problems"][0]
                return error.code

    _, most = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (0, most))
    assert send(f"{url}/webhook", push_event("ada/x", "a" * 40))[0] == health() == 503
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (most, most))
    assert send(f"{url}/webhook", push_event("ada/x", "a" * 40))[0] == 202 and health() == 200


def test_one_server_per_folder_and_per_port(bot: RunningBot, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="another bot"), start(bot.settings):
        pass
    other = replace(bot.settings, data=tmp_path / "other")
    with pytest.raises(InputError, match="cannot listen"), start(other):
        pass


def test_the_probe_tells_a_working_bot_from_another(
    bot: RunningBot, push_adapter: Any, eventually: Any
) -> None:
    """`webhook test`: forged refused, harmless ignored, a real push accepted; wrong secrets and silence are told."""
    repo_id, sha = push_adapter("ada/probed")
    hub = Hub(bot.settings.endpoint, "hf_ada")
    checks = probe(bot.webhook_url, bot.settings, adapter=repo_id, hub=hub)
    assert [check.passed for check in checks] == [True] * 3
    settled(bot, eventually)
    assert jobs(bot) == [(repo_id, sha, JobState.QUEUED)]
    other = replace(bot.settings, webhook_secret="another")
    assert [check.passed for check in probe(bot.webhook_url, other, adapter=None, hub=None)] == [True, False]
    with socket.create_server(("127.0.0.1", 0)) as free:
        nobody = free.getsockname()[1]
    with pytest.raises(HubError, match="does not answer"):
        probe(f"http://127.0.0.1:{nobody}/webhook", bot.settings, adapter=None, hub=None)
