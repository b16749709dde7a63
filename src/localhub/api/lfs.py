"""The older way to upload and download large files: Git LFS, basic and multipart transfers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool

from localhub.api.access import Context, Ctx, JsonBody, text
from localhub.api.commit import uploadable
from localhub.api.resolve import STORAGE_LIFETIME
from localhub.errors import BadRequestError, ForbiddenError, NotFoundError
from localhub.large import Receiver
from localhub.repositories import Repository
from localhub.xet.store import check_hash

router = APIRouter()

LFS_JSON = "application/vnd.git-lfs+json"
MULTIPART_FROM = 16 * 1024 * 1024
"""Bytes from which uploads go in parts."""
PART_BYTES = 8 * 1024 * 1024
MAX_PARTS = 10_000


@router.post("/{owner:seg}/{name:seg}/info/lfs/objects/batch")
def batch_model(ctx: Ctx, owner: str, name: str, body: JsonBody) -> Response:
    return _batch(ctx, "model", owner, name, body)


@router.post("/{kind:kind}/{owner:seg}/{name:seg}/info/lfs/objects/batch")
def batch(ctx: Ctx, kind: str, owner: str, name: str, body: JsonBody) -> Response:
    return _batch(ctx, kind, owner, name, body)


def _batch(ctx: Context, kind: str, owner: str, name: str, body: dict[str, Any]) -> Response:
    name = name.removesuffix(".git")
    upload = text(body, "operation") == "upload"
    if upload:
        revision = str((body.get("ref") or {}).get("name", "main"))
        # Whoever can read may upload for a pull request; the commit decides what becomes of it.
        repository = uploadable(ctx, kind, owner, name, revision, create_pr=True)
    else:
        repository = ctx.files(kind, owner, name)
    try:
        objects = [(check_hash(str(one["oid"])), int(one["size"])) for one in body.get("objects", [])]
    except (KeyError, TypeError, ValueError) as error:
        raise BadRequestError(f"Malformed LFS object: {error!r}") from error
    multipart = "multipart" in body.get("transfers", ["basic"])
    if upload:
        shown = [_upload(ctx, repository, oid, size, multipart=multipart) for oid, size in objects]
    else:
        shown = [_download(ctx, repository, oid, size) for oid, size in objects]
    large = any(size >= MULTIPART_FROM for _, size in objects)
    transfer = "multipart" if upload and multipart and large else "basic"
    content = {"transfer": transfer, "objects": shown, "hash_algo": "sha256"}
    return JSONResponse(content, media_type=LFS_JSON)


def _download(ctx: Context, repository: Repository, oid: str, size: int) -> dict[str, Any]:
    known = ctx.hub.large.size(oid)
    if known is None or not ctx.hub.repositories.has_large_file(repository, oid):
        return {"oid": oid, "size": size, "error": {"code": 404, "message": "Object does not exist"}}
    signed, _expires = ctx.hub.signer.sign("get", oid, lifetime=STORAGE_LIFETIME)
    href = f"{ctx.base_url}/storage/{signed}/{oid}"
    return {"oid": oid, "size": known, "authenticated": True, "actions": {"download": {"href": href}}}


def _upload(ctx: Context, repository: Repository, oid: str, size: int, *, multipart: bool) -> dict[str, Any]:
    known = ctx.hub.large.size(oid)
    if known is not None and ctx.hub.repositories.has_large_file(repository, oid):
        return {"oid": oid, "size": known}
    lifetime = STORAGE_LIFETIME
    verify, _ = ctx.hub.signer.sign("verify", repository.id, oid, lifetime=lifetime)
    actions: dict[str, Any] = {"verify": {"href": f"{ctx.base_url}/lfs/verify/{verify}"}}
    if multipart and size >= MULTIPART_FROM:
        part = max(PART_BYTES, math.ceil(size / MAX_PARTS))
        header = {"chunk_size": str(part)}
        for number in range(1, math.ceil(size / part) + 1):
            signed, _ = ctx.hub.signer.sign("part", repository.id, oid, str(number), lifetime=lifetime)
            header[f"{number:05d}"] = f"{ctx.base_url}/lfs/part/{signed}"
        signed, _ = ctx.hub.signer.sign("complete", repository.id, oid, lifetime=lifetime)
        actions["upload"] = {"href": f"{ctx.base_url}/lfs/complete/{signed}", "header": header}
    else:
        signed, _ = ctx.hub.signer.sign("put", repository.id, oid, lifetime=lifetime)
        actions["upload"] = {"href": f"{ctx.base_url}/lfs/put/{signed}"}
    return {"oid": oid, "size": size, "authenticated": True, "actions": actions}


def _signed(ctx: Context, signed: str, purpose: str, count: int) -> list[str]:
    """The fields of a signed upload URL after its purpose."""
    fields = ctx.hub.signer.check(signed)
    if fields is None or fields[0] != purpose or len(fields) != count + 1:
        raise ForbiddenError("This upload link has expired or is not valid")
    return fields[1:]


async def _receive(request: Request, receiver: Receiver) -> None:
    """Write a request body to disk as it comes in."""
    try:
        async for block in request.stream():
            await run_in_threadpool(receiver.write, block)
    except BaseException:
        receiver.discard()
        raise


@router.put("/lfs/put/{signed:seg}")
async def put(ctx: Ctx, signed: str, request: Request) -> Response:
    """A whole file."""
    repository_id, oid = _signed(ctx, signed, "put", 2)
    receiver = ctx.hub.large.receive()
    await _receive(request, receiver)
    await run_in_threadpool(_keep, ctx, repository_id, oid, receiver)
    return Response(status_code=200, headers={"ETag": f'"{oid}"'})


def _keep(ctx: Context, repository_id: str, oid: str, receiver: Receiver) -> None:
    if not ctx.hub.large.accept(receiver, oid):
        raise BadRequestError(f"Content has SHA-256 {receiver.sha256}, expected {oid}")
    repository = ctx.hub.repositories.by_id(repository_id)
    if repository is None:
        raise NotFoundError("The repository was deleted during the upload")
    ctx.hub.repositories.link_large_files(repository, [oid])


@router.put("/lfs/part/{signed:seg}")
async def put_part(ctx: Ctx, signed: str, request: Request) -> Response:
    """One part of a file; its ETag goes into the completion."""
    repository_id, oid, number = _signed(ctx, signed, "part", 3)
    receiver = ctx.hub.large.receive()
    await _receive(request, receiver)
    receiver.finish()
    receiver.path.rename(ctx.hub.large.part_path(repository_id, oid, int(number), receiver.sha256))
    return Response(status_code=200, headers={"ETag": f'"{receiver.sha256}"'})


@router.post("/lfs/complete/{signed:seg}")
def complete(ctx: Ctx, signed: str, body: JsonBody) -> Response:
    """Put the parts together."""
    repository_id, oid = _signed(ctx, signed, "complete", 2)
    try:
        parts = sorted((int(part["partNumber"]), str(part["etag"]).strip('"')) for part in body["parts"])
    except (KeyError, TypeError, ValueError) as error:
        raise BadRequestError(f"Malformed completion: {error!r}") from error
    if [number for number, _ in parts] != list(range(1, len(parts) + 1)):
        raise BadRequestError("The numbers of the parts are not 1, 2, 3 and so on")
    paths = [ctx.hub.large.part_path(repository_id, oid, number, check_hash(etag)) for number, etag in parts]
    receiver = ctx.hub.large.receive()
    try:
        _join(paths, receiver)
    except FileNotFoundError as error:
        receiver.discard()
        if _kept(ctx, repository_id, oid):  # asked twice: the parts went into the file the first time
            return Response(status_code=200)
        missing = sum(not path.exists() for path in paths)
        raise BadRequestError(f"{missing} of {len(parts)} parts are missing") from error
    except BaseException:
        receiver.discard()
        raise
    _keep(ctx, repository_id, oid, receiver)
    for path in paths:
        path.unlink(missing_ok=True)
    return Response(status_code=200)


def _join(paths: Sequence[Path], receiver: Receiver) -> None:
    """Raises FileNotFoundError when a part never came, or another completion has used it up."""
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1024 * 1024):
                receiver.write(block)


def _kept(ctx: Context, repository_id: str, oid: str) -> bool:
    """Whether the repository has the file already."""
    repository = ctx.hub.repositories.by_id(repository_id)
    return repository is not None and ctx.hub.repositories.has_large_file(repository, oid)


@router.post("/lfs/verify/{signed:seg}")
def verify(ctx: Ctx, signed: str, body: JsonBody) -> Response:
    """The client's question whether the upload arrived."""
    _repository, oid = _signed(ctx, signed, "verify", 2)
    size = ctx.hub.large.size(oid)
    if size is None:
        raise NotFoundError("Object does not exist")
    if body.get("oid") != oid or body.get("size") != size:
        raise BadRequestError(f"Object {oid} has {size} bytes")
    return JSONResponse({})
