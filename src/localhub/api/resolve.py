"""Downloads: small files from git, large ones by redirect to signed storage URLs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from urllib.parse import quote

from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse

from localhub.api.access import Context, Ctx
from localhub.errors import ForbiddenError, NotFoundError, RefusedError
from localhub.git import Entry
from localhub.repositories import Repository
from localhub.routing import split_revision

router = APIRouter()

STORAGE_LIFETIME = 3600.0
"""Seconds a storage URL is good for."""
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")


def parse_range(header: str | None, size: int) -> tuple[int, int] | None:
    """(start, end exclusive) of a Range header; None when there is none or it asks for several.

    Raises:
        RefusedError: 416, the range lies outside.
    """
    match = _RANGE.fullmatch((header or "").strip())
    if match is None or match.groups() == ("", ""):
        return None
    if match[1] == "":
        start, end = max(0, size - int(match[2])), size
    else:
        start = int(match[1])
        end = min(size, int(match[2]) + 1) if match[2] else size
    if start >= size or start >= end:
        raise RefusedError(416, f"Range {header} is outside of {size} bytes")
    return start, end


@router.api_route("/{owner:seg}/{name:seg}/resolve/{where:revpath}", methods=["GET", "HEAD"])
def resolve_model(ctx: Ctx, owner: str, name: str, where: str, request: Request) -> Response:
    return _resolve(ctx, "model", owner, name, where, request)


@router.api_route("/{kind:kind}/{owner:seg}/{name:seg}/resolve/{where:revpath}", methods=["GET", "HEAD"])
def resolve(ctx: Ctx, kind: str, owner: str, name: str, where: str, request: Request) -> Response:
    return _resolve(ctx, kind, owner, name, where, request)


@router.get("/{owner:seg}/{name:seg}/raw/{where:revpath}")
def raw_model(ctx: Ctx, owner: str, name: str, where: str) -> Response:
    return _raw(ctx, "model", owner, name, where)


@router.get("/{kind:kind}/{owner:seg}/{name:seg}/raw/{where:revpath}")
def raw(ctx: Ctx, kind: str, owner: str, name: str, where: str) -> Response:
    return _raw(ctx, kind, owner, name, where)


def _raw(ctx: Context, kind: str, owner: str, name: str, where: str) -> Response:
    """The bytes git holds: of a large file, its pointer."""
    repository = ctx.files(kind, owner, name)
    git = ctx.git(repository)
    revision, path = split_revision(where)
    data = git.read(git.file(git.resolve(revision), path).oid)
    return Response(data, media_type="text/plain; charset=utf-8", headers=_SAFE)


_SAFE = {"X-Content-Type-Options": "nosniff", "Content-Security-Policy": "default-src 'none'; sandbox"}
"""Files of repositories are untrusted: no browser may run them under this origin."""


def _resolve(ctx: Context, kind: str, owner: str, name: str, where: str, request: Request) -> Response:
    repository = ctx.files(kind, owner, name)
    git = ctx.git(repository)
    revision, path = split_revision(where)
    sha = git.resolve(revision)
    try:
        entry = git.file(sha, path)
    except RefusedError as error:
        # Clients cache that a file is missing, under the commit this header names.
        return Response(status_code=error.status, headers={**error.headers(), "X-Repo-Commit": sha, **_SAFE})
    if request.method == "GET" and path == "config.json":
        ctx.hub.repositories.count_download(repository)
    if entry.pointer is not None:
        return _redirect(ctx, repository, sha, entry)
    data = git.read(entry.oid)
    headers = {
        "X-Repo-Commit": sha,
        "ETag": f'"{entry.oid}"',
        "Accept-Ranges": "bytes",
        "Content-Disposition": _disposition(path),
        **_SAFE,
    }
    asked = parse_range(request.headers.get("range"), len(data))
    if asked is None:
        return _sized(request, 200, headers, len(data), iter([data]))
    start, end = asked
    headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
    return _sized(request, 206, headers, end - start, iter([data[start:end]]))


def _disposition(path: str) -> str:
    name = path.rpartition("/")[2]
    plain = re.sub(r"[^\w.-]", "_", name, flags=re.ASCII)
    return f"inline; filename*=UTF-8''{quote(name)}; filename=\"{plain}\";"


def _sized(
    request: Request, status: int, headers: dict[str, str], size: int, body: Iterator[bytes]
) -> Response:
    """An answer of known size, without its body for HEAD."""
    headers = {**headers, "Content-Length": str(size), "Content-Type": "application/octet-stream"}
    if request.method == "HEAD":
        return Response(status_code=status, headers=headers)
    return StreamingResponse(body, status_code=status, headers=headers)


def _redirect(ctx: Context, repository: Repository, sha: str, entry: Entry) -> Response:
    """302 to the store, with what clients need to fetch through xet instead.

    The store must look like another host: clients follow redirects on the same one when they ask for
    metadata, and would miss these headers.
    """
    assert entry.pointer is not None
    name = entry.path.rpartition("/")[2]
    signed, _ = ctx.hub.signer.sign("get", entry.pointer.sha256, lifetime=STORAGE_LIFETIME)
    location = f"{_other_host(ctx.base_url)}/storage/{signed}/{quote(name)}"
    headers = {
        "X-Repo-Commit": sha,
        "X-Linked-Size": str(entry.pointer.size),
        "X-Linked-ETag": f'"{entry.pointer.sha256}"',
        "ETag": f'"{entry.pointer.sha256}"',
        "Accept-Ranges": "bytes",
        "Location": location,
    }
    xet_hash = ctx.hub.large.xet_hash(entry.pointer.sha256)
    if xet_hash:
        auth = f"{ctx.base_url}{repository.api_path}/xet-read-token/{sha}"
        headers["X-Xet-Hash"] = xet_hash
        headers["X-Xet-Refresh-Route"] = auth
        headers["Link"] = f'<{auth}>; rel="xet-auth"'
    return Response(status_code=302, headers=headers)


def _other_host(base_url: str) -> str:
    """The same server under its other loopback name."""
    scheme, _, host = base_url.partition("://")
    if host.startswith("localhost"):
        return f"{scheme}://127.0.0.1{host.removeprefix('localhost')}"
    return f"{scheme}://localhost{host[host.rindex(':') :] if ':' in host else ''}"


@router.api_route("/storage/{signed:seg}/{name:seg}", methods=["GET", "HEAD"])
def storage(ctx: Ctx, signed: str, name: str, request: Request) -> Response:
    """A large file, for whoever holds the signed URL."""
    fields = ctx.hub.signer.check(signed)
    if fields is None or len(fields) != 2 or fields[0] != "get":
        raise ForbiddenError("This download link has expired or is not valid")
    sha256 = fields[1]
    size = ctx.hub.large.size(sha256)
    if size is None:
        raise NotFoundError(f"Large file {sha256} is not in the store")
    asked = parse_range(request.headers.get("range"), size)
    headers = {
        "ETag": f'"{sha256}"',
        "Accept-Ranges": "bytes",
        "Content-Disposition": _disposition(name),
        **_SAFE,
    }
    start, end = asked or (0, size)
    if asked:
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
    body = ctx.hub.large.read(sha256, start, end)
    return _sized(request, 206 if asked else 200, headers, end - start, body)
