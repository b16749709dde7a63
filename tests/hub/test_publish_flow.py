"""Publishing to a real Hub: where, in which state, once, whole."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import constants, get_session, snapshot_download

from merge_adapter.errors import HubError, InputError, PolicyError
from merge_adapter.hub import Hub, PullRequests
from merge_adapter.publish import (
    Published,
    PublishSettings,
    find_published,
    prepare,
    prepare_folder,
    publish,
    repinned,
)
from merge_adapter.publish.identity import find_marker
from merge_adapter.types import (
    Adapter,
    BaseModel,
    MergeSettings,
    OnFail,
    Operation,
    Publication,
    PublishTo,
    Resolved,
    Silent,
    Verdict,
)

PULL_REQUEST = PublishSettings()
NEW_REPO = PublishSettings(publish_to=PublishTo.NEW_REPO)


class Notes(Silent):
    """Keeps what would be shown."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def put(world, merged, settings: PublishSettings = PULL_REQUEST, *, hub: Hub | None = None) -> Publication:
    """Publish as `bot`, who has no rights beyond those of any user."""
    published = publish(
        merged.folder,
        merged.report,
        merged.verification,
        hub=hub or world.hub("ann"),
        settings=settings,
        progress=Silent(),
    )
    assert published is not None
    return published


@pytest.fixture
def sources(world, shared_base: str) -> tuple[str, str]:
    return world.adapter(), shared_base


def test_a_passed_merge_becomes_a_ready_pull_request(world, sources, tmp_path: Path) -> None:
    """In `<adapter>-merged`, which is made; the files at its ref are those of the folder, byte for byte."""
    adapter, base = sources
    merged = world.merged(adapter, base)
    done = put(world, merged)
    assert (done.repo, done.number, done.operation, done.draft) == (
        f"{adapter}-merged",
        1,
        Operation.CREATED,
        False,
    )
    assert world.pulls(done.repo) == [(1, "open", "ann")]
    assert world.api().model_info(done.repo).private is False
    fresh = snapshot_download(
        done.repo, revision="refs/pr/1", endpoint=world.url, token=False, local_dir=tmp_path / "fresh"
    )
    for path in merged.folder.iterdir():
        assert Path(fresh, path.name).read_bytes() == path.read_bytes()
    assert done.url == f"{world.url}/{done.repo}/discussions/1"
    text = PullRequests(world.hub("ann"), done.repo).get(1).description
    assert find_marker(text).verdict is Verdict.PASS
    assert adapter in text
    assert "refs/pr/1" in text


def test_main_is_untouched_by_a_pull_request(world, sources) -> None:
    """Only a person merges."""
    done = put(world, world.merged(*sources))
    assert "config.json" not in world.hub("ann").open(done.repo).files


def test_the_same_sources_and_settings_publish_nothing_new(world, sources) -> None:
    """Timings in the report differ from run to run; that is no change."""
    first = put(world, world.merged(*sources))
    again = world.merged(*sources)
    again.report["merge"]["seconds"] = 99.0
    second = put(world, again.judged(Verdict.PASS, "All tensors agree."))
    assert second.operation is Operation.UNCHANGED
    assert (second.commit, second.number) == (first.commit, first.number)
    assert len(world.pulls(first.repo)) == 1


def test_what_is_published_is_found_before_merging(world, sources) -> None:
    """A second run need not merge at all; the report of the first one is at hand."""
    adapter, base = sources
    hub = world.hub("ann")
    resolved = resolved_sources(hub, adapter, base)
    merged = world.merged(adapter, base)
    settings = prepare_folder(merged.report, PublishSettings(), hub=hub)
    assert find_published(resolved, MergeSettings(), settings, hub=hub) is None
    done = put(world, merged)
    found = find_published(resolved, MergeSettings(), settings, hub=hub)
    assert found.publication.operation is Operation.UNCHANGED
    assert found.publication.commit == done.commit
    assert found.report == json.loads((merged.folder / "merge_report.json").read_text())
    world.merge_pull(done.repo, 1)
    on_main = find_published(resolved, MergeSettings(), settings, hub=hub)
    assert on_main.publication.number is None


