"""Publish: look, write what is missing, check it on the Hub, and only then call it ready.

Every step looks first, so that a run can stop anywhere and the next one carries on: a draft without files gets its
files, a checked commit its description, a passed draft its ready state.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from merge_adapter.errors import HubError, InputError, NotFoundError, PolicyError
from merge_adapter.hub import Commit, ConflictError, PullRequest, PullRequests, Upload
from merge_adapter.hub import commit as commit_to_hub
from merge_adapter.publish import description
from merge_adapter.publish.contents import Gone, LocalFile, addressed, check_card, check_contents
from merge_adapter.publish.identity import Identity, Marker, find_marker, identity_of_report
from merge_adapter.publish.settings import PublishSettings, Target
from merge_adapter.publish.standing import of_lane, on_main, on_pull, published_as
from merge_adapter.publish.target import find_target, prepare_folder
from merge_adapter.publish.whole import (
    check_remote,
    listed_files,
    model_files,
    published_report,
    read_remote_report,
)
from merge_adapter.types import OnFail, Operation, Progress, Publication, PublishTo, Verdict, Verification

if TYPE_CHECKING:
    from merge_adapter.hub import Hub, HubRepository

_ROUNDS = 4
"""How often a publication starts over because somebody else wrote to the same place meanwhile."""
_FRESH = frozenset({".gitattributes", "README.md", "LICENSE"})
"""Files of a repository that somebody just made on the website."""


@dataclass(frozen=True)
class _Job:
    """One publication: what, where, and as whom."""

    report: Mapping[str, Any]
    verdict: Verdict
    files: tuple[LocalFile, ...]
    identity: Identity
    target: Target
    settings: PublishSettings
    hub: Hub
    progress: Progress
    held_at: str | None = None
    """Commit of the target that holds files which are not on this machine."""
    pending: bool = False
    """Whether the gate has more to say: a draft, then, that is not commented on yet."""

    @property
    def passed(self) -> bool:
        return self.verdict is Verdict.PASS

    @property
    def marker(self) -> Marker:
        return Marker(self.identity, self.verdict)

    @property
    def listed(self) -> dict[str, tuple[int, str]]:
        """path -> (bytes, sha256) of every file, the report among them."""
        return {file.path: (file.bytes, file.sha256) for file in self.files}

    @property
    def pulls(self) -> PullRequests:
        return PullRequests(self.hub, self.target.repo_id)

    def open(self, revision: str) -> HubRepository:
        """The target's folder at a revision."""
        return self.hub.open(self.target.repo_id, revision=revision, subfolder=self.target.path_in_repo)


def publish(
    folder: Path,
    report: Mapping[str, Any],
    verification: Verification,
    *,
    hub: Hub,
    settings: PublishSettings,
    progress: Progress,
    gone: Mapping[str, Gone] | None = None,
    held_at: str | None = None,
    pending: bool = False,
) -> Publication | None:
    """Offer a merged folder on the Hub; None when the verdict is not pass and drafts are not wanted.

    `gone` are files of the report that are not in the folder: handed over before, copied on the server, or held by
    the target's commit `held_at`. `pending` says that the verdict is not the last one, so that a draft is wanted.
    Raises InputError when the folder is not what `report` says, PolicyError when it may not be published there,
    HubError when the Hub fails or refuses.
    """
    if settings.publish_to is PublishTo.NONE:
        return None
    files = check_contents(folder, report, progress, gone=gone)
    if settings.target is None:
        settings = prepare_folder(report, settings, hub=hub)
    assert settings.target is not None
    check_card(folder, settings, hub=hub)
    if report["verification"]["verdict"] != verification.verdict.value:
        raise InputError(
            f"the report says {report['verification']['verdict']}, the gate {verification.verdict}"
        )
    if verification.verdict is not Verdict.PASS and settings.on_fail is OnFail.DISCARD and not pending:
        progress.note(f"Nothing is published: the verdict is {verification.verdict.value}.")
        return None
    with TemporaryDirectory(prefix="merge-adapter-card-") as room:
        files, report = addressed(files, report, folder, settings.target, Path(room))
        job = _Job(
            report=report,
            verdict=verification.verdict,
            files=files,
            identity=identity_of_report(report, settings.target.path_in_repo),
            target=settings.target,
            settings=settings,
            hub=hub,
            progress=progress,
            held_at=held_at,
            pending=pending,
        )
        for round_ in range(_ROUNDS):
            try:
                return _publish_once(job)
            except ConflictError:
                if round_ == _ROUNDS - 1:
                    raise
                progress.note(f"{job.target.repo_id} changed meanwhile; looking again.")
    raise AssertionError("at least one round is made")


