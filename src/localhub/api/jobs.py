"""Jobs."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse

from localhub.accounts import Identity
from localhub.api.access import Context, Ctx, JsonBody
from localhub.api.repos import page
from localhub.errors import BadRequestError, ForbiddenError
from localhub.jobs import FINAL, Job

router = APIRouter(prefix="/api/jobs")

_POLL = 0.1
"""Seconds between two looks at a growing log."""
_KEEP_ALIVE = 30.0
_HARDWARE = (
    # name, pretty name, cpu, ram, accelerator, US dollars per minute
    ("cpu-basic", "CPU Basic", "2 vCPU", "16 GB", None, 0.0002),
    ("cpu-upgrade", "CPU Upgrade", "8 vCPU", "32 GB", None, 0.0005),
    ("cpu-xl", "CPU XL", "16 vCPU", "124 GB", None, 0.0167),
    ("t4-small", "Nvidia T4 - small", "4 vCPU", "15 GB", ("T4", 1, "16 GB"), 0.0067),
    ("l4x1", "1x Nvidia L4", "8 vCPU", "30 GB", ("L4", 1, "24 GB"), 0.0133),
    ("a10g-large", "Nvidia A10G - large", "12 vCPU", "46 GB", ("A10G", 1, "24 GB"), 0.025),
    ("a100-large", "Nvidia A100 - large", "12 vCPU", "142 GB", ("A100", 1, "80 GB"), 0.0417),
    ("h200", "Nvidia H200", "23 vCPU", "256 GB", ("H200", 1, "141 GB"), 0.0833),
)


def _may_run(ctx: Context, namespace: str) -> Identity:
    identity = ctx.login()
    if not ctx.hub.repositories.may_administer_namespace(namespace, identity):
        raise ForbiddenError(f"You don't have the rights to run jobs under the namespace {namespace!r}")
    return identity


def _moment(text: str | None) -> datetime:
    return datetime.fromisoformat(text) if text else datetime.now(UTC)


def _shown(ctx: Context, job: Job) -> dict[str, Any]:
    owner = ctx.hub.accounts.get(job.owner)
    started, ended = _moment(job.started_at), _moment(job.finished_at)
    created = _moment(job.created_at)
    durations = {"totalSecs": int((ended - created).total_seconds())}
    if job.started_at:
        durations["schedulingSecs"] = int((started - created).total_seconds())
        durations["runningSecs"] = int((ended - started).total_seconds())
    spec = job.spec
    return {
        "id": job.id,
        "createdAt": job.created_at,
        "startedAt": job.started_at,
        "finishedAt": job.finished_at,
        "dockerImage": spec.get("dockerImage"),
        "spaceId": spec.get("spaceId"),
        "command": spec["command"],
        "arguments": spec.get("arguments") or [],
        "environment": spec.get("environment") or {},
        # Names only: a secret leaves the Hub nowhere but into its job.
        "secrets": dict.fromkeys(spec.get("secrets") or {}, ""),
        "flavor": spec.get("flavor", "cpu-basic"),
        "labels": spec.get("labels"),
        "status": {"stage": job.stage.value, "message": job.message},
        "durations": durations,
        "owner": {"id": owner.id, "name": owner.name, "type": owner.type},
        "initiator": job.initiator,
        "retry": max(0, int(spec.get("attempts") or 1) - 1),
    }


@router.get("/hardware")
def hardware() -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "prettyName": pretty,
            "cpu": cpu,
            "ram": ram,
            "ephemeralStorage": "50 GB",
            "accelerator": None
            if accelerator is None
            else {
                "type": "gpu",
                "model": accelerator[0],
                "quantity": str(accelerator[1]),
                "vram": accelerator[2],
                "manufacturer": "Nvidia",
            },
            "unitCostMicroUSD": int(cost * 1_000_000),
            "unitCostUSD": cost,
            "unitLabel": "minute",
        }
        for name, pretty, cpu, ram, accelerator, cost in _HARDWARE
    ]


@router.post("/{namespace:seg}")
def create(ctx: Ctx, namespace: str, body: JsonBody) -> dict[str, Any]:
    identity = _may_run(ctx, namespace)
    flavors = {name for name, *_ in _HARDWARE}
    if body.get("flavor", "cpu-basic") not in flavors:
        raise BadRequestError(f"flavor must be one of {sorted(flavors)}, got {body['flavor']!r}")
    initiator = {"type": "user", "id": identity.user.id, "name": identity.name}
    return _shown(ctx, ctx.hub.jobs.create(ctx.hub.accounts.get(namespace).name, initiator, body))


@router.get("/{namespace:seg}")
def listing(ctx: Ctx, namespace: str, request: Request) -> Response:
    _may_run(ctx, namespace)
    stages = request.query_params.getlist("stage")
    labels = [label.partition("=")[::2] for label in request.query_params.getlist("label")]
    jobs = [
        _shown(ctx, job)
        for job in ctx.hub.jobs.of_owner(namespace)
        if (not stages or job.stage.value in stages)
        and all((job.spec.get("labels") or {}).get(key) == value for key, value in labels)
    ]
    return page(request, ctx.base_url, jobs, default=100)


@router.get("/{namespace:seg}/{id:seg}")
def get(ctx: Ctx, namespace: str, id: str) -> dict[str, Any]:
    _may_run(ctx, namespace)
    return _shown(ctx, ctx.hub.jobs.get(namespace, id))


@router.post("/{namespace:seg}/{id:seg}/cancel")
def cancel(ctx: Ctx, namespace: str, id: str) -> dict[str, Any]:
    _may_run(ctx, namespace)
    return _shown(ctx, ctx.hub.jobs.cancel(namespace, id))


@router.post("/{namespace:seg}/{id:seg}/duplicate")
def duplicate(ctx: Ctx, namespace: str, id: str) -> dict[str, Any]:
    _may_run(ctx, namespace)
    job = ctx.hub.jobs.get(namespace, id)
    return _shown(ctx, ctx.hub.jobs.create(job.owner, {"type": "duplicated-job", "id": job.id}, job.spec))


@router.put("/{namespace:seg}/{id:seg}/labels")
def set_labels(ctx: Ctx, namespace: str, id: str, body: JsonBody) -> dict[str, Any]:
    _may_run(ctx, namespace)
    labels = body.get("labels")
    if not isinstance(labels, dict):
        raise BadRequestError("labels must be an object")
    return _shown(ctx, ctx.hub.jobs.set_labels(namespace, id, labels))


@router.get("/{namespace:seg}/{id:seg}/logs")
def logs(ctx: Ctx, namespace: str, id: str, request: Request) -> StreamingResponse:
    """Server-sent events, one per line of output, until the job has ended."""
    _may_run(ctx, namespace)
    job = ctx.hub.jobs.get(namespace, id)
    tail = request.query_params.get("tail")
    if tail is not None and not tail.isdecimal():
        raise BadRequestError("tail must be a number of lines")
    stream = _follow(ctx, job, int(tail) if tail else None)
    return StreamingResponse(stream, media_type="text/event-stream")


async def _follow(ctx: Context, job: Job, tail: int | None) -> AsyncIterator[str]:
    path = ctx.hub.jobs.log_path(job.id)
    offset, quiet = 0, 0.0
    while True:
        # Asked before reading: what was written until then is in the file.
        ended = ctx.hub.jobs.get(job.owner, job.id).stage in FINAL
        if path.exists():
            with path.open() as log:
                log.seek(offset)
                lines = [line for line in log.read().splitlines(keepends=True) if line.endswith("\n")]
            offset += sum(len(line.encode()) for line in lines)
            for line in lines[-tail:] if tail else lines:
                yield f"data: {json.dumps(json.loads(line))}\n\n"
            tail, quiet = None, 0.0 if lines else quiet
        if ended:
            return
        await asyncio.sleep(_POLL)
        quiet += _POLL
        if quiet >= _KEEP_ALIVE:
            yield ": keep-alive\n\n"
            quiet = 0.0