def test_an_adapter_that_did_not_change_is_published_once(world, sources) -> None:
    """A publication into its own repository moves that one's head; so do other adapters and merges beside it."""
    adapter, base = sources
    hub = world.hub("ann")
    own = PublishSettings(target_repo=adapter)

    def found() -> Published | None:
        resolved = resolved_sources(hub, adapter, base)
        settings = prepare(resolved, MergeSettings(), own, hub=hub)
        return find_published(repinned(resolved, settings, hub=hub), MergeSettings(), settings, hub=hub)

    first = put(world, world.merged(adapter, base), own)
    world.merge_pull(adapter, 1)
    assert found().publication.operation is Operation.UNCHANGED
    world.repository(adapter, {"other/merge_report.json": b"{}", "other/model.safetensors": b"another merge"})
    assert found().report["adapter"]["revision"] != world.api("ann").model_info(adapter).sha
    world.repository(adapter, {"adapter_config.json": b'{"peft_type": "LORA", "r": 8}'})
    assert found() is None
    second = put(world, world.merged(adapter, base, seed=1), own)
    assert (first.number, second.number, second.operation) == (1, 2, Operation.CREATED)
    assert found().publication.number == 2  # there is one on main, too, of the adapter as it was


@pytest.mark.parametrize("where", ["refs/pr/1", "main"])
def test_a_card_that_people_edited_stays_as_they_left_it(world, sources, where: str) -> None:
    """What was published is still there, and a next run does not take their words away."""
    merged = world.merged(*sources)
    first = put(world, merged)
    if where == "main":
        world.merge_pull(first.repo, 1)
    api = world.api("ann")
    words = b"---\nlicense: mit\n---\nMy own words."
    api.upload_file(path_or_fileobj=words, path_in_repo="README.md", repo_id=first.repo, revision=where)
    assert put(world, merged).operation is Operation.UNCHANGED
    assert world.hub("ann").open(first.repo, revision=where).read("README.md") == words
    api.upload_file(
        path_or_fileobj=b"{}", path_in_repo="config.json", repo_id=first.repo, revision=where
    )  # the model is another matter
    assert put(world, merged).operation is not Operation.UNCHANGED


def test_another_licence_is_another_publication(world, sources) -> None:
    """Who names one after the fact is not told that nothing changed."""
    hub = world.hub("ann")
    resolved = resolved_sources(hub, *sources)
    put(world, world.merged(*sources))
    for license, known in ((None, True), ("mit", False), ("MIT", False)):
        settings = prepare(resolved, MergeSettings(), PublishSettings(license=license), hub=hub)
        assert (find_published(resolved, MergeSettings(), settings, hub=hub) is not None) is known
    merged = world.merged(*sources)
    merged.rewrite("README.md", b"---\nlicense: mit\n---\n")
    merged.report["settings"]["license"] = "mit"
    assert (
        put(world, merged.judged(Verdict.PASS), PublishSettings(license="MIT")).operation is Operation.UPDATED
    )
    assert find_published(resolved, MergeSettings(), settings, hub=hub) is not None


@pytest.mark.parametrize("license", ["no such licence", "apache 2"])
def test_a_licence_that_the_hub_does_not_know_is_refused_before_the_work(
    world, sources, license: str
) -> None:
    adapter, base = sources
    hub = world.hub("ann")
    resolved = resolved_sources(hub, adapter, base)
    with pytest.raises(InputError, match='"license" must be one of') as caught:
        prepare(resolved, MergeSettings(), PublishSettings(license=license), hub=hub)
    assert "--license" in caught.value.hint
    assert not hub.exists(f"{adapter}-merged")


def test_drafts_are_not_found_as_published(world, sources) -> None:
    """A run after a verdict that was not pass merges and judges again."""
    adapter, base = sources
    hub = world.hub("ann")
    merged = world.merged(adapter, base).judged(Verdict.INCONCLUSIVE)
    put(world, merged)
    settings = prepare_folder(merged.report, PublishSettings(), hub=hub)
    assert find_published(resolved_sources(hub, adapter, base), MergeSettings(), settings, hub=hub) is None


