"""Preupload and commit."""

from __future__ import annotations

import base64
import binascii
import fnmatch
from typing import Any

from fastapi import APIRouter, Request

from localhub import commits
from localhub.accounts import Identity, TokenRole
from localhub.api.access import Context, Ctx, JsonBody, RawBody, truthy
from localhub.attributes import large_patterns, upload_mode
from localhub.commits import CommitRequest
from localhub.community import Discussion, Status
from localhub.errors import (
    BadRequestError,
    EntryNotFoundError,
    ForbiddenError,
    LoginRequiredError,
    RevisionNotFoundError,
    StaleParentError,
)
from localhub.git import GitRepository
from localhub.repositories import Repository

router = APIRouter()


@router.post("/api/{kind:kind}/{owner:seg}/{name:seg}/preupload/{revision:seg}")
def preupload(
    ctx: Ctx, kind: str, owner: str, name: str, revision: str, request: Request, body: JsonBody
) -> dict[str, Any]:
    create_pr = truthy(request.query_params.get("create_pr"))
    repository = uploadable(ctx, kind, owner, name, revision, create_pr=create_pr)
    git = ctx.git(repository)
    sha = git.resolve(revision)
    patterns = large_patterns(git.text(sha, ".gitattributes") or "")
    ignored = _ignored(body.get("gitIgnore") or git.text(sha, ".gitignore") or "")
    shown = []
    for file in body.get("files", []):
        try:
            path, size = str(file["path"]), int(file["size"])
            sample = base64.b64decode(file.get("sample", ""), validate=True)
        except (KeyError, TypeError, ValueError, binascii.Error) as error:
            raise BadRequestError(f"Malformed file in preupload: {error!r}") from error
        shown.append(
            {
                "path": path,
                "uploadMode": upload_mode(path, size, sample, patterns),
                "shouldIgnore": any(fnmatch.fnmatch(path, pattern) for pattern in ignored),
                "oid": _known_oid(git, sha, path),
            }
        )
    return {"files": shown}


def _ignored(gitignore: str) -> list[str]:
    """The patterns of a .gitignore that name files anywhere, without its finer rules."""
    lines = [line.strip() for line in gitignore.splitlines()]
    plain = [line for line in lines if line and not line.startswith(("#", "!"))]
    return [f"{line}*" if line.endswith("/") else line for line in plain]


def _known_oid(git: GitRepository, sha: str, path: str) -> str | None:
    """What the client compares with its own file to see that it has not changed."""
    try:
        entry = git.file(sha, path)
    except EntryNotFoundError:
        return None
    return entry.pointer.sha256 if entry.pointer else entry.oid


def uploadable(
    ctx: Context, kind: str, owner: str, name: str, revision: str, *, create_pr: bool
) -> Repository:
    """The repository, for one who may upload to this revision: writers, the author of a pull request to
    its ref, and with `create_pr` anybody who can read it."""
    repository = ctx.readable(kind, owner, name)
    identity = ctx.identity
    if identity is None:
        raise LoginRequiredError
    if ctx.hub.repositories.may_write(repository, identity):
        return repository
    may_propose = identity.role in (TokenRole.WRITE, TokenRole.OAUTH)
    if create_pr and may_propose and not repository.discussions_disabled:
        return repository
    if revision.startswith("refs/pr/") and may_propose:
        discussion = pull_request_of(ctx, repository, revision)
        if discussion.author.lower() == identity.name.lower():
            return repository
    raise ForbiddenError(
        "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request"
        if may_propose
        else "Forbidden: this token cannot write to this repository"
    )


def pull_request_of(ctx: Context, repository: Repository, ref: str) -> Discussion:
    """The pull request behind `refs/pr/N`."""
    digits = ref.removeprefix("refs/pr/")
    if not digits.isdecimal() or len(digits) > 9:
        raise RevisionNotFoundError(ref)
    discussion = ctx.hub.community.get(repository, int(digits))
    if not discussion.is_pull_request:
        raise RevisionNotFoundError(ref)
    return discussion


@router.post("/api/{kind:kind}/{owner:seg}/{name:seg}/commit/{revision:seg}")
def commit(
    ctx: Ctx, kind: str, owner: str, name: str, revision: str, request: Request, raw: RawBody
) -> dict[str, Any]:
    create_pr = truthy(request.query_params.get("create_pr"))
    repository = uploadable(ctx, kind, owner, name, revision, create_pr=create_pr)
    identity = ctx.login()
    wanted = commits.parse(raw)
    sizes = _large_sizes(ctx, repository, wanted)
    with ctx.hub.git.lock(repository):
        repository = ctx.present(repository)
        git = ctx.git(repository)
        if create_pr:
            return _propose(ctx, repository, git, identity, wanted, sizes, revision)
        return _push(ctx, repository, git, identity, wanted, sizes, revision)


