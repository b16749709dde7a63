"""Discussions and pull requests."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from localhub.accounts import Identity, TokenRole
from localhub.api import present
from localhub.api.access import Context, Ctx, JsonBody, number, text, truthy
from localhub.community import Discussion, Event, Status
from localhub.errors import BadRequestError, ConflictError, ForbiddenError, NotFoundError
from localhub.git import MAIN
from localhub.repositories import Repository

router = APIRouter()

PAGE = 50
_FILTERS = {
    "all": None,
    "open": (Status.OPEN, Status.DRAFT),
    "closed": (Status.CLOSED, Status.MERGED),
    "draft": (Status.DRAFT,),
    "merged": (Status.MERGED,),
}


def _open_to(ctx: Context, kind: str, owner: str, name: str) -> Repository:
    repository = ctx.readable(kind, owner, name)
    if repository.discussions_disabled:
        raise ForbiddenError("Discussions are disabled for this repository")
    return repository


def _participant(ctx: Context, repository: Repository) -> Identity:
    """Who may write in discussions: every user with a token that writes, and the repository's own token."""
    identity = ctx.login()
    own = ctx.hub.repositories.may_write(repository, identity)
    if identity.role not in (TokenRole.WRITE, TokenRole.OAUTH) and not own:
        raise ForbiddenError("Forbidden: this token cannot take part in discussions")
    return identity


@router.get("/api/{kind:kind}/{owner:seg}/{name:seg}/discussions")
def listing(ctx: Ctx, kind: str, owner: str, name: str, request: Request) -> dict[str, Any]:
    repository = _open_to(ctx, kind, owner, name)
    query = request.query_params
    wanted, status = query.get("type", "all"), query.get("status", "all")
    if wanted not in ("all", "discussion", "pull_request") or status not in _FILTERS:
        raise BadRequestError(f"Unknown type {wanted!r} or status {status!r}")
    found = ctx.hub.community.discussions(
        repository,
        author=query.get("author"),
        pull_requests=None if wanted == "all" else wanted == "pull_request",
        statuses=_FILTERS[status],
    )
    start = PAGE * number(query.get("p", "0"))
    shown = [present.discussion(one, repository, ctx.hub.accounts) for one in found[start : start + PAGE]]
    closed = sum(one.status in (Status.CLOSED, Status.MERGED) for one in found)
    return {"discussions": shown, "count": len(found), "start": start, "numClosedDiscussions": closed}


@router.post("/api/{kind:kind}/{owner:seg}/{name:seg}/discussions")
def create(ctx: Ctx, kind: str, owner: str, name: str, body: JsonBody) -> dict[str, Any]:
    repository = _open_to(ctx, kind, owner, name)
    identity = _participant(ctx, repository)
    pull_request = bool(body.get("pullRequest"))
    with ctx.hub.git.lock(repository), ctx.hub.database.writing():
        repository = ctx.present(repository)
        discussion, comment = ctx.hub.community.open(
            repository,
            title=text(body, "title"),
            author=identity.name,
            description=text(body, "description", ""),
            base=MAIN if pull_request else None,
            # One made by a program waits as a draft until it is said to be ready.
            status=Status.DRAFT if pull_request else Status.OPEN,
        )
        if pull_request:
            git = ctx.git(repository)
            head = git.resolve(MAIN)
            git.set_ref(discussion.ref, head, force=True)
        ctx.hub.webhooks.emit(
            "create", "discussion", ctx.subject(repository, discussion=discussion, comment=comment)
        )
        if pull_request:
            refs = ((discussion.ref, None, head),)
            ctx.hub.webhooks.emit("update", "repo.content", ctx.subject(repository, refs=refs))
    url = f"{ctx.base_url}{repository.web_path}/discussions/{discussion.num}"
    return {"num": discussion.num, "url": url, "pullRequest": pull_request}


@router.get("/api/{kind:kind}/{owner:seg}/{name:seg}/discussions/{num:seg}")
def details(ctx: Ctx, kind: str, owner: str, name: str, num: str, request: Request) -> dict[str, Any]:
    repository = _open_to(ctx, kind, owner, name)
    return present.discussion_details(
        ctx.hub.community.get(repository, number(num)),
        repository,
        ctx.hub.accounts,
        ctx.hub.community,
        ctx.git(repository),
        diff=truthy(request.query_params.get("diff")),
    )


def _joined(
    ctx: Context, kind: str, owner: str, name: str, num: str
) -> tuple[Repository, Discussion, Identity]:
    repository = _open_to(ctx, kind, owner, name)
    identity = _participant(ctx, repository)
    return repository, ctx.hub.community.get(repository, number(num)), identity


def _require_owner(ctx: Context, repository: Repository, author: str, identity: Identity) -> None:
    """Only an author, or one who may write to the repository, goes on."""
    if author.lower() == identity.name.lower():
        return
    if not ctx.hub.repositories.may_write(repository, identity):
        raise ForbiddenError("Forbidden: only the author and the repository's writers may do this")


def _comment(ctx: Context, repository: Repository, discussion: Discussion, author: str, said: str) -> Event:
    # One transaction: comments are told in the order in which they are shown.
    with ctx.hub.database.writing():
        discussion = ctx.hub.community.get(repository, discussion.num)
        event = ctx.hub.community.comment(discussion, author, said)
        subject = ctx.subject(repository, discussion=discussion, comment=event)
        ctx.hub.webhooks.emit("create", "discussion.comment", subject)
    return event


