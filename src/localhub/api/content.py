"""What a repository holds: tree, paths, history, refs."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import parse_qs

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from localhub.api import present
from localhub.api.access import Ctx, JsonBody, RawBody, text, truthy
from localhub.api.repos import page
from localhub.errors import BadRequestError, ConflictError, EntryNotFoundError, ForbiddenError
from localhub.routing import split_revision

router = APIRouter()

TREE_PAGE = 1000
EXPANDED_PAGE = 50
COMMITS_PAGE = 50


@router.get("/api/{kind:kind}/{owner:seg}/{name:seg}/tree/{where:revpath}")
def tree(ctx: Ctx, kind: str, owner: str, name: str, where: str, request: Request) -> Response:
    repository = ctx.readable(kind, owner, name)
    git = ctx.git(repository)
    revision, path = split_revision(where)
    sha = git.resolve(revision)
    query = request.query_params
    expand = truthy(query.get("expand"))
    entries = list(git.entries(sha, path.strip("/"), recursive=truthy(query.get("recursive"))))
    size = EXPANDED_PAGE if expand else TREE_PAGE
    if not expand:
        shown = [present.tree_entry(entry, ctx.hub.large) for entry in entries]
        return page(request, ctx.base_url, shown, default=size)
    last = git.last_changes(sha, [entry.path for entry in entries])
    shown = [present.tree_entry(entry, ctx.hub.large, last.get(entry.path)) for entry in entries]
    return page(request, ctx.base_url, shown, default=size)


@router.post("/api/{kind:kind}/{owner:seg}/{name:seg}/paths-info/{revision:seg}")
def paths_info(
    ctx: Ctx, kind: str, owner: str, name: str, revision: str, request: Request, raw: RawBody
) -> list[dict[str, Any]]:
    repository = ctx.readable(kind, owner, name)
    git = ctx.git(repository)
    sha = git.resolve(revision)
    paths, expand = _asked_paths(request, raw)
    found = []
    for path in paths:
        try:
            found.append(git.entry(sha, path.strip("/")))
        except EntryNotFoundError:
            continue
    last = git.last_changes(sha, [entry.path for entry in found]) if expand else {}
    return [present.tree_entry(entry, ctx.hub.large, last.get(entry.path)) for entry in found if entry.path]


def _asked_paths(request: Request, raw: bytes) -> tuple[list[str], bool]:
    """The paths and `expand` of a form or JSON body."""
    if "json" in request.headers.get("content-type", ""):
        body = json.loads(raw)
        paths = body.get("paths", [])
        return [paths] if isinstance(paths, str) else [str(path) for path in paths], bool(body.get("expand"))
    form = parse_qs(raw.decode("utf-8", "replace"), keep_blank_values=True, max_num_fields=100_000)
    return form.get("paths", []) + form.get("paths[]", []), truthy(form.get("expand", [""])[0])


@router.get("/api/{kind:kind}/{owner:seg}/{name:seg}/commits/{revision:seg}")
def commits(ctx: Ctx, kind: str, owner: str, name: str, revision: str, request: Request) -> Response:
    repository = ctx.readable(kind, owner, name)
    git = ctx.git(repository)
    found = [present.commit(one) for one in git.log(git.resolve(revision))]
    answer = page(request, ctx.base_url, found, default=COMMITS_PAGE)
    answer.headers["X-Total-Count"] = str(len(found))
    return answer


@router.get("/api/{kind:kind}/{owner:seg}/{name:seg}/compare/{spec:rest}")
def compare(ctx: Ctx, kind: str, owner: str, name: str, spec: str) -> Response:
    """The unified diff of `base..head`."""
    repository = ctx.files(kind, owner, name)
    git = ctx.git(repository)
    base, _, head = spec.partition("..")
    patch = git.patch(git.resolve(base), git.resolve(head.lstrip(".")))
    return Response(patch, media_type="text/plain; charset=utf-8")


# ------------------------------------------------------------------------------------------------- refs


@router.get("/api/{kind:kind}/{owner:seg}/{name:seg}/refs")
def refs(ctx: Ctx, kind: str, owner: str, name: str, request: Request) -> dict[str, Any]:
    repository = ctx.readable(kind, owner, name)
    git = ctx.git(repository)

    def listed(prefix: str, cut: str) -> list[dict[str, str]]:
        return [
            {"name": ref.removeprefix(cut), "ref": ref, "targetCommit": sha}
            for ref, sha in git.refs(prefix).items()
        ]

    shown = {
        "branches": listed("refs/heads/", "refs/heads/"),
        "tags": listed("refs/tags/", "refs/tags/"),
        "converts": listed("refs/convert/", "refs/convert/"),
    }
    if truthy(request.query_params.get("include_prs")):
        # The Hub names them by number, newest first.
        pulls = listed("refs/pr/", "refs/pr/")
        shown["pullRequests"] = sorted(pulls, key=lambda ref: -int(ref["name"]))
    return shown


@router.post("/api/{kind:kind}/{owner:seg}/{name:seg}/branch/{branch:seg}")
def create_branch(ctx: Ctx, kind: str, owner: str, name: str, branch: str, body: JsonBody) -> JSONResponse:
    repository, _ = ctx.writable(kind, owner, name)
    git = ctx.git(repository)
    start = git.resolve(text(body, "startingPoint", "main"))
    ref = f"refs/heads/{branch}"
    with ctx.hub.git.lock(repository):
        try:
            git.set_ref(ref, start, force=bool(body.get("overwrite")))
        except ConflictError as error:
            raise ConflictError(f"Reference already exists: {ref}") from error
        ctx.hub.webhooks.emit("update", "repo.content", ctx.subject(repository, refs=((ref, None, start),)))
    return JSONResponse({"success": True})


@router.delete("/api/{kind:kind}/{owner:seg}/{name:seg}/branch/{branch:seg}")
def delete_branch(ctx: Ctx, kind: str, owner: str, name: str, branch: str) -> JSONResponse:
    repository, _ = ctx.writable(kind, owner, name)
    if branch == "main":
        raise ForbiddenError("Cannot delete the main branch")
    ref = f"refs/heads/{branch}"
    _delete_ref(ctx, repository, ref)
    return JSONResponse({"success": True})


@router.post("/api/{kind:kind}/{owner:seg}/{name:seg}/tag/{revision:seg}")
def create_tag(ctx: Ctx, kind: str, owner: str, name: str, revision: str, body: JsonBody) -> JSONResponse:
    repository, identity = ctx.writable(kind, owner, name)
    git = ctx.git(repository)
    tag = text(body, "tag")
    sha = git.resolve(revision)
    with ctx.hub.git.lock(repository):
        git.tag(tag, sha, text(body, "message", ""), identity.name)
        ref = f"refs/tags/{tag}"
        ctx.hub.webhooks.emit("update", "repo.content", ctx.subject(repository, refs=((ref, None, sha),)))
    return JSONResponse({"success": True})


@router.delete("/api/{kind:kind}/{owner:seg}/{name:seg}/tag/{tag:seg}")
def delete_tag(ctx: Ctx, kind: str, owner: str, name: str, tag: str) -> JSONResponse:
    repository, _ = ctx.writable(kind, owner, name)
    _delete_ref(ctx, repository, f"refs/tags/{tag}")
    return JSONResponse({"success": True})


def _delete_ref(ctx: Ctx, repository: Any, ref: str) -> None:
    git = ctx.git(repository)
    with ctx.hub.git.lock(repository):
        old = git.ref(ref)
        git.delete_ref(ref)
        ctx.hub.webhooks.emit("update", "repo.content", ctx.subject(repository, refs=((ref, old, None),)))


@router.post("/api/{kind:kind}/{owner:seg}/{name:seg}/super-squash/{branch:seg}")
def super_squash(ctx: Ctx, kind: str, owner: str, name: str, branch: str, body: JsonBody) -> JSONResponse:
    repository, identity = ctx.writable(kind, owner, name)
    git = ctx.git(repository)
    ref = f"refs/heads/{branch}"
    with ctx.hub.git.lock(repository):
        old = git.resolve(ref)
        message = text(body, "message", f"Super-squash branch '{branch}'")
        if not message.strip():
            raise BadRequestError("message must not be empty")
        new = git.add_commit(None, git.tree_id(old), [], message, identity.name)
        git.set_ref(ref, new, force=True)
        ctx.hub.webhooks.emit("update", "repo.content", ctx.subject(repository, refs=((ref, old, new),)))
    return JSONResponse({"success": True})