def resolved_sources(hub: Hub, adapter: str, base: str) -> Resolved:
    return Resolved(
        adapters=(Adapter(hub.open(adapter), {}, "LORA"),),
        base=BaseModel(hub.open(base), {}),
        tokenizer=None,
    )


def test_a_new_adapter_commit_updates_the_open_pull_request(world, sources) -> None:
    """Same number, new files; what the new merge no longer has goes away."""
    adapter, base = sources
    merged = world.merged(adapter, base)
    merged.rewrite("NOTICE", b"from the first merge")
    first = put(world, merged)
    world.repository(adapter, {"new": b"commit"})
    second = put(world, world.merged(adapter, base, seed=1))
    assert (second.number, second.operation) == (first.number, Operation.UPDATED)
    assert second.commit != first.commit
    files = world.hub("ann").open(second.repo, revision="refs/pr/1").files
    assert "NOTICE" not in files
    sha = world.api("ann").model_info(adapter).sha
    assert sha in PullRequests(world.hub("ann"), second.repo).get(1).description


@pytest.mark.parametrize("end", ["merge", "close"])
def test_after_a_merge_or_close_a_new_pull_request_is_made(world, sources, end: str) -> None:
    """An ended pull request is history."""
    adapter, base = sources
    first = put(world, world.merged(adapter, base))
    if end == "merge":
        world.merge_pull(first.repo, 1)
    else:
        world.api("ann").change_discussion_status(first.repo, 1, "closed")
    world.repository(adapter, {"new": b"commit"})
    second = put(world, world.merged(adapter, base, seed=1))
    assert (second.number, second.operation) == (2, Operation.CREATED)


def test_what_was_merged_into_main_is_not_offered_again(world, sources) -> None:
    """The files on main, whole and of the same identity, are the publication."""
    merged = world.merged(*sources)
    first = put(world, merged)
    world.merge_pull(first.repo, 1)
    again = put(world, merged)
    assert (again.operation, again.number) == (Operation.UNCHANGED, None)
    assert world.pulls(first.repo) == [(1, "merged", "ann")]


@pytest.mark.parametrize("verdict", [Verdict.FAIL, Verdict.INCONCLUSIVE])
def test_what_did_not_pass_stays_a_draft_with_its_evidence(world, sources, verdict: Verdict) -> None:
    """Once: a second run adds no second comment."""
    merged = world.merged(*sources).judged(verdict, "layer 3 differs by 0.5; more probes would decide it")
    done = put(world, merged)
    assert done.draft
    assert put(world, merged).operation is Operation.UNCHANGED
    pull = PullRequests(world.hub("ann"), done.repo).get(1)
    assert pull.draft
    assert len(pull.comments) == 1
    assert "more probes would decide it" in pull.comments[0]


def test_a_draft_becomes_ready_when_it_passes_later(world, sources) -> None:
    """The same merge, judged again with more evidence."""
    merged = world.merged(*sources)
    put(world, merged.judged(Verdict.INCONCLUSIVE))
    done = put(world, merged.judged(Verdict.PASS))
    assert (done.number, done.draft, done.operation) == (1, False, Operation.UPDATED)
    assert world.pulls(done.repo) == [(1, "open", "ann")]


def test_a_failed_update_does_not_touch_a_ready_pull_request(world, sources) -> None:
    """It gets a draft of its own, which closes when the lane passes again."""
    adapter, base = sources
    ready = put(world, world.merged(adapter, base))
    world.repository(adapter, {"new": b"commit"})
    failed = put(world, world.merged(adapter, base, seed=1).judged(Verdict.FAIL))
    assert (failed.number, failed.draft, failed.operation) == (2, True, Operation.CREATED)
    assert world.hub().open(ready.repo, revision="refs/pr/1").revision == ready.commit
    world.repository(adapter, {"new": b"better"})
    assert put(world, world.merged(adapter, base, seed=2)).number == 1
    assert [(number, status) for number, status, _ in world.pulls(ready.repo)] == [(1, "open"), (2, "closed")]


