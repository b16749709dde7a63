"""Repositories: create, delete, move, settings, information, lists, gates."""

from __future__ import annotations

import json
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from localhub.accounts import Identity
from localhub.api import present
from localhub.api.access import Context, Ctx, JsonBody, text, truthy
from localhub.errors import (
    BadRequestError,
    ConflictError,
    ForbiddenError,
    LoginRequiredError,
    NotFoundError,
    RefusedError,
    RepoNotFoundError,
)
from localhub.git import UNREADABLE
from localhub.repositories import AccessStatus, Gate, Repository

router = APIRouter()


def _namespace(body: dict[str, Any], identity: Identity) -> tuple[str, str, str]:
    """(type, owner, name) of a create or delete request."""
    kind = body.get("type") or "model"
    if kind not in ("model", "dataset", "space"):
        raise BadRequestError(f"Invalid repository type {kind!r}")
    owner = body.get("organization") or identity.name
    name = text(body, "name")
    if "/" in name:
        owner, _, name = name.partition("/")
    return kind, str(owner), name


def _private(body: dict[str, Any]) -> bool | None:
    """Whether a request asks for a private repository; None when it does not say."""
    if "visibility" in body:
        return bool(body["visibility"] == "private")
    return None if body.get("private") is None else bool(body["private"])


@router.post("/api/repos/create")
def create(ctx: Ctx, body: JsonBody) -> dict[str, Any]:
    identity = ctx.login()
    kind, owner, name = _namespace(body, identity)
    if not ctx.hub.repositories.may_administer_namespace(owner, identity):
        raise ForbiddenError(f'You don\'t have the rights to create a {kind} under the namespace "{owner}"')
    owner = ctx.hub.accounts.get(owner).name
    existing = ctx.hub.repositories.find(kind, owner, name)
    if existing is not None and existing.full_name.lower() == f"{owner}/{name}".lower():
        raise ConflictError(
            f"You already created this {kind} repo: {existing.full_name}",
            body={
                "error": f"You already created this {kind} repo",
                "url": ctx.base_url + existing.web_path,
            },
        )
    # One transaction: a crash in between leaves no entry without its git repository, and whoever finds the
    # entry finds the repository and comes after these events.
    with ctx.hub.database.writing():
        repository = ctx.hub.repositories.create(
            kind, owner, name, private=_private(body) or False, sdk=body.get("sdk")
        )
        ctx.hub.git.create(repository, identity.name)
        head = ctx.hub.git.head(repository)
        ctx.hub.webhooks.emit("create", "repo", ctx.subject(repository))
        ctx.hub.webhooks.emit(
            "update", "repo.content", ctx.subject(repository, refs=(("refs/heads/main", None, head),))
        )
    return {"url": ctx.base_url + repository.web_path, "name": repository.full_name, "id": repository.id}


@router.delete("/api/repos/delete")
def delete(ctx: Ctx, body: JsonBody) -> Response:
    identity = ctx.login()
    kind, owner, name = _namespace(body, identity)
    repository = _administered(ctx, kind, owner, name)
    # One transaction: nobody can take the name before the place of the old repository is free.
    with ctx.hub.git.lock(repository), ctx.hub.database.writing():
        repository = ctx.present(repository)
        ctx.hub.webhooks.emit("delete", "repo", ctx.subject(repository))
        ctx.hub.repositories.delete(repository)
        ctx.hub.git.put_away(repository)
    ctx.hub.git.empty_trash(repository)
    return Response(status_code=200)


def _administered(ctx: Context, kind: str, owner: str, name: str) -> Repository:
    """The repository, for those who may delete it or change its settings."""
    identity = ctx.identity
    repository = ctx.readable(kind, owner, name)
    if identity is None:
        raise LoginRequiredError
    if not ctx.hub.repositories.may_administer_namespace(repository.owner, identity):
        raise ForbiddenError(f"You don't have the rights to change {kind}s/{repository.full_name}")
    return repository


@router.post("/api/repos/move")
def move(ctx: Ctx, body: JsonBody) -> Response:
    identity = ctx.login()
    kind = body.get("type") or "model"
    source, target = text(body, "fromRepo").split("/"), text(body, "toRepo").split("/")
    if len(source) != 2 or len(target) != 2:
        raise BadRequestError("fromRepo and toRepo must be owner/name")
    repository = _administered(ctx, kind, *source)
    if not ctx.hub.repositories.may_administer_namespace(target[0], identity):
        raise ForbiddenError(
            f'You don\'t have the rights to create a {kind} under the namespace "{target[0]}"'
        )
    with ctx.hub.git.lock(repository), ctx.hub.database.writing():
        repository = ctx.present(repository)
        moved = ctx.hub.repositories.move(repository, ctx.hub.accounts.get(target[0]).name, target[1])
        ctx.hub.git.move(repository, moved)
        ctx.hub.webhooks.emit("move", "repo", ctx.subject(repository, moved_to=moved))
    return Response(status_code=200)