def open_draft(
    report: Mapping[str, Any], *, hub: Hub, settings: PublishSettings, progress: Progress
) -> PullRequest:
    """The draft that a merge will go to, before there is anything to put into it: one of its lane, or a new one.

    `report` needs sources and settings only. Made so that content can be handed over ahead of the commit.
    """
    assert settings.target is not None
    identity = identity_of_report(report, settings.target.path_in_repo)
    job = _Job(report, Verdict.INCONCLUSIVE, (), identity, settings.target, settings, hub, progress)
    _ensure_target(job)
    return _choose(job) or _create(job)


def _ensure_target(job: _Job) -> None:
    if find_target(job.target, hub=job.hub) is None:
        job.hub.create(job.target.repo_id, private=job.target.private)
        find_target(job.target, hub=job.hub)  # somebody else may have made it, more open


def _publish_once(job: _Job) -> Publication:
    _ensure_target(job)
    main = job.open("main")
    if job.passed and published_as(main, job.identity, job.target) is not None:
        return on_main(main, job.target, Operation.UNCHANGED, job.hub)
    if job.settings.publish_to is PublishTo.NEW_REPO and job.passed:
        return _publish_on_main(job, main)
    return _publish_on_pull(job, main)


def _publish_on_main(job: _Job, main: HubRepository) -> Publication:
    """A passed merge goes straight to main of a repository that is empty or holds an earlier one of its lane."""
    earlier = read_remote_report(main)
    if earlier is None:
        ours = not set(main.files) - _FRESH
    else:
        ours = identity_of_report(earlier, job.target.path_in_repo).lane == job.identity.lane
    if not ours:
        raise InputError(
            f"{main.origin} holds files that were not published from this adapter",
            hint="Offer a pull request instead (--publish pull-request) or name another --target-repo.",
        )
    made = _commit(job, "main", main, earlier)
    _check(job, made.sha, job.listed)
    _close_superseded(job, None)
    operation = Operation.CREATED if earlier is None else Operation.UPDATED
    return _with_bytes(on_main(job.open(made.sha), job.target, operation, job.hub), made)


def _publish_on_pull(job: _Job, main: HubRepository) -> Publication:
    pull = _choose(job) or _create(job)
    head = job.open(pull.ref)
    earlier = read_remote_report(head)
    filled = earlier is not None and earlier != read_remote_report(main)
    same = published_report(head) if filled and _is_of(job, earlier) else None
    settled = same is not None and find_marker(pull.description) == job.marker
    if settled and pull.draft is not job.passed:
        return on_pull(pull, head.revision, job.target, Operation.UNCHANGED)

    made = _commit_to_pull(job, pull, head, earlier) if same is None else None
    commit = head.revision if made is None else made.sha
    _check(job, commit, job.listed if same is None else model_files(same))
    if not settled:
        job.pulls.describe(pull, description.title(job.report), _description(job, pull.number))
    if job.passed:
        job.pulls.make_ready(pull)
        _close_superseded(job, pull)
    elif not job.pending:
        job.pulls.comment(pull, description.evidence_comment(job.report, job.verdict))
    operation = Operation.UPDATED if filled else Operation.CREATED
    published = on_pull(job.pulls.get(pull.number), commit, job.target, operation)
    return published if made is None else _with_bytes(published, made)


def _commit_to_pull(
    job: _Job, pull: PullRequest, head: HubRepository, earlier: Mapping[str, Any] | None
) -> Commit:
    try:
        return _commit(job, pull.ref, head, earlier)
    except HubError as error:
        if not isinstance(error, ConflictError) and job.pulls.get(pull.number).status in ("merged", "closed"):
            raise ConflictError(f"pull request {pull.number} was ended meanwhile") from error
        raise


