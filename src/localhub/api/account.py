"""Users and organisations."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from localhub.accounts import Account, TokenRole
from localhub.api.access import Context, Ctx
from localhub.errors import NotFoundError

router = APIRouter()

_ROLES = {
    TokenRole.WRITE: "write",
    TokenRole.OAUTH: "write",
    TokenRole.READ: "read",
    TokenRole.REPOSITORY: "fineGrained",
    TokenRole.GATED: "fineGrained",
}


@router.get("/api/whoami-v2")
def whoami(ctx: Ctx) -> dict[str, Any]:
    identity = ctx.login()
    user = identity.user
    return {
        "type": "user",
        "id": user.id,
        "name": user.name,
        "fullname": user.fullname,
        "email": f"{user.name}@localhub.invalid",
        "emailVerified": True,
        "isPro": False,
        "canPay": False,
        "avatarUrl": "",
        "periodEnd": None,
        "orgs": [
            {
                "type": "org",
                "id": organization.id,
                "name": organization.name,
                "fullname": organization.fullname,
                "roleInOrg": role,
                "isEnterprise": False,
                "avatarUrl": "",
            }
            for organization, role in ctx.hub.accounts.organizations(user.name)
        ],
        "auth": {
            "type": "access_token",
            "accessToken": {
                "displayName": identity.token_name,
                "role": _ROLES[identity.role],
                "createdAt": user.created_at,
            },
        },
    }


def _overview(ctx: Context, account: Account) -> dict[str, Any]:
    mine = [
        repository
        for repository in ctx.hub.repositories.all()
        if repository.owner == account.name and ctx.hub.repositories.may_see(repository, ctx.identity)
    ]
    counts = {kind: sum(one.type == kind for one in mine) for kind in ("model", "dataset", "space")}
    return {
        "_id": account.id,
        "avatarUrl": "",
        "name": account.name,
        "fullname": account.fullname,
        "type": account.type,
        "isPro": False,
        "createdAt": account.created_at,
        "numModels": counts["model"],
        "numDatasets": counts["dataset"],
        "numSpaces": counts["space"],
    }


@router.get("/api/users/{name:seg}/overview")
def user(ctx: Ctx, name: str) -> dict[str, Any]:
    account = ctx.hub.accounts.get(name)
    if account.type != "user":
        raise NotFoundError(f"User {name} not found")
    organizations = [
        {"id": one.id, "name": one.name, "fullname": one.fullname, "avatarUrl": ""}
        for one, _ in ctx.hub.accounts.organizations(account.name)
    ]
    return {**_overview(ctx, account), "user": account.name, "orgs": organizations}


@router.get("/api/organizations/{name:seg}/overview")
def organization(ctx: Ctx, name: str) -> dict[str, Any]:
    account = ctx.hub.accounts.get(name)
    if account.type != "org":
        raise NotFoundError(f"Organization {name} not found")
    return {**_overview(ctx, account), "numUsers": len(ctx.hub.accounts.members(account.name))}


@router.get("/api/organizations/{name:seg}/members")
def members(ctx: Ctx, name: str) -> list[dict[str, Any]]:
    """The members; their roles are told to members only."""
    found = ctx.hub.accounts.members(ctx.hub.accounts.get(name).name)
    inside = ctx.identity is not None and any(one.name == ctx.identity.user.name for one, _ in found)
    return [
        {
            "_id": one.id,
            "user": one.name,
            "fullname": one.fullname,
            "avatarUrl": "",
            "type": "user",
            **({"role": role} if inside else {}),
        }
        for one, role in found
    ]