def _large_sizes(ctx: Context, repository: Repository, wanted: CommitRequest) -> dict[str, int]:
    """Bytes of each large file of a commit.

    A hash alone gives nobody a file: it must have been uploaded or copied to this repository.

    Raises:
        BadRequestError: one is not in the store or not linked to the repository.
    """
    sizes = {}
    for path, file in wanted.large.items():
        size = ctx.hub.large.size(file.sha256)
        if size is None or not ctx.hub.repositories.has_large_file(repository, file.sha256):
            raise BadRequestError(
                f"LFS pointer of {path} points to a file that does not exist: {file.sha256}. Upload it first."
            )
        if file.size is not None and file.size != size:
            raise BadRequestError(f"{path} has {size} bytes in the store, the commit says {file.size}")
        sizes[file.sha256] = size
    return sizes


def _push(
    ctx: Context,
    repository: Repository,
    git: GitRepository,
    identity: Identity,
    wanted: CommitRequest,
    sizes: dict[str, int],
    revision: str,
) -> dict[str, Any]:
    """Commit to a branch or to the ref of an open pull request."""
    discussion = None
    if revision.startswith("refs/pr/"):
        discussion = pull_request_of(ctx, repository, revision)
        if discussion.status in (Status.MERGED, Status.CLOSED):
            raise ForbiddenError(f"This pull request is {discussion.status.value}: open a new one")
        ref = revision
    else:
        ref = f"refs/heads/{revision.removeprefix('refs/heads/')}"
    head = git.ref(ref)
    if head is None:
        raise RevisionNotFoundError(revision)
    if wanted.parent is not None and not head.startswith(wanted.parent.lower()):
        raise StaleParentError
    tree = commits.build_tree(git, head, wanted, sizes)
    if tree == git.tree_id(head):
        return _answer(ctx, repository, head, None)
    with ctx.hub.database.writing():
        sha = git.add_commit(ref, tree, [head], wanted.message, identity.name)
        ctx.hub.repositories.touch(repository)
        if discussion is not None:
            ctx.hub.community.add_event(
                discussion, "commit", identity.name, {"subject": wanted.summary, "oid": sha}
            )
        ctx.hub.webhooks.emit("update", "repo.content", ctx.subject(repository, refs=((ref, head, sha),)))
    return _answer(ctx, repository, sha, None)


def _propose(
    ctx: Context,
    repository: Repository,
    git: GitRepository,
    identity: Identity,
    wanted: CommitRequest,
    sizes: dict[str, int],
    revision: str,
) -> dict[str, Any]:
    """Commit to a new pull request."""
    if repository.discussions_disabled:
        raise ForbiddenError("Discussions are disabled for this repository")
    base = f"refs/heads/{revision.removeprefix('refs/heads/')}"
    head = git.ref(base)
    if head is None:
        raise RevisionNotFoundError(revision)
    if wanted.parent is not None:
        head = git.resolve(wanted.parent)
    tree = commits.build_tree(git, head, wanted, sizes)
    if tree == git.tree_id(head):
        return _answer(ctx, repository, head, None)
    sha = git.add_commit(None, tree, [head], wanted.message, identity.name)
    # One transaction: a crash in between leaves no pull request without its ref; a ref without a pull
    # request is overwritten by the next one of that number.
    with ctx.hub.database.writing():
        discussion, comment = ctx.hub.community.open(
            repository,
            title=wanted.summary[:200],
            author=identity.name,
            description=wanted.description,
            base=base,
        )
        git.set_ref(discussion.ref, sha, force=True)
        ctx.hub.community.add_event(
            discussion, "commit", identity.name, {"subject": wanted.summary, "oid": sha}
        )
        ctx.hub.webhooks.emit(
            "create", "discussion", ctx.subject(repository, discussion=discussion, comment=comment)
        )
        ctx.hub.webhooks.emit(
            "update", "repo.content", ctx.subject(repository, refs=((discussion.ref, None, sha),))
        )
    return _answer(ctx, repository, sha, discussion)


def _answer(ctx: Context, repository: Repository, sha: str, discussion: Discussion | None) -> dict[str, Any]:
    page = ctx.base_url + repository.web_path
    return {
        "success": True,
        "commitOid": sha,
        "commitUrl": f"{page}/commit/{sha}",
        "hookOutput": "",
        "pullRequestUrl": f"{page}/discussions/{discussion.num}" if discussion else None,
    }