@router.put("/api/{kind:kind}/{owner:seg}/{name:seg}/settings")
def settings(ctx: Ctx, kind: str, owner: str, name: str, body: JsonBody) -> dict[str, Any]:
    repository = _administered(ctx, kind, owner, name)
    gated = body.get("gated")
    if gated not in (None, False, "auto", "manual"):
        raise BadRequestError(f"gated must be false, auto or manual, got {gated!r}")
    with ctx.hub.database.writing():
        updated = ctx.hub.repositories.update(
            ctx.present(repository),
            private=_private(body),
            gated=None if gated is None else Gate(gated or ""),
            disabled=body.get("disabled"),
            discussions_disabled=body.get("discussionsDisabled"),
        )
        ctx.hub.webhooks.emit(
            "update",
            "repo.config",
            ctx.subject(updated, extra={"updatedConfig": {k: body[k] for k in sorted(body)}}),
        )
    return {
        "private": updated.private,
        "gated": updated.gated.value or False,
        "discussionsDisabled": updated.discussions_disabled,
    }


@router.get("/api/{kind:kind}")
def listing(ctx: Ctx, kind: str, request: Request) -> Response:
    query = request.query_params
    asks = ctx.identity  # a token nobody has is refused even where there is nothing to list
    wanted = [value for key in ("filter", "filter[]", "tags") for value in query.getlist(key)]
    wanted = [part for value in wanted for part in value.split(",")]
    if query.get("pipeline_tag"):
        wanted.append(query["pipeline_tag"])
    author, search = query.get("author", "").lower(), query.get("search", "").lower()
    found = []
    for repository in ctx.hub.repositories.all(kind):
        if not ctx.hub.repositories.may_see(repository, asks) or repository.disabled:
            continue
        if (author and repository.owner.lower() != author) or search not in repository.full_name.lower():
            continue
        if "gated" in query and truthy(query["gated"]) != (repository.gated is not Gate.OPEN):
            continue
        try:
            git = ctx.git(repository)
            shown = present.repository(repository, git, git.resolve("main"))
        except (RefusedError, *UNREADABLE):
            if ctx.hub.repositories.by_id(repository.id) is None:  # deleted since the list was read
                continue
            raise
        if all(tag in shown["tags"] for tag in wanted):
            found.append(_trimmed(shown, query))
    _sort(found, query.get("sort"), ascending=query.get("direction") == "1")
    return page(request, ctx.base_url, found, default=1000)


def _trimmed(shown: dict[str, Any], query: Any) -> dict[str, Any]:
    """Without what was not asked for."""
    expanded = query.getlist("expand") + query.getlist("expand[]")
    if expanded:
        return {key: shown[key] for key in ("_id", "id", *expanded) if key in shown}
    if not truthy(query.get("full")):
        shown.pop("siblings", None)
        if not truthy(query.get("cardData")):
            shown.pop("cardData", None)
    return shown


def _sort(found: list[dict[str, Any]], key: str | None, *, ascending: bool) -> None:
    """In place; newest change first unless told otherwise."""
    names = {"created_at": "createdAt", "last_modified": "lastModified", "trendingScore": "lastModified"}
    key = names.get(key or "", key or "lastModified")
    found.sort(key=lambda shown: (shown.get(key) is not None, shown.get(key)), reverse=not ascending)


def page(request: Request, base_url: str, items: list[Any], *, default: int) -> Response:
    """One page of a list, with the Link header that leads to the next."""
    query = request.query_params
    try:
        limit = max(1, min(int(query.get("limit", default)), default))
        start = max(0, int(query.get("cursor", 0)))
    except ValueError as error:
        raise BadRequestError("limit and cursor must be numbers") from error
    headers = {}
    if start + limit < len(items):
        raw_path = request.scope["raw_path"].decode("ascii").partition("?")[0]
        following = request.url.include_query_params(cursor=start + limit).query
        headers["Link"] = f'<{base_url}{raw_path}?{following}>; rel="next"'
    return JSONResponse(items[start : start + limit], headers=headers)


@router.get("/api/{kind:kind}/{owner:seg}/{name:seg}")
def info(ctx: Ctx, kind: str, owner: str, name: str, request: Request) -> Response:
    return _info(ctx, kind, owner, name, "main", request)


@router.get("/api/{kind:kind}/{owner:seg}/{name:seg}/revision/{revision:seg}")
def info_at(ctx: Ctx, kind: str, owner: str, name: str, revision: str, request: Request) -> Response:
    return _info(ctx, kind, owner, name, revision, request)


@router.get("/api/{kind:kind}/{name:seg}")
@router.get("/api/{kind:kind}/{name:seg}/revision/{revision:seg}")
@router.api_route("/{name:seg}/resolve/{where:rest}", methods=["GET", "HEAD"])
def without_owner(ctx: Ctx) -> Response:
    """Every repository has an owner here. On the Hub some old ones, such as `gpt2`, are found without theirs, too."""
    raise RepoNotFoundError(anonymous=ctx.identity is None)