def test_discard_publishes_nothing(world, sources) -> None:
    """Not even a repository."""
    merged = world.merged(*sources).judged(Verdict.FAIL)
    progress = Notes()
    done = publish(
        merged.folder,
        merged.report,
        merged.verification,
        hub=world.hub("ann"),
        settings=PublishSettings(on_fail=OnFail.DISCARD),
        progress=progress,
    )
    assert done is None
    assert not world.hub("ann").exists(f"{sources[0]}-merged")
    assert "fail" in progress.notes[-1]


def test_a_new_repository_gets_the_files_on_main(world, sources) -> None:
    """Created, unchanged, updated."""
    adapter, base = sources
    merged = world.merged(adapter, base)
    first = put(world, merged, NEW_REPO)
    assert (first.operation, first.number) == (Operation.CREATED, None)
    assert world.hub().open(first.repo).revision == first.commit
    assert put(world, merged, NEW_REPO).operation is Operation.UNCHANGED
    world.repository(adapter, {"new": b"commit"})
    second = put(world, world.merged(adapter, base, seed=1), NEW_REPO)
    assert second.operation is Operation.UPDATED
    assert world.pulls(first.repo) == []


def test_a_new_repository_never_gets_on_main_what_did_not_pass(world, sources) -> None:
    """It becomes a draft there."""
    done = put(world, world.merged(*sources).judged(Verdict.FAIL), NEW_REPO)
    assert done.draft
    assert "config.json" not in world.hub().open(done.repo).files


def test_a_repository_with_other_content_is_not_overwritten(world, sources) -> None:
    """Somebody's model, or the merge of another adapter."""
    theirs = world.name("ann")
    world.repository(theirs, {"model.safetensors": b"x"})
    with pytest.raises(InputError, match="not published from this adapter") as caught:
        put(world, world.merged(*sources), PublishSettings(PublishTo.NEW_REPO, target_repo=theirs))
    assert "pull-request" in caught.value.hint
    ours = world.name("ann")
    put(world, world.merged(*sources), PublishSettings(PublishTo.NEW_REPO, target_repo=ours))
    with pytest.raises(InputError, match="not published from this adapter"):
        put(
            world,
            world.merged(world.adapter(), sources[1]),
            PublishSettings(PublishTo.NEW_REPO, target_repo=ours),
        )


def test_the_adapters_own_repository_takes_the_model_in_a_folder(world, sources) -> None:
    """By a user without rights in it, as a pull request under `merged/`; the adapter stays as it is."""
    adapter, base = sources
    merged = world.merged(adapter, base)
    done = put(world, merged, PublishSettings(target_repo=adapter), hub=world.hub("bot"))
    files = world.hub().open(adapter, revision=f"refs/pr/{done.number}").files
    assert "merged/config.json" in files
    assert "adapter_config.json" in files
    assert world.pulls(adapter) == [(1, "open", "bot")]
    assert put(world, merged, PublishSettings(target_repo=adapter), hub=world.hub("bot")).operation is (
        Operation.UNCHANGED
    )


def test_the_root_beside_an_adapter_is_refused(world, sources) -> None:
    """transformers would apply the adapter a second time; so in any repository that holds one there."""
    adapter, base = sources
    merged = world.merged(adapter, base)
    for target in (adapter, world.adapter()):
        with pytest.raises(InputError, match="a second time") as caught:
            put(world, merged, PublishSettings(target_repo=target, path_in_repo=""))
        assert "--path-in-repo merged" in caught.value.hint


def test_private_sources_give_a_private_repository(world) -> None:
    """And a public one that exists already is refused."""
    adapter = world.adapter(private=True)
    base = world.base()
    merged = world.merged(adapter, base)
    done = put(world, merged)
    assert world.api("ann").model_info(done.repo).private is True
    public = world.name("ann")
    world.repository(public, {})
    with pytest.raises(PolicyError, match="in the open"):
        put(world, merged, PublishSettings(target_repo=public))


def test_a_gated_base_is_not_published_in_the_open(world) -> None:
    """The adapter's owner has no access, the bot has: the default target is refused, and nothing is created."""
    adapter, base = world.adapter(), world.base()
    world.api("corp").update_repo_settings(base, gated="manual")
    merged = world.merged(adapter, base)
    with pytest.raises(PolicyError, match="may not have access"):
        put(world, merged, hub=world.hub("corp"))
    assert not world.hub("ann").exists(f"{adapter}-merged")
    done = put(world, merged, PublishSettings(target_repo=world.name("corp")), hub=world.hub("corp"))
    assert world.api("corp").model_info(done.repo).private is True


