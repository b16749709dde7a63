"""Xet: the tokens the Hub hands out, and the content-addressed store they open."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse

from localhub.api.access import Context, Ctx, JsonBody, RawBody, truthy
from localhub.api.commit import uploadable
from localhub.api.resolve import parse_range
from localhub.errors import BadRequestError, ForbiddenError, InvalidCredentialsError, NotFoundError
from localhub.repositories import Repository
from localhub.xet.shard import MAX_SHARD_BYTES, Term
from localhub.xet.store import check_hash
from localhub.xet.xorb import MAX_XORB_BYTES

router = APIRouter()

_CAS = "/cas/{store:seg}"
"""Clients remember by this address which chunks the store has: another store must have another one, also when it
gets the port of one that is gone."""
TOKEN_LIFETIME = 3600.0
"""Seconds; clients renew a minute before the end."""


@router.get("/api/{kind:kind}/{owner:seg}/{name:seg}/xet-write-token/{revision:seg}")
def write_token(ctx: Ctx, kind: str, owner: str, name: str, revision: str, request: Request) -> JSONResponse:
    # For a new pull request the client asks for the revision `None`.
    create_pr = truthy(request.query_params.get("create_pr"))
    repository = uploadable(ctx, kind, owner, name, revision, create_pr=create_pr)
    return _token(ctx, repository, "write")


@router.get("/api/{kind:kind}/{owner:seg}/{name:seg}/xet-read-token/{revision:seg}")
def read_token(ctx: Ctx, kind: str, owner: str, name: str, revision: str) -> JSONResponse:
    repository = ctx.files(kind, owner, name)
    ctx.git(repository).resolve(revision)
    return _token(ctx, repository, "read")


def _token(ctx: Context, repository: Repository, scope: str) -> JSONResponse:
    """The token in the body and in the headers: each client reads one of them."""
    token, expires = ctx.hub.signer.sign("xet", scope, repository.id, lifetime=TOKEN_LIFETIME)
    url = f"{ctx.base_url}/cas/{ctx.hub.signer.name}"
    headers = {
        "X-Xet-Cas-Url": url,
        "X-Xet-Access-Token": token,
        "X-Xet-Token-Expiration": str(expires),
    }
    return JSONResponse({"casUrl": url, "accessToken": token, "exp": expires}, headers=headers)


def _authorized(ctx: Context, *scopes: str) -> Repository:
    """The repository a xet token was made for.

    Raises:
        InvalidCredentialsError: no token, or one that is forged, expired or of another scope.
    """
    header = ctx.request.headers.get("authorization", "")
    fields = ctx.hub.signer.check(header.removeprefix("Bearer ").strip()) if header else None
    if fields is None or len(fields) != 3 or fields[0] != "xet" or fields[1] not in scopes:
        raise InvalidCredentialsError
    repository = ctx.hub.repositories.by_id(fields[2])
    if repository is None:
        raise NotFoundError("The repository of this token is gone")
    return repository


@router.get(_CAS + "/v1/chunks/default/{hash:seg}")
def chunk(ctx: Ctx, hash: str) -> Response:
    """The index of a xorb that holds a chunk: the client uploads none of its chunks again."""
    _authorized(ctx, "read", "write")
    xorb = ctx.hub.large.xorb_of_chunk(check_hash(hash))
    if xorb is None:
        raise NotFoundError(f"Chunk {hash} is not indexed")
    return Response(ctx.hub.xet.index(xorb), media_type="application/octet-stream")


@router.post(_CAS + "/v1/xorbs/default/{hash:seg}")
def xorb(ctx: Ctx, hash: str, raw: RawBody) -> dict[str, Any]:
    _authorized(ctx, "write")
    if len(raw) > MAX_XORB_BYTES:
        raise BadRequestError(f"Xorb of {len(raw)} bytes, at most {MAX_XORB_BYTES} are allowed")
    return {"was_inserted": ctx.hub.xet.add_xorb(check_hash(hash), raw)}


@router.post(_CAS + "/v1/shards")
def shard(ctx: Ctx, raw: RawBody) -> dict[str, Any]:
    repository = _authorized(ctx, "write")
    if len(raw) > MAX_SHARD_BYTES:
        raise BadRequestError(f"Shard of {len(raw)} bytes, at most {MAX_SHARD_BYTES} are allowed")
    parsed, recipes = ctx.hub.xet.add_shard(raw)
    ctx.hub.large.register(recipes)
    ctx.hub.large.index_chunks(repository, parsed)
    ctx.hub.repositories.link_large_files(repository, [recipe.sha256 for recipe in recipes])
    return {"result": 1}


@router.get(_CAS + "/v1/reconstructions/{hash:seg}")
def reconstruction(ctx: Ctx, hash: str, request: Request) -> dict[str, Any]:
    """Which ranges of which xorbs make up (a range of) a file."""
    repository = _authorized(ctx, "read", "write")
    recipe = ctx.hub.xet.recipe(check_hash(hash))
    if recipe is None or not ctx.hub.repositories.has_large_file(repository, recipe.sha256):
        raise NotFoundError(f"File {hash} is not in the store")
    asked = parse_range(request.headers.get("range"), recipe.size)
    start, end = asked or (0, recipe.size)
    part = ctx.hub.xet.reconstruct(recipe, start, end)
    return {
        "offset_into_first_range": part.skip,
        "terms": [
            {
                "hash": term.xorb,
                "unpacked_length": term.length,
                "range": {"start": term.start, "end": term.end},
            }
            for term in part.terms
        ],
        "fetch_info": _fetch_info(ctx, part.terms),
    }


def _ranges(terms: tuple[Term, ...]) -> list[tuple[str, int, int]]:
    """Xorb, first chunk and end of every run of chunks that the terms take, none of them touching another."""
    runs: list[tuple[str, int, int]] = []
    for xorb, first, last in sorted({(term.xorb, term.start, term.end) for term in terms}):
        if runs and runs[-1][0] == xorb and first <= runs[-1][2]:
            _, start, end = runs.pop()
            first, last = start, max(end, last)
        runs.append((xorb, first, last))
    return runs


def _fetch_info(ctx: Context, terms: tuple[Term, ...]) -> dict[str, list[dict[str, Any]]]:
    """For each xorb the byte ranges to fetch, each byte once: terms that repeat a part of another share its range."""
    found: dict[str, list[dict[str, Any]]] = {}
    for xorb, first, last in _ranges(terms):
        chunks = ctx.hub.xet.chunks(xorb)
        signed, _ = ctx.hub.signer.sign("xorb", xorb, lifetime=TOKEN_LIFETIME)
        found.setdefault(xorb, []).append(
            {
                "range": {"start": first, "end": last},
                "url": f"{ctx.base_url}/cas/fetch/{signed}",
                # Inclusive, as in a Range header.
                "url_range": {"start": chunks[first].offset, "end": chunks[last - 1].end - 1},
            }
        )
    return found


@router.get("/cas/fetch/{signed:seg}")
def fetch(ctx: Ctx, signed: str, request: Request) -> Response:
    """(A range of) a xorb, for whoever holds the signed URL."""
    fields = ctx.hub.signer.check(signed)
    if fields is None or len(fields) != 2 or fields[0] != "xorb":
        raise ForbiddenError("This download link has expired or is not valid")
    path = ctx.hub.xet.xorb_path(fields[1])
    size = path.stat().st_size
    asked = parse_range(request.headers.get("range"), size)
    if asked is None:
        return FileResponse(path)
    start, end = asked
    headers = {"Content-Range": f"bytes {start}-{end - 1}/{size}", "Content-Length": str(end - start)}
    with path.open("rb") as file:
        file.seek(start)
        data = file.read(end - start)
    return StreamingResponse(
        iter([data]), status_code=206, headers=headers, media_type="application/octet-stream"
    )


@router.post("/api/{kind:kind}/{owner:seg}/{name:seg}/lfs-files/duplicate")
def duplicate(ctx: Ctx, kind: str, owner: str, name: str, body: JsonBody) -> dict[str, Any]:
    """Let another repository point to large files of this one; nothing is copied."""
    source = ctx.files(kind, owner, name)
    target = body.get("target") or {}
    target_owner, _, target_name = str(target.get("name", "")).partition("/")
    destination = uploadable(
        ctx, str(target.get("type", "model")), target_owner, target_name, "main", create_pr=True
    )
    succeeded, failed = [], []
    for file in body.get("files", []):
        sha256 = str(file.get("sha256", ""))
        if ctx.hub.repositories.has_large_file(source, sha256):
            succeeded.append(sha256)
        else:
            failed.append({"sha256": sha256, "error": "File not found in the source repository"})
    ctx.hub.repositories.link_large_files(destination, succeeded)
    return {"success": [{"sha256": sha256} for sha256 in succeeded], "failed": failed}