def _info(ctx: Context, kind: str, owner: str, name: str, revision: str, request: Request) -> Response:
    repository = ctx.readable(kind, owner, name)
    git = ctx.git(repository)
    query = request.query_params
    shown = present.repository(repository, git, git.resolve(revision), blobs=truthy(query.get("blobs")))
    expanded = query.getlist("expand") + query.getlist("expand[]")
    if expanded:
        shown = {key: shown[key] for key in ("_id", "id", *expanded) if key in shown}
    else:
        shown["discussionsDisabled"] = repository.discussions_disabled
    return Response(
        json.dumps(shown), media_type="application/json", headers={"ETag": f'W/"{shown.get("sha", "")}"'}
    )


@router.get("/api/{kind:kind}/{owner:seg}/{name:seg}/auth-check")
def auth_check(ctx: Ctx, kind: str, owner: str, name: str) -> Response:
    ctx.files(kind, owner, name)
    return Response(status_code=200)


@router.get("/api/{kind:kind}/{owner:seg}/{name:seg}/auth-check/write")
def auth_check_write(ctx: Ctx, kind: str, owner: str, name: str) -> Response:
    ctx.writable(kind, owner, name)
    return Response(status_code=200)


# ------------------------------------------------------------------------------------------------ gates


def _access_status(name: str) -> AccessStatus:
    """Raises BadRequestError for a word that is no status."""
    try:
        return AccessStatus(name)
    except ValueError as error:
        raise BadRequestError(f"status must be one of {[one.value for one in AccessStatus]}") from error


@router.post("/{owner:seg}/{name:seg}/ask-access")
def ask_access(ctx: Ctx, owner: str, name: str) -> Response:
    """What the button of a gated model's page does."""
    identity = ctx.login()
    repository = ctx.readable("model", owner, name)
    if repository.gated is Gate.OPEN:
        raise BadRequestError("This repository is not gated")
    with ctx.hub.database.writing():
        if ctx.hub.repositories.access_request(repository, identity.name) is None:
            accepted = repository.gated is Gate.AUTO
            status = AccessStatus.ACCEPTED if accepted else AccessStatus.PENDING
            ctx.hub.repositories.set_access(repository, identity.name, status)
    return Response(status_code=200)


@router.get("/api/{kind:kind}/{owner:seg}/{name:seg}/user-access-request/{status:seg}")
def access_requests(ctx: Ctx, kind: str, owner: str, name: str, status: str, request: Request) -> Response:
    repository = _administered(ctx, kind, owner, name)
    wanted = _access_status(status)
    if repository.gated is Gate.OPEN:
        raise BadRequestError("This repository is not gated")
    found = [
        {
            "requestId": one.id,
            "user": {
                "_id": one.id,
                "user": one.user,
                "fullname": ctx.hub.accounts.get(one.user).fullname,
                "email": None,
            },
            "status": one.status.value,
            "timestamp": one.created_at,
            "fields": one.fields,
        }
        for one in ctx.hub.repositories.access_requests(repository, wanted)
    ]
    return page(request, ctx.base_url, found, default=1000)


@router.post("/api/{kind:kind}/{owner:seg}/{name:seg}/user-access-request/handle")
def handle_access(ctx: Ctx, kind: str, owner: str, name: str, body: JsonBody) -> Response:
    repository = _administered(ctx, kind, owner, name)
    status = _access_status(text(body, "status"))
    with ctx.hub.database.writing():
        requests = [
            one
            for each in AccessStatus
            for one in ctx.hub.repositories.access_requests(repository, each)
            if one.user.lower() == str(body.get("user", "")).lower() or one.id == body.get("requestId")
        ]
        if not requests:
            raise NotFoundError("Access request not found")
        if requests[0].status is status:
            raise NotFoundError(f"Access request is already {status.value}")
        ctx.hub.repositories.set_access(repository, requests[0].user, status)
    return Response(status_code=200)


@router.post("/api/{kind:kind}/{owner:seg}/{name:seg}/user-access-request/grant")
def grant_access(ctx: Ctx, kind: str, owner: str, name: str, body: JsonBody) -> dict[str, Any]:
    repository = _administered(ctx, kind, owner, name)
    user = ctx.hub.accounts.get(text(body, "user"))
    if repository.gated is Gate.OPEN:
        raise BadRequestError("This repository is not gated")
    with ctx.hub.database.writing():
        request = ctx.hub.repositories.access_request(repository, user.name)
        if request is not None and request.status is AccessStatus.ACCEPTED:
            raise BadRequestError(f"{user.name} has access already")
        ctx.hub.repositories.set_access(repository, user.name, AccessStatus.ACCEPTED)
    return {}