def test_licences_of_the_sources_are_compared(world) -> None:
    """From their cards on the Hub, before anything is written there."""
    adapter, base = world.adapter(card="license: gpl-3.0"), world.base(card="license: gemma")
    merged = world.merged(adapter, base)
    with pytest.raises(PolicyError, match="conflict"):
        put(world, merged)
    assert not world.hub("ann").exists(f"{adapter}-merged")
    with pytest.raises(InputError, match="states the licence") as caught:
        put(world, merged, PublishSettings(license="other"))
    assert "merge-adapter run ADAPTER --license other" in caught.value.hint  # `merge` has no such option
    done = put(world, merged, PublishSettings(license="apache-2.0"))
    assert "gemma" in PullRequests(world.hub("ann"), done.repo).get(1).description


def test_metadata_that_the_hub_refuses_is_told_in_its_words(world, sources) -> None:
    """A card with a broken licence field, for example. Nothing is made on the Hub for it."""
    merged = world.merged(*sources)
    merged.rewrite("README.md", b"---\nlicense: [1, {}]\nbase_model: 3\n---\n")
    with pytest.raises(InputError, match="metadata"):
        put(world, merged)
    assert not world.hub("ann").exists(f"{sources[0]}-merged")


def test_a_foreign_pull_request_with_our_marker_is_not_continued(world, sources) -> None:
    """Anybody can copy a marker; only the account's own pull requests are believed."""
    adapter, base = sources
    merged = world.merged(adapter, base)
    first = put(world, merged)
    text = PullRequests(world.hub("ann"), first.repo).get(1).description
    world.api("ann").change_discussion_status(first.repo, 1, "closed")
    world.api("eve").create_pull_request(first.repo, "A copy", description=text)
    done = put(world, merged)
    assert (done.number, done.operation) == (3, Operation.CREATED)
    assert world.pulls(first.repo)[1] == (2, "draft", "eve")