@router.post("/api/{kind:kind}/{owner:seg}/{name:seg}/discussions/{num:seg}/comment")
def comment(ctx: Ctx, kind: str, owner: str, name: str, num: str, body: JsonBody) -> dict[str, Any]:
    repository, discussion, identity = _joined(ctx, kind, owner, name, num)
    event = _comment(ctx, repository, discussion, identity.name, text(body, "comment"))
    return {"newMessage": present.event(event, ctx.hub.accounts)}


@router.post(
    "/api/{kind:kind}/{owner:seg}/{name:seg}/discussions/{num:seg}/comment/{event_id:seg}/{action:seg}"
)
def change_comment(
    ctx: Ctx, kind: str, owner: str, name: str, num: str, event_id: str, action: str, body: JsonBody
) -> dict[str, Any]:
    repository, discussion, identity = _joined(ctx, kind, owner, name, num)
    with ctx.hub.database.writing():
        event = ctx.hub.community.event(discussion, event_id)
        if action == "edit":
            if event.author.lower() != identity.name.lower():
                raise ForbiddenError("Forbidden: only the author may edit a comment")
            event = ctx.hub.community.edit_comment(discussion, event, identity.name, text(body, "content"))
        elif action == "hide":
            _require_owner(ctx, repository, event.author, identity)
            event = ctx.hub.community.hide_comment(discussion, event, identity.name)
        else:
            raise NotFoundError(f"Unknown action {action}")
        subject = ctx.subject(repository, discussion=discussion, comment=event)
        ctx.hub.webhooks.emit("update", "discussion.comment", subject)
    return {"updatedComment": present.event(event, ctx.hub.accounts)}


@router.post("/api/{kind:kind}/{owner:seg}/{name:seg}/discussions/{num:seg}/title")
def title(ctx: Ctx, kind: str, owner: str, name: str, num: str, body: JsonBody) -> dict[str, Any]:
    repository, discussion, identity = _joined(ctx, kind, owner, name, num)
    _require_owner(ctx, repository, discussion.author, identity)
    with ctx.hub.database.writing():
        fresh = ctx.hub.community.get(repository, discussion.num)
        event = ctx.hub.community.rename(fresh, identity.name, text(body, "title"))
        _updated(ctx, repository, discussion)
    return {"newTitle": present.event(event, ctx.hub.accounts)}


def _updated(ctx: Context, repository: Repository, discussion: Discussion) -> None:
    fresh = ctx.hub.community.get(repository, discussion.num)
    ctx.hub.webhooks.emit("update", "discussion", ctx.subject(repository, discussion=fresh))


@router.post("/api/{kind:kind}/{owner:seg}/{name:seg}/discussions/{num:seg}/status")
def status(ctx: Ctx, kind: str, owner: str, name: str, num: str, body: JsonBody) -> dict[str, Any]:
    repository, discussion, identity = _joined(ctx, kind, owner, name, num)
    _require_owner(ctx, repository, discussion.author, identity)
    wanted = text(body, "status")
    allowed = ("open", "closed", "draft") if discussion.is_pull_request else ("open", "closed")
    if wanted not in allowed:
        raise BadRequestError(f"status must be one of {allowed}, got {wanted!r}")
    said = text(body, "comment", "")
    # With the repository's lock, or it could close what is being merged or committed to.
    with ctx.hub.git.lock(repository), ctx.hub.database.writing():
        fresh = ctx.hub.community.get(repository, discussion.num)
        event = ctx.hub.community.set_status(fresh, identity.name, Status(wanted))
        if said.strip():
            _comment(ctx, repository, fresh, identity.name, said)
        _updated(ctx, repository, fresh)
    return {"newStatus": present.event(event, ctx.hub.accounts)}


@router.post("/api/{kind:kind}/{owner:seg}/{name:seg}/discussions/{num:seg}/merge")
def merge(ctx: Ctx, kind: str, owner: str, name: str, num: str, body: JsonBody) -> Response:
    """Squash the pull request onto its base."""
    repository, discussion, identity = _joined(ctx, kind, owner, name, num)
    ctx.hub.repositories.require_write(repository, identity)
    if not discussion.is_pull_request or discussion.base is None:
        raise BadRequestError("Only a pull request can be merged")
    said = text(body, "comment", "")
    with ctx.hub.git.lock(repository):
        discussion = ctx.hub.community.get(repository, discussion.num)
        if discussion.status is not Status.OPEN:
            raise ConflictError(f"A pull request that is {discussion.status.value} cannot be merged")
        git = ctx.git(repository)
        assert discussion.base is not None
        base, head = git.resolve(discussion.base), git.resolve(discussion.ref)
        tree, conflicts = git.merge(base, head)
        if conflicts:
            raise ConflictError(f"Conflicting files: {', '.join(conflicts)}")
        if tree == git.tree_id(base):
            raise BadRequestError("This pull request changes nothing")
        message = f"{discussion.title} (#{discussion.num})\n\n- " + "\n- ".join(
            f"{commit.title} ({commit.sha})" for commit in git.ahead(base, head)
        )
        with ctx.hub.database.writing():
            sha = git.add_commit(discussion.base, tree, [base], message, identity.name)
            ctx.hub.community.set_merged(discussion, identity.name, commit=sha, base_commit=base)
            ctx.hub.repositories.touch(repository)
            if said.strip():
                _comment(ctx, repository, discussion, identity.name, said)
            _updated(ctx, repository, discussion)
            refs = ((discussion.base, base, sha),)
            ctx.hub.webhooks.emit("update", "repo.content", ctx.subject(repository, refs=refs))
    return Response(status_code=200)
