"""A network that breaks, at each kind of request: a run finishes or fails clean, and the next one completes it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from huggingface_hub import constants

from localhub.faults import Answer, Cut, CutRequest, ExpiredToken, FaultProxy, LoseAnswer, Rule
from merge_adapter.errors import HubError
from merge_adapter.publish import PublishSettings, publish
from merge_adapter.types import Operation, Publication, PublishTo, Silent

DISCUSSIONS = r"/discussions(\?|$)"
WRITES = {
    "create the repository": ("POST", r"/repos/create"),
    "open the pull request": ("POST", DISCUSSIONS),
    "commit": ("POST", r"/commit/"),
    "describe": ("POST", r"/comment/\w+/edit"),
    "make ready": ("POST", r"/status"),
}
READS = {
    "who": ("GET", r"/whoami"),
    "open": ("GET", r"/revision/"),
    "list files": ("GET", r"/tree/"),
    "list pull requests": ("GET", DISCUSSIONS),
    "read a pull request": ("GET", r"/discussions/1"),
    "read a file": ("GET", r"/resolve/"),
}


@pytest.fixture
def proxy(world) -> Iterator[FaultProxy]:
    with FaultProxy(world.url) as running:
        yield running


@pytest.fixture
def job(world, proxy: FaultProxy, shared_base: str):
    """A merge, and how to publish it through the proxy."""
    merged = world.merged(world.adapter(), shared_base)

    def run(settings: PublishSettings = PublishSettings(), *, url: str | None = None) -> Publication:  # noqa: B008
        done = publish(
            merged.folder,
            merged.report,
            merged.verification,
            hub=world.hub("ann", url=url or proxy.url),
            settings=settings,
            progress=Silent(),
        )
        assert done is not None
        return done

    return run


def assert_one_ready(world, done: Publication) -> None:
    assert world.pulls(done.repo) == [(1, "open", "ann")]
    assert done.number == 1
    assert not done.draft
    assert world.hub().open(done.repo, revision="refs/pr/1").revision == done.commit


@pytest.mark.parametrize(
    ("call", "fault"),
    [
        *((call, fault) for call in WRITES for fault in (Answer(503), LoseAnswer())),
        *((call, fault) for call in READS for fault in (Answer(429, retry_after=0), CutRequest())),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_one_fault_does_not_stop_a_publication(world, proxy: FaultProxy, job, call: str, fault) -> None:
    """Nothing is done twice, though the client never learns whether the Hub acted."""
    method, path = (WRITES | READS)[call]
    rule = proxy.add(Rule(fault, method=method, path=path, times=1))
    done = job()
    assert rule.struck == 1
    assert_one_ready(world, done)
    commits = [seen for seen in proxy.seen if seen.method == "POST" and "/commit/" in seen.target]
    expected = 2 if call == "commit" and not isinstance(fault, LoseAnswer) else 1
    assert len(commits) == expected


def test_a_read_goes_on_where_a_cut_connection_left_it(world, proxy: FaultProxy) -> None:
    """Only what is missing is asked for again."""
    content = bytes(range(256)) * 2000
    repo_id = world.name("ann")
    world.repository(repo_id, {"model.safetensors": content})
    opened = world.hub(url=proxy.url).open(repo_id)
    proxy.add(Rule(Cut(after=100_000), path=r"/resolve/|/xet|/lfs", method="GET", times=2))
    assert opened.read("model.safetensors", offset=10, length=400_000) == content[10:400_010]


@pytest.mark.parametrize("request_number", [0, 7, 14, 20, 27, 33])
def test_a_token_that_expires_in_the_middle_fails_clean_and_the_next_run_completes(
    world, proxy: FaultProxy, job, request_number: int
) -> None:
    """At whichever request: an error that names the fix, no second pull request, never ready before it is whole."""
    proxy.add(Rule(ExpiredToken(), skip=request_number))
    with pytest.raises(HubError) as caught:
        job()
    assert "does not accept" in caught.value.message
    assert "settings/tokens" in caught.value.hint
    proxy.clear()
    assert_one_ready(world, job())


@pytest.mark.parametrize("settings", [PublishSettings(), PublishSettings(publish_to=PublishTo.NEW_REPO)])
def test_a_lost_answer_to_the_commit_is_resolved_by_looking(
    world, proxy: FaultProxy, job, settings: PublishSettings
) -> None:
    """One commit is posted, and it is the one that is reported."""
    proxy.add(Rule(LoseAnswer(), method="POST", path=r"/commit/", times=1))
    done = job(settings)
    assert len([seen for seen in proxy.seen if "/commit/" in seen.target and seen.method == "POST"]) == 1
    ref = f"refs/pr/{done.number}" if done.number else "main"
    assert world.hub().open(done.repo, revision=ref).revision == done.commit
    assert job(settings).operation is Operation.UNCHANGED


def test_a_hub_that_stays_down_is_an_error_that_says_to_run_again(world, proxy: FaultProxy, job) -> None:
    """After some patience, exit 5; the next run completes what was begun."""
    proxy.add(Rule(Answer(503), method="POST", path=r"/commit/"))
    with pytest.raises(HubError, match="HTTP 503") as caught:
        job()
    assert "again" in caught.value.hint
    proxy.clear()
    assert_one_ready(world, job())


def test_a_long_retry_after_is_told_instead_of_waited_for(proxy: FaultProxy, job) -> None:
    """Nobody sits an hour in front of a CI job."""
    proxy.add(Rule(Answer(429, retry_after=3600), method="POST", path=DISCUSSIONS))
    with pytest.raises(HubError, match="HTTP 429") as caught:
        job()
    assert "after 3600 seconds" in caught.value.hint


def test_a_server_that_refuses_copies_gets_the_files(world, proxy: FaultProxy, job) -> None:
    """As another storage region does: the shard is uploaded instead."""
    rule = proxy.add(Rule(Answer(400, message="Different storage regions"), path=r"/lfs-files/duplicate"))
    done = job()
    assert rule.struck == 1
    assert_one_ready(world, done)
    files = world.hub().open(done.repo, revision="refs/pr/1").files
    assert "model-00002-of-00002.safetensors" in files


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub's own LFS upload
def test_a_server_without_xet_is_told_how_to_be_used(proxy: FaultProxy, job, monkeypatch) -> None:
    """The client has no way back to LFS by itself; with the variable that the hint names, it works."""
    rule = proxy.add(Rule(Answer(404, message="Not found"), path=r"/xet-write-token/"))
    with pytest.raises(HubError, match="does not offer xet") as caught:
        job()
    assert "HF_HUB_DISABLE_XET=1" in caught.value.hint
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    assert job().operation is Operation.CREATED
    assert rule.struck == 1


def test_a_refused_permission_is_named(world, proxy: FaultProxy, job) -> None:
    """Which right the token lacks, and where to give it."""
    proxy.add(Rule(Answer(403, message="Forbidden: no write access"), method="POST", path=r"/repos/create"))
    with pytest.raises(HubError, match="no write access") as caught:
        job()
    assert "Write access to contents/settings" in caught.value.hint
    assert "settings/tokens" in caught.value.hint


def test_a_namespace_that_is_not_ones_own_is_refused_by_the_hub(world, job) -> None:
    """The real refusal, not an injected one."""
    with pytest.raises(HubError) as caught:
        job(PublishSettings(target_repo=world.name("corp")), url=world.url)
    assert "corp" in caught.value.message + caught.value.hint
