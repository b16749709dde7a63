"""From an event to a job: what the webhook said is looked up on the Hub, and only that counts."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from http import HTTPStatus
from typing import TYPE_CHECKING

from merge_adapter.bot.answers import accepted_text, marker_of, refused_text
from merge_adapter.bot.commands import Command, find_command
from merge_adapter.bot.events import CommentEvent, PushEvent
from merge_adapter.bot.inbox import Inbox, Pending
from merge_adapter.bot.jobs import JobKind, JobOptions, JobRequest, Reply, Source
from merge_adapter.bot.logs import log
from merge_adapter.bot.settings import BotSettings
from merge_adapter.bot.sources import private_sources, sources_of
from merge_adapter.bot.submission import Duplicate, OverLimit, Submission, Submitted
from merge_adapter.errors import (
    InputError,
    MergeAdapterError,
    NotFoundError,
    PolicyError,
    RemoteError,
    StorageError,
    UnmergeableError,
)
from merge_adapter.hub.catalogue import adapter_folders
from merge_adapter.hub.conversations import Comment, members, read_comments, say_once
from merge_adapter.hub.errors import RefusedError, status_of
from merge_adapter.hub.repository import HubRepository

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoFile

    from merge_adapter.hub import Hub

_ADAPTER_FILES = ("adapter_config.json", "adapter_model.")
"""How the names begin of the files that make an adapter: a push that changes none of them is not one."""
_MOST_ADAPTERS = 50
"""Adapters of one push that are merged; more are somebody's archive, and a case for `backfill`."""


