"""Collections."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from localhub.api import present
from localhub.api.access import Context, Ctx, JsonBody, text
from localhub.api.repos import page
from localhub.errors import BadRequestError, ForbiddenError, NotFoundError
from localhub.shelves import Collection, Item

router = APIRouter(prefix="/api/collections")


def _shown(ctx: Context, collection: Collection) -> dict[str, Any]:
    return {
        "slug": collection.slug,
        "title": collection.title,
        "description": collection.description,
        "owner": present.account(ctx.hub.accounts.get(collection.owner)),
        "items": [shown for item in collection.items if (shown := _item(ctx, item))],
        "lastUpdated": collection.updated_at,
        "private": collection.private,
        "theme": collection.theme,
        "upvotes": 0,
    }


def _item(ctx: Context, item: Item) -> dict[str, Any] | None:
    """An item as far as the caller may see it."""
    shown: dict[str, Any] = {"_id": item.id, "id": item.item, "type": item.type, "position": item.position}
    if item.note:
        shown["note"] = {"text": item.note, "html": ""}
    if item.type in ("model", "dataset", "space"):
        owner, _, name = item.item.partition("/")
        repository = ctx.hub.repositories.find(item.type, owner, name)
        if repository is None or not ctx.hub.repositories.may_see(repository, ctx.identity):
            return None
        shown |= {"author": repository.owner, "private": repository.private, "repoType": repository.type}
    return shown


def _mine(ctx: Context, namespace: str) -> None:
    if not ctx.hub.repositories.may_administer_namespace(namespace, ctx.login()):
        raise ForbiddenError(f"You don't have the rights to change collections of {namespace!r}")


def _visible(ctx: Context, slug: str) -> Collection:
    collection = ctx.hub.shelves.get(slug)
    if collection.private:
        identity = ctx.identity
        if identity is None or not ctx.hub.repositories.may_administer_namespace(collection.owner, identity):
            raise NotFoundError("Collection not found")
    return collection


def _writable(ctx: Context, slug: str) -> Collection:
    collection = _visible(ctx, slug)
    _mine(ctx, collection.owner)
    return collection


@router.get("")
def listing(ctx: Ctx, request: Request) -> Response:
    query = request.query_params
    owners = {owner.lower() for owner in query.getlist("owner")}
    wanted = {item.partition("/")[2] for item in query.getlist("item")}
    found = []
    for collection in ctx.hub.shelves.all():
        try:
            _visible(ctx, collection.slug)
        except NotFoundError:
            continue
        if owners and collection.owner.lower() not in owners:
            continue
        if wanted and wanted.isdisjoint(item.item for item in collection.items):
            continue
        found.append(_shown(ctx, collection))
    return page(request, ctx.base_url, found, default=100)


@router.post("")
def create(ctx: Ctx, body: JsonBody) -> dict[str, Any]:
    owner = text(body, "namespace")
    _mine(ctx, owner)
    owner = ctx.hub.accounts.get(owner).name
    description = body.get("description")
    collection = ctx.hub.shelves.create(
        owner, text(body, "title"), description, private=bool(body.get("private"))
    )
    return {**_shown(ctx, collection), "position": collection.position}


@router.get("/{owner:seg}/{slug:seg}")
def get(ctx: Ctx, owner: str, slug: str) -> dict[str, Any]:
    collection = _visible(ctx, f"{owner}/{slug}")
    return {**_shown(ctx, collection), "position": collection.position}


@router.patch("/{owner:seg}/{slug:seg}")
def update(ctx: Ctx, owner: str, slug: str, body: JsonBody) -> dict[str, Any]:
    collection = ctx.hub.shelves.update(_writable(ctx, f"{owner}/{slug}").slug, **body)
    return {"data": {**_shown(ctx, collection), "position": collection.position}}


@router.delete("/{owner:seg}/{slug:seg}")
def delete(ctx: Ctx, owner: str, slug: str) -> Response:
    ctx.hub.shelves.delete(_writable(ctx, f"{owner}/{slug}").slug)
    return Response(status_code=200)


@router.post("/{owner:seg}/{slug:seg}/items")
def add(ctx: Ctx, owner: str, slug: str, body: JsonBody) -> dict[str, Any]:
    collection = _writable(ctx, f"{owner}/{slug}")
    item = body.get("item") or {}
    kind, name = text(item, "type"), text(item, "id")
    if kind not in ("model", "dataset", "space", "paper", "collection"):
        raise BadRequestError(f"Unknown item type {kind!r}")
    if kind in ("model", "dataset", "space"):
        ctx.readable(kind, *(name.partition("/")[::2]))
    collection = ctx.hub.shelves.add(collection.slug, kind, name, body.get("note"))
    return {**_shown(ctx, collection), "position": collection.position}


@router.patch("/{owner:seg}/{slug:seg}/items/{id:seg}")
def change(ctx: Ctx, owner: str, slug: str, id: str, body: JsonBody) -> dict[str, Any]:
    collection = _writable(ctx, f"{owner}/{slug}")
    ctx.hub.shelves.change_item(collection.slug, id, body.get("note"), body.get("position"))
    return {"success": True}


@router.delete("/{owner:seg}/{slug:seg}/items/{id:seg}")
def remove(ctx: Ctx, owner: str, slug: str, id: str) -> dict[str, Any]:
    ctx.hub.shelves.remove(_writable(ctx, f"{owner}/{slug}").slug, id)
    return {"success": True}