def test_two_runs_at_once_leave_one_pull_request(world, sources) -> None:
    """Both report it, one of them as theirs; a duplicate that was opened meanwhile closes itself."""
    adapter, base = sources
    merged = world.merged(adapter, base)
    world.repository(f"{adapter}-merged", {})
    done: list[Publication] = []
    failures: list[Exception] = []
    together = threading.Barrier(3)

    def one() -> None:
        together.wait()
        try:
            done.append(put(world, merged))
        except Exception as error:  # noqa: BLE001 -- shown by the assertion below
            failures.append(error)

    threads = [threading.Thread(target=one) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    open_ones = [number for number, status, _ in world.pulls(f"{adapter}-merged") if status == "open"]
    assert len(open_ones) == 1
    assert {one.number for one in done} == set(open_ones)
    assert len({one.commit for one in done}) == 1


class Meanwhile(Silent):
    """Does something once, when the upload begins."""

    def __init__(self, action: Callable[[], object]) -> None:
        self.action: Callable[[], object] | None = action

    def task(self, label: str, total: int | None, *, unit: str = "bytes"):
        if label.startswith("Uploading") and self.action is not None:
            action, self.action = self.action, None
            action()
        return super().task(label, total, unit=unit)


@pytest.mark.parametrize("end", ["merge", "close", "commit"])
def test_a_pull_request_that_changes_during_the_upload_is_looked_at_again(world, sources, end: str) -> None:
    """Merged or closed: a new one is opened. A commit of somebody else: ours comes on top of it."""
    adapter, base = sources
    first = put(world, world.merged(adapter, base))
    world.repository(adapter, {"new": b"commit"})
    merged = world.merged(adapter, base, seed=1)

    def act() -> None:
        if end == "merge":
            world.merge_pull(first.repo, 1)
        elif end == "close":
            world.api("ann").change_discussion_status(first.repo, 1, "closed")
        else:
            world.api("ann").upload_file(
                path_or_fileobj=b"x", path_in_repo="theirs", repo_id=first.repo, revision="refs/pr/1"
            )

    done = publish(
        merged.folder,
        merged.report,
        merged.verification,
        hub=world.hub("ann"),
        settings=PULL_REQUEST,
        progress=Meanwhile(act),
    )
    assert done.number == (1 if end == "commit" else 2)
    assert not done.draft
    files = world.hub().open(done.repo, revision=f"refs/pr/{done.number}").files
    assert ("theirs" in files) is (end == "commit")


def test_a_closed_community_tab_is_named(world, sources, tokens) -> None:
    """No pull request can be opened there; the other way is told."""
    repo_id = world.name("ann")
    world.repository(repo_id, {})
    get_session().put(
        f"{world.url}/api/models/{repo_id}/settings",
        json={"discussionsDisabled": True},
        headers={"Authorization": f"Bearer {tokens['ann']}"},
    ).raise_for_status()
    with pytest.raises(HubError) as caught:
        put(world, world.merged(*sources), PublishSettings(target_repo=repo_id))
    assert "new-repo" in caught.value.hint


def test_unchanged_shards_are_copied_on_the_server(world, sources) -> None:
    """The second shard is the base's own: it is not sent, and the note says what was saved."""
    merged = world.merged(*sources)
    progress = Notes()
    publish(
        merged.folder,
        merged.report,
        merged.verification,
        hub=world.hub("ann"),
        settings=PublishSettings(),
        progress=progress,
    )
    shard = (merged.folder / "model-00002-of-00002.safetensors").stat().st_size
    total = sum(path.stat().st_size for path in merged.folder.iterdir())
    said = next(note for note in progress.notes if note.startswith("Uploaded"))
    assert f"Uploaded files of {total - shard:,} bytes; {shard:,} the Hub had" in said


def test_a_merge_of_local_folders_is_published_in_the_users_own_name(world) -> None:
    """There is no adapter repository to name it after."""
    done = put(world, world.merged(None, None))
    assert done.repo == "ann/a-folder-merged"
    assert put(world, world.merged(None, None)).operation is Operation.UNCHANGED


def test_a_folder_that_changed_is_not_published(world, sources) -> None:
    """And the Hub is untouched."""
    merged = world.merged(*sources)
    (merged.folder / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"config\.json"):
        put(world, merged)
    assert not world.hub("ann").exists(f"{sources[0]}-merged")


def test_a_verdict_that_is_not_the_reports_is_refused(world, sources) -> None:
    """Whoever calls: what failed is not published as passed."""
    merged = world.merged(*sources)
    failed = merged.judged(Verdict.FAIL)
    with pytest.raises(InputError, match="the report says fail"):
        put(world, replace(failed, verification=merged.verification))


def test_nothing_to_publish_is_asked_for(world, sources) -> None:
    """--publish none."""
    merged = world.merged(*sources)
    settings = PublishSettings(publish_to=PublishTo.NONE)
    assert (
        publish(
            merged.folder,
            merged.report,
            merged.verification,
            hub=world.hub("ann"),
            settings=settings,
            progress=Silent(),
        )
        is None
    )


def test_nothing_published_holds_a_token(world, sources, tokens) -> None:
    """Files, title, description and commits."""
    done = put(world, world.merged(*sources))
    api = world.api("ann")
    details = api.get_discussion_details(done.repo, 1)
    texts = [json.dumps([event._event for event in details.events], default=str)]
    texts += [
        commit.title + commit.message for commit in api.list_repo_commits(done.repo, revision="refs/pr/1")
    ]
    opened = world.hub("ann").open(done.repo, revision="refs/pr/1")
    texts += [opened.read(path).decode("latin-1") for path in opened.files]
    assert all(tokens["ann"] not in text for text in texts)


def test_a_stored_login_is_used(world, sources, tokens, tmp_path: Path, monkeypatch) -> None:
    """What `hf auth login` leaves."""
    (tmp_path / "token").write_text(tokens["ann"])
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    hub = Hub(world.url)
    assert hub.user == "ann"
    assert put(world, world.merged(*sources), hub=hub).operation is Operation.CREATED
