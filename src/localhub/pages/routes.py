"""The pages, under the addresses they have on the Hub."""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse

from localhub.api import present
from localhub.api.access import COOKIE, Context, Ctx, RawBody, number
from localhub.api.oauth import read_form
from localhub.card import body as card_body
from localhub.card import card_metadata
from localhub.errors import InvalidCredentialsError, RefusedError
from localhub.pages.render import diff_lines, render
from localhub.repositories import Repository
from localhub.routing import split_revision

router = APIRouter()

SHOWN_BYTES = 512 * 1024
"""Text files up to this size are shown."""
HISTORY = 100


def _page(ctx: Context, template: str, **values: Any) -> HTMLResponse:
    viewer = ctx.identity.name if ctx.identity else None
    return render(template, viewer=viewer, **values)


def _both(path: str) -> Callable[[Callable[..., Response]], Callable[..., Response]]:
    """Register a page for models (`/owner/name…`) and for datasets and spaces (`/datasets/owner/name…`)."""

    def register(page: Callable[..., Response]) -> Callable[..., Response]:
        router.add_api_route("/{kind:kind}/{owner:seg}/{name:seg}" + path, page, methods=["GET"])
        router.add_api_route("/{owner:seg}/{name:seg}" + path, page, methods=["GET"])
        return page

    return register


def _repository(ctx: Context, *, with_files: bool = False) -> Repository:
    parameters = ctx.request.path_params
    find = ctx.files if with_files else ctx.readable
    return find(parameters.get("kind", "model"), parameters["owner"], parameters["name"])


# ------------------------------------------------------------------------------------------------ the Hub


@router.get("/static/{name:seg}")
def static(name: str) -> Response:
    if name != "style.css":
        raise RefusedError(404, "Not found")
    css = (files("localhub.pages") / "static" / "style.css").read_text()
    return Response(css, media_type="text/css", headers={"Cache-Control": "max-age=300"})


@router.get("/")
def index(ctx: Ctx) -> HTMLResponse:
    return _listing(ctx, None)


def _listing(ctx: Context, owner: str | None) -> HTMLResponse:
    hub = ctx.hub
    shown = [
        repository
        for repository in hub.repositories.all()
        if hub.repositories.may_see(repository, ctx.identity)
        and (owner is None or repository.owner.lower() == owner.lower())
    ]
    pulls = {
        repository.id: sum(
            one.status.value in ("open", "draft") for one in hub.community.discussions(repository)
        )
        for repository in shown
    }
    return _page(ctx, "index.html", repositories=shown, pulls=pulls, owner=owner)


@router.get("/login")
def login(ctx: Ctx) -> HTMLResponse:
    return _page(ctx, "login.html", problem="")


@router.post("/login")
def log_in(ctx: Ctx, request: Request, raw: RawBody) -> Response:
    token = read_form(request, raw).get("token", "")
    try:
        ctx.hub.accounts.identify(token)
    except InvalidCredentialsError:
        return render("login.html", status=401, viewer=None, problem="No user has this token.")
    answer = RedirectResponse("/", status_code=303)
    answer.set_cookie(COOKIE, token, httponly=True, samesite="strict", max_age=12 * 3600)
    return answer


@router.post("/logout")
def log_out() -> Response:
    answer = RedirectResponse("/", status_code=303)
    answer.delete_cookie(COOKIE)
    return answer


@router.get("/{owner:seg}")
def profile(ctx: Ctx, owner: str) -> HTMLResponse:
    return _listing(ctx, ctx.hub.accounts.get(owner).name)


# ------------------------------------------------------------------------------------------ repositories


@_both("")
def home(ctx: Ctx) -> Response:
    return _tree(ctx, "main", "", front=True)


@_both("/tree/{where:revpath}")
def tree(ctx: Ctx, where: str) -> Response:
    revision, path = split_revision(where)
    return _tree(ctx, revision, path.strip("/"), front=False)


def _tree(ctx: Context, revision: str, path: str, *, front: bool) -> HTMLResponse:
    repository = _repository(ctx)
    git = ctx.git(repository)
    sha = git.resolve(revision)
    entries = sorted(git.entries(sha, path), key=lambda entry: (not entry.is_folder, entry.path))
    open_to_read = ctx.hub.repositories.may_read_files(repository, ctx.identity)
    readme = git.text(sha, f"{path}/README.md" if path else "README.md") if open_to_read or not path else None
    return _page(
        ctx,
        "tree.html",
        repository=repository,
        revision=revision,
        path=path,
        entries=entries,
        last=git.last_changes(sha, [entry.path for entry in entries]),
        head=git.commit(sha),
        readme=None if readme is None else card_body(readme),
        card=card_metadata(readme or ""),
        branches=[ref.removeprefix("refs/heads/") for ref in git.refs("refs/heads/")],
        front=front,
        open_to_read=open_to_read,
        tab="card" if front else "files",
    )


@_both("/blob/{where:revpath}")
def blob(ctx: Ctx, where: str) -> Response:
    repository = _repository(ctx, with_files=True)
    git = ctx.git(repository)
    revision, path = split_revision(where)
    entry = git.file(git.resolve(revision), path)
    text = None
    if entry.pointer is None and entry.size <= SHOWN_BYTES:
        data = git.read(entry.oid)
        text = None if b"\x00" in data else data.decode("utf-8", "replace")
    xet_hash = ctx.hub.large.xet_hash(entry.pointer.sha256) if entry.pointer else None
    return _page(
        ctx,
        "blob.html",
        repository=repository,
        revision=revision,
        path=path,
        entry=entry,
        text=text,
        xet_hash=xet_hash,
        tab="files",
    )


@_both("/commits/{revision:seg}")
def commits(ctx: Ctx, revision: str) -> Response:
    repository = _repository(ctx)
    git = ctx.git(repository)
    history = []
    for one in git.log(git.resolve(revision)):
        history.append(one)
        if len(history) == HISTORY:
            break
    return _page(ctx, "commits.html", repository=repository, revision=revision, commits=history, tab="files")


@_both("/commit/{sha:seg}")
def commit(ctx: Ctx, sha: str) -> Response:
    repository = _repository(ctx, with_files=True)
    git = ctx.git(repository)
    one = git.commit(git.resolve(sha))
    patch = git.patch(one.parents[0] if one.parents else None, one.sha)
    return _page(ctx, "commit.html", repository=repository, commit=one, lines=diff_lines(patch), tab="files")


# ------------------------------------------------------------------------------------------- discussions


@_both("/discussions")
def discussions(ctx: Ctx) -> Response:
    repository = _repository(ctx)
    found = ctx.hub.community.discussions(repository)
    return _page(ctx, "discussions.html", repository=repository, discussions=found, tab="community")


@_both("/discussions/{num:seg}")
def discussion(ctx: Ctx, num: str) -> Response:
    repository = _repository(ctx)
    one = ctx.hub.community.get(repository, number(num))
    lines = []
    open_to_read = ctx.hub.repositories.may_read_files(repository, ctx.identity)
    if one.is_pull_request and open_to_read:
        lines = diff_lines(present.pull_request_patch(one, ctx.git(repository)))
    return _page(
        ctx,
        "discussion.html",
        repository=repository,
        discussion=one,
        events=ctx.hub.community.events(one),
        lines=lines,
        tab="community",
    )
