"""Webhooks of a user: create, change, enable, test, look at deliveries."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Response

from localhub.accounts import Identity, TokenRole
from localhub.api.access import Context, Ctx, JsonBody
from localhub.errors import BadRequestError, ForbiddenError, NotFoundError
from localhub.webhooks import DOMAINS, Webhook

router = APIRouter(prefix="/api/settings/webhooks")


def _user(ctx: Context) -> Identity:
    identity = ctx.login()
    if identity.role not in (TokenRole.WRITE, TokenRole.OAUTH):
        raise ForbiddenError("Forbidden: this token cannot manage webhooks")
    return identity


def _shown(hook: Webhook) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "id": hook.id,
        "watched": [{"type": kind, "name": name} for kind, name in hook.watched],
        "domains": sorted(hook.domains),
        "disabled": hook.disabled,
        "url": hook.url,
        "secret": hook.secret,
    }
    if hook.job is not None:
        # What the job gets as secrets stays here.
        shown["job"] = {key: value for key, value in hook.job.items() if key != "secrets"}
    return shown


def _watched(body: dict[str, Any]) -> list[tuple[str, str]]:
    try:
        return [(str(item["type"]), str(item["name"])) for item in body.get("watched") or []]
    except (KeyError, TypeError) as error:
        raise BadRequestError("watched must be a list of {type, name}") from error


def _job(ctx: Context, identity: Identity, body: dict[str, Any]) -> dict[str, Any] | None:
    """The spec of the job a webhook is to start: that of an earlier job, without its secrets."""
    if not body.get("jobSourceId"):
        return None
    names = [identity.name, *(one.name for one, _ in ctx.hub.accounts.organizations(identity.name))]
    for name in names:
        for job in ctx.hub.jobs.of_owner(name):
            if job.id == body["jobSourceId"]:
                return {**job.spec, "secrets": body.get("secrets") or {}}
    raise NotFoundError(f"Job {body['jobSourceId']} not found")


@router.get("")
def listing(ctx: Ctx) -> list[dict[str, Any]]:
    return [_shown(hook) for hook in ctx.hub.webhooks.of_user(_user(ctx).name)]


@router.post("")
def create(ctx: Ctx, body: JsonBody) -> dict[str, Any]:
    identity = _user(ctx)
    hook = ctx.hub.webhooks.save(
        identity.name,
        url=body.get("url"),
        job=_job(ctx, identity, body),
        watched=_watched(body),
        domains=body.get("domains") or DOMAINS,
        secret=body.get("secret"),
    )
    return {"webhook": _shown(hook)}


@router.get("/{id:seg}")
def get(ctx: Ctx, id: str) -> dict[str, Any]:
    return {"webhook": _shown(ctx.hub.webhooks.get(_user(ctx).name, id))}


@router.post("/{id:seg}")
def update(ctx: Ctx, id: str, body: JsonBody) -> dict[str, Any]:
    """What the body leaves out stays."""
    identity = _user(ctx)
    job = _job(ctx, identity, body)
    with ctx.hub.database.writing():
        old = ctx.hub.webhooks.get(identity.name, id)
        hook = ctx.hub.webhooks.save(
            identity.name,
            id=id,
            url=body.get("url") or (None if job else old.url),
            job=job or (None if body.get("url") else old.job),
            watched=_watched(body) or old.watched,
            domains=body.get("domains") or old.domains,
            secret=body.get("secret", old.secret),
        )
    return {"webhook": _shown(hook)}


@router.post("/{id:seg}/enable")
def enable(ctx: Ctx, id: str) -> dict[str, Any]:
    return {"webhook": _shown(ctx.hub.webhooks.set_disabled(_user(ctx).name, id, disabled=False))}


@router.post("/{id:seg}/disable")
def disable(ctx: Ctx, id: str) -> dict[str, Any]:
    return {"webhook": _shown(ctx.hub.webhooks.set_disabled(_user(ctx).name, id, disabled=True))}


@router.delete("/{id:seg}")
def delete(ctx: Ctx, id: str) -> Response:
    ctx.hub.webhooks.delete(_user(ctx).name, id)
    return Response(status_code=200)


@router.post("/{id:seg}/test")
def test(ctx: Ctx, id: str) -> dict[str, Any]:
    """Send the event of the last commit to a watched repository once more."""
    hook = ctx.hub.webhooks.get(_user(ctx).name, id)
    for repository in ctx.hub.repositories.all():
        names = {
            (repository.type, repository.full_name),
            ("user", repository.owner),
            ("org", repository.owner),
        }
        if names.isdisjoint(hook.watched) or not ctx.hub.repositories.may_see(repository, ctx.identity):
            continue
        git = ctx.git(repository)
        head = git.commit(git.resolve("main"))
        refs = (("refs/heads/main", head.parents[0] if head.parents else None, head.sha),)
        payload = ctx.hub.webhooks.payload("update", "repo.content", ctx.subject(repository, refs=refs))
        ctx.hub.webhooks.queue(hook, payload)
        return {"success": True}
    raise NotFoundError("None of the watched repositories exists yet")


@router.get("/{id:seg}/deliveries")
def deliveries(ctx: Ctx, id: str) -> list[dict[str, Any]]:
    """What became of each delivery, newest first."""
    return ctx.hub.webhooks.deliveries(ctx.hub.webhooks.get(_user(ctx).name, id).id)