def _is_of(job: _Job, report: Mapping[str, Any] | None) -> bool:
    """Whether a report on the Hub is of the same sources, settings and verdict as this job.

    And of the same bytes, where they are not here any more: another processor may round another way, and the gate
    judges on the Hub what it saw leave.
    """
    if report is None:
        return False
    listed = listed_files(report)
    return (
        identity_of_report(report, job.target.path_in_repo) == job.identity
        and report["verification"]["verdict"] == job.verdict.value
        and all(listed.get(one.path) == (one.bytes, one.sha256) for one in job.files if one.place is None)
    )


def _choose(job: _Job) -> PullRequest | None:
    """The pull request to continue: the first of its lane. What did not pass never goes into one that is ready."""
    for pull in of_lane(job.pulls, job.identity.lane):
        if job.passed or pull.draft:
            return pull
    return None


def _create(job: _Job) -> PullRequest:
    """Open a draft, unless another run has just done so: of two, the lower number stays and the other closes."""
    again = _choose(job)
    if again is not None:
        return again
    text = description.placeholder(job.report, job.marker)
    created = job.pulls.create(description.title(job.report), text, look=lambda: _choose(job))
    first = _choose(job)
    if first is None or first.number >= created.number:
        return created
    job.pulls.close(created, f"A duplicate of #{first.number}, opened at the same moment.")
    return first


def _close_superseded(job: _Job, kept: PullRequest | None) -> None:
    """Drafts of the same lane are of no use once one passed; `kept` is None when it went to main."""
    for pull in of_lane(job.pulls, job.identity.lane):
        if pull.draft and (kept is None or pull.number != kept.number):
            better = f"#{kept.number}" if kept is not None else "a commit to main"
            job.pulls.close(pull, f"Superseded by {better}, which passed.")


def _commit(job: _Job, ref: str, parent: HubRepository, earlier: Mapping[str, Any] | None) -> Commit:
    """Put the files on `ref`. Files that an earlier publication listed and this one lacks go away."""
    prefix = f"{job.target.path_in_repo}/" if job.target.path_in_repo else ""
    uploads = [_upload(prefix, file) for file in job.files]
    kept = {upload.path_in_repo for upload in uploads}
    stale = (
        [] if earlier is None else [prefix + path for path in listed_files(earlier) if path in parent.files]
    )
    result = commit_to_hub(
        job.hub,
        job.target.repo_id,
        ref,
        uploads,
        parent=job.hub.open(job.target.repo_id, revision=parent.revision),
        delete=[path for path in stale if path not in kept],
        sources=_sources(job),
        message=description.commit_message(job.report),
        body=description.commit_body(job.report),
        progress=job.progress,
    )
    changed = job.report["merge"].get("bytes_changed")
    job.progress.note(
        f"Uploaded files of {result.bytes_sent:,} bytes; {result.bytes_copied:,} the Hub had"
        + (f"; the merge changed {changed:,}." if isinstance(changed, int) else ".")
    )
    return result


def _upload(prefix: str, file: LocalFile) -> Upload:
    gone = file.gone or Gone()
    return Upload(prefix + file.path, file.place, file.bytes, file.sha256, gone.handed, gone.fetch)


def _sources(job: _Job) -> list[HubRepository]:
    """The pinned repositories whose large files may be copied on the server, as far as they can still be seen."""
    found = []
    for entry in (job.report["base"], job.report["adapter"]):
        if entry.get("revision") and entry.get("id"):
            with suppress(NotFoundError, PolicyError):
                found.append(job.hub.open(entry["id"], revision=entry["revision"]))
    if job.held_at is not None:
        found.append(job.hub.open(job.target.repo_id, revision=job.held_at))
    return found


def _check(job: _Job, commit: str, listed: Mapping[str, tuple[int, str]]) -> None:
    with job.progress.task("Checking what the Hub holds", None, unit="files") as task:
        check_remote(job.open(commit), listed, loads=job.passed)  # what a draft lacks is told in its evidence
        task.advance(len(listed))


def _description(job: _Job, number: int) -> str:
    return description.describe(job.report, job.marker, job.target, notes=job.settings.notes, number=number)


def _with_bytes(publication: Publication, made: Commit) -> Publication:
    return replace(publication, bytes_uploaded=made.bytes_sent, bytes_saved=made.bytes_copied)