class Intake:
    """Looks events up, one after the other, until `stop`."""

    def __init__(self, inbox: Inbox, hub: Hub, settings: BotSettings) -> None:
        self.inbox = inbox
        self.hub = hub
        self.settings = settings
        self.wake = threading.Event()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="intake", daemon=True)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End after the event that is being looked up; the others wait in the store."""
        self._stopped.set()
        self.wake.set()
        if self._thread.is_alive():
            self._thread.join()

    def _loop(self) -> None:
        while not self._stopped.is_set():
            self.wake.clear()
            worked = 0
            try:
                worked = self.work_off()
            except MergeAdapterError as error:  # the store failed; what waits in it is tried again
                log("intake-failed", error=error.message)
            if not worked:
                self.wake.wait(1.0)

    def work_off(self) -> int:
        """Look up what is due now; how many events that were."""
        due = self.inbox.due()
        for pending in due:
            if self._stopped.is_set():
                break
            self.handle(pending)
        return len(due)

    def handle(self, pending: Pending) -> None:
        """Look one event up, and store what follows from it."""
        event = pending.event
        facts = {"key": event.key, "repo": event.repo_id}
        try:
            if isinstance(event, PushEvent):
                note, requests = self._push(event)
                submissions = self.inbox.settle(pending, note, requests)
                log("event", **facts, note="; ".join(_told(note, one) for one in submissions or (None,)))
            else:
                self._comment(pending, event)
        except StorageError as error:  # this machine's disk, which says nothing of the event
            self.inbox.postpone(pending, error.message)
            log("event-postponed", **facts, error=error.message)
        except RemoteError as error:
            if is_final(error):
                self.inbox.settle(pending, error.message)
            else:
                self.inbox.postpone(pending, error.message)
            log("event-refused" if is_final(error) else "event-postponed", **facts, error=error.message)
        except (
            InputError,
            PolicyError,
        ) as error:  # gone, gated, or not readable: asking again changes nothing
            self.inbox.settle(pending, error.message)
            log("event", **facts, note=error.message)
        except MergeAdapterError as error:
            self.inbox.settle(pending, error.message)
            log("event-failed", **facts, error=error.message)
        except Exception as error:  # noqa: BLE001  # one event's bug must not stop all others; it is not lost either
            self.inbox.postpone(pending, f"a bug in merge-adapter: {error!r}"[:500])
            log("event-bug", **facts, error=repr(error))

    # ------------------------------------------------------------------------------------------ pushes

    def _push(self, event: PushEvent) -> tuple[str, tuple[JobRequest, ...]]:
        """What is to be said of a push, and a job for each adapter that it changed."""
        observed = self.inbox.store.clock()
        head = self.hub.open(event.repo_id)
        folders = adapter_folders(head.files)
        if not folders:
            return "no adapter in the repository", ()
        if event.old_sha is not None:
            folders = self._changed(head, folders, event.old_sha)
            if not folders:
                return "the adapter itself did not change", ()
        if len(folders) > _MOST_ADAPTERS:
            return f"{len(folders)} adapters in one push, more than {_MOST_ADAPTERS}", ()
        note = "an adapter was pushed" if len(folders) == 1 else f"{len(folders)} adapters were pushed"
        requests = (
            JobRequest(
                adapter=head.repo_id,
                revision=head.revision,
                source=Source.WEBHOOK,
                ref=event.ref,
                subfolder=folder,
                private=head.private,
                observed=observed,
            )
            for folder in folders
        )
        return note, tuple(self._as_closed_as_its_sources(one) for one in requests)

    def _as_closed_as_its_sources(self, request: JobRequest) -> JobRequest:
        return replace(request, private=request.private or bool(private_sources(request, self.hub)))

    def _changed(self, head: HubRepository, folders: Sequence[str], old_sha: str) -> tuple[str, ...]:
        """The folders whose adapter's files differ between the old commit and the head."""
        try:
            old = self.hub.tree(head.repo_id, old_sha)
        except NotFoundError:  # rewritten history, or a commit that never was
            return tuple(folders)
        return tuple(one for one in folders if _blobs(old, one) != _blobs(head.entries, one))

    # ---------------------------------------------------------------------------------------- comments

    def _comment(self, pending: Pending, event: CommentEvent) -> None:
        comment = self._read(event)
        name = self.settings.name or self.hub.user
        if comment is None or comment.author.lower() == self.hub.user.lower():
            self.inbox.settle(pending, "the comment is gone or the bot's own")
            return
        try:
            command = find_command(comment.text, name)
            if command is None:
                self.inbox.settle(pending, "no command in the comment")
                return
            request = self._commanded(event, comment, command)
        except StorageError:
            raise
        except (InputError, PolicyError, UnmergeableError) as error:
            self._say(event, refused_text(error, comment.author), f"{event.comment_id}-refused")
            self.inbox.settle(pending, error.message)
            return
        self._accept(pending, event, request)

    def _commanded(self, event: CommentEvent, comment: Comment, command: Command) -> JobRequest:
        """The job that a command asks for. Raises InputError or PolicyError for one that starts nothing."""
        self._check_author(event.repo_id, comment.author)
        observed = self.inbox.store.clock()
        head = self.hub.open(event.repo_id)
        folders = (command.subfolder,) if command.subfolder else adapter_folders(head.files)
        if len(folders) != 1:
            raise InputError(
                f"this repository holds {len(folders) or 'no'} adapter{'s' if folders else ''}",
                hint="Name one: --subfolder PATH",
            )
        target = command.options.target_repo
        if target and target.partition("/")[0].lower() != event.repo_id.partition("/")[0].lower():
            raise PolicyError(
                f"the target {target} belongs to somebody else",
                hint="Name a repository of this adapter's owner.",
            )
        request = JobRequest(
            adapter=head.repo_id,
            revision=head.revision,
            source=Source.COMMENT,
            kind=command.kind,
            subfolder=folders[0],
            options=pinned(command.options, self.hub),
            requested_by=comment.author,
            private=head.private,
            reply=Reply(event.repo_id, event.number),
            observed=observed,
        )
        self._check_audience(request)
        return self._as_closed_as_its_sources(request)

    def _read(self, event: CommentEvent) -> Comment | None:
        comments = read_comments(self.hub, event.repo_id, event.number)
        return next((one for one in comments if one.id == event.comment_id), None)

    def _check_author(self, repo_id: str, author: str) -> None:
        """Raises PolicyError for one who may not write to the repository."""
        owner, name = repo_id.partition("/")[0].lower(), author.lower()
        if name == owner or name in {one.lower() for one in self.settings.maintainers}:
            return
        found = members(self.hub, owner)
        if name in (found.all if self.settings.members_may_command else found.writers):
            return
        unsure = name in found.all and not found.writers
        why = "; the Hub does not tell this bot who of its members may" if unsure else ""
        raise PolicyError(
            f"only those who may write to {repo_id} can give commands here{why}",
            hint="The bot's owner can add you to its maintainers"
            + (", or set members_may_command." if unsure else "."),
        )

    def _check_audience(self, request: JobRequest) -> None:
        """Raises PolicyError when a closed source would reach the readers of a target that the asker names.

        Naming a target vouches for its readers where the namer's own token reads the sources. Here it is the bot's,
        which may read what the asker may not. The same holds for a verification, which tells what they answer.
        """
        target = request.options.target_repo
        if request.kind is JobKind.VERIFY:
            owner = request.adapter.partition("/")[0].lower()
            for one in private_sources(request, self.hub):
                if one.owner.lower() != owner:
                    raise PolicyError(
                        f"{one} is private and belongs to somebody else: its answers would be told here",
                        hint="Run merge-adapter verify with a token of your own.",
                    )
        elif target:
            from merge_adapter.publish import policy

            policy.check_audience(
                sources_of(request, self.hub),
                owner=target.partition("/")[0],
                user="",
                named_by_user=False,
                allow_base=self.settings.allow_base,
            )

    def _accept(self, pending: Pending, event: CommentEvent, request: JobRequest) -> None:
        (submission,) = self.inbox.settle(
            pending, f"{request.kind.value} asked for", (request,), limit=self.settings.jobs_per_user
        )
        log("event", key=event.key, repo=event.repo_id, note=_told(request.kind.value, submission))
        if isinstance(submission, OverLimit):
            text = refused_text(too_many(submission), request.requested_by)
        else:
            known = isinstance(submission, Duplicate)
            text = accepted_text(submission.job_id, request, self.settings.public_url, known=known)
        try:
            self._say(event, text, f"{event.comment_id}-accepted")
        except MergeAdapterError as error:  # what was decided is stored; only the acknowledgement is lost
            log("answer-lost", key=event.key, error=error.message)

    def _say(self, event: CommentEvent, text: str, key: str) -> None:
        marker = marker_of(key)
        say_once(self.hub, event.repo_id, event.number, f"{text}\n\n{marker}", marker=marker)


def pinned(options: JobOptions, hub: Hub) -> JobOptions:
    """The options with every further adapter at the commit that its reference names now: a retry merges the same."""
    if options.weights and len(options.weights) != 1 + len(options.adapters):
        raise InputError(
            f"{1 + len(options.adapters)} adapters but {len(options.weights)} weights were given",
            hint="Give one for each, that of this repository's adapter first; or none.",
        )
    found = []
    for reference in options.adapters:
        name, _, revision = reference.partition("@")
        opened = hub.open(name, revision=revision or None)
        found.append(f"{opened.repo_id}@{opened.revision}")
    return replace(options, adapters=tuple(found))


def too_many(found: OverLimit) -> PolicyError:
    """What an asker is told who has as many open jobs as one may have."""
    return PolicyError(
        f"you have {found.limit} open jobs, which is as many as one may have",
        hint="Wait for one to end, or cancel one.",
    )


def is_final(error: RemoteError) -> bool:
    """Whether asking the Hub again would change nothing. A token that it does not know may be replaced."""
    return isinstance(error, RefusedError) and status_of(error) != HTTPStatus.UNAUTHORIZED


def _blobs(entries: Mapping[str, RepoFile], folder: str) -> dict[str, str]:
    """Content ids of the adapter's files in `folder`."""
    prefix = f"{folder}/" if folder else ""
    return {
        path: entry.blob_id
        for path, entry in entries.items()
        if path.startswith(tuple(prefix + name for name in _ADAPTER_FILES))
    }


def _told(note: str, submission: Submission | None) -> str:
    if isinstance(submission, Submitted):
        replaced = f", instead of {', '.join(submission.replaced)}" if submission.replaced else ""
        return f"{note}: job {submission.job_id}{replaced}"
    return f"{note}: known as job {submission.job_id}" if isinstance(submission, Duplicate) else note
