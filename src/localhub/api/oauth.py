"""The token endpoint (CI exchange and login), and the pages and documents of the login."""

from __future__ import annotations

import base64
import json
import time
from typing import Any
from urllib.parse import parse_qs, urlencode

from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse

from localhub.accounts import TokenRole
from localhub.api.access import Context, Ctx, RawBody
from localhub.errors import BadRequestError, InvalidCredentialsError
from localhub.oidc import CODE_SECONDS, Client, Grant, OAuthError, user_claims
from localhub.pages.render import render

router = APIRouter()

EXCHANGE = "urn:ietf:params:oauth:grant-type:token-exchange"
ID_TOKEN = "urn:ietf:params:oauth:token-type:id_token"  # noqa: S105 - the name of a type
EXCHANGED_SECONDS = 3600
LOGIN_SECONDS = 8 * 3600
_NO_STORE = {"Cache-Control": "no-store"}


def read_form(request: Request, raw: bytes) -> dict[str, str]:
    """The fields of a form or JSON body."""
    if "json" in request.headers.get("content-type", ""):
        try:
            body = json.loads(raw)
        except ValueError as error:
            raise OAuthError("invalid_request", "Body is not JSON") from error
        return {key: value for key, value in body.items() if isinstance(value, str)}
    fields = parse_qs(raw.decode("utf-8", "replace"), max_num_fields=50)
    return {key: values[0] for key, values in fields.items()}


def _required(form: dict[str, str], key: str) -> str:
    if not form.get(key):
        raise OAuthError("invalid_request", f"{key} is required")
    return form[key]


@router.post("/oauth/token")
def token(ctx: Ctx, request: Request, raw: RawBody) -> JSONResponse:
    form = read_form(request, raw)
    kind = _required(form, "grant_type")
    if kind == EXCHANGE:
        return _exchange(ctx, form)
    if kind == "authorization_code":
        return _redeem(ctx, request, form)
    raise OAuthError("unsupported_grant_type", f"Unknown grant_type {kind!r}")


def _exchange(ctx: Context, form: dict[str, str]) -> JSONResponse:
    """A CI's id token for a token that writes to one repository (RFC 8693)."""
    if _required(form, "subject_token_type") != ID_TOKEN:
        raise OAuthError("invalid_request", f"subject_token_type must be {ID_TOKEN}")
    resource = _required(form, "resource").removeprefix("models/")
    publisher = ctx.hub.publishers.match(_required(form, "subject_token"), resource, ctx.base_url)
    user = ctx.hub.accounts.get(publisher.user).name
    if "/" in resource:
        scoped = resource if resource.count("/") == 2 else f"models/{resource}"
        made = ctx.hub.accounts.issue_token(
            user, role=TokenRole.REPOSITORY, resource=scoped, lifetime=EXCHANGED_SECONDS
        )
    else:
        made = ctx.hub.accounts.issue_token(user, role=TokenRole.GATED, lifetime=EXCHANGED_SECONDS)
    return JSONResponse(
        {
            "access_token": made,
            "issued_token_type": "urn:ietf:params:oauth:token-type:access_token",
            "token_type": "bearer",
            "expires_in": EXCHANGED_SECONDS,
        },
        headers=_NO_STORE,
    )


def _redeem(ctx: Context, request: Request, form: dict[str, str]) -> JSONResponse:
    """An authorization code for an access token and an id token."""
    client_id, secret = _client_credentials(request, form)
    grant = ctx.hub.provider.redeem(
        _required(form, "code"),
        client_id=client_id,
        secret=secret,
        redirect_uri=_required(form, "redirect_uri"),
        verifier=form.get("code_verifier"),
    )
    user = ctx.hub.accounts.get(grant.user)
    answer: dict[str, Any] = {
        "access_token": ctx.hub.accounts.issue_token(user.name, role=TokenRole.OAUTH, lifetime=LOGIN_SECONDS),
        "token_type": "bearer",
        "expires_in": LOGIN_SECONDS,
        "scope": grant.scope,
    }
    if "openid" in grant.scope.split():
        answer["id_token"] = ctx.hub.provider.id_token(grant, user, ctx.base_url)
    return JSONResponse(answer, headers=_NO_STORE)


def _client_credentials(request: Request, form: dict[str, str]) -> tuple[str, str | None]:
    """Client id and secret, from a Basic header or the form."""
    header = request.headers.get("authorization", "")
    if header.startswith("Basic "):
        try:
            id, _, secret = base64.b64decode(header[6:]).decode().partition(":")
        except ValueError as error:
            raise OAuthError("invalid_client", "Malformed Authorization header", status=401) from error
        return id, secret
    return _required(form, "client_id"), form.get("client_secret")


@router.get("/.well-known/openid-configuration")
def discovery(ctx: Ctx) -> dict[str, Any]:
    base = ctx.base_url
    return {
        "issuer": base,
        "authorization_endpoint": f"{base}/oauth/authorize",
        "token_endpoint": f"{base}/oauth/token",
        "userinfo_endpoint": f"{base}/oauth/userinfo",
        "jwks_uri": f"{base}/oauth/jwks",
        "scopes_supported": ["openid", "profile", "email", "read-repos", "write-repos", "manage-repos"],
        "response_types_supported": ["code"],
        "grant_types_supported": ["authorization_code", EXCHANGE],
        "subject_types_supported": ["public"],
        "id_token_signing_alg_values_supported": ["RS256"],
        "token_endpoint_auth_methods_supported": ["client_secret_basic", "client_secret_post", "none"],
        "code_challenge_methods_supported": ["S256"],
    }


@router.get("/oauth/jwks")
def jwks(ctx: Ctx) -> dict[str, Any]:
    return ctx.hub.provider.jwks()


@router.get("/oauth/userinfo")
def userinfo(ctx: Ctx) -> dict[str, Any]:
    user = ctx.login().user
    organizations = [
        {
            "sub": one.id,
            "name": one.fullname,
            "preferred_username": one.name,
            "picture": "",
            "roleInOrg": role,
        }
        for one, role in ctx.hub.accounts.organizations(user.name)
    ]
    return {**user_claims(user, ctx.base_url), "orgs": organizations}


# ----------------------------------------------------------------------------------------------- the page


def _asked(ctx: Context, query: dict[str, str]) -> Client:
    """The client of an authorization request. Nothing is redirected before these checks."""
    client = ctx.hub.provider.client(query.get("client_id", ""))
    if query.get("redirect_uri") not in client.redirect_uris:
        raise OAuthError("invalid_request", "redirect_uri is not one that the client registered")
    return client


def _back(query: dict[str, str], **answer: str) -> RedirectResponse:
    """To the application, with the answer and its own `state`."""
    if query.get("state"):
        answer["state"] = query["state"]
    uri = query["redirect_uri"]
    return RedirectResponse(f"{uri}{'&' if '?' in uri else '?'}{urlencode(answer)}", status_code=303)


@router.get("/oauth/authorize")
def ask(ctx: Ctx, request: Request) -> Response:
    """The page on which a user signs in and agrees."""
    query = dict(request.query_params)
    client = _asked(ctx, query)
    if query.get("response_type") != "code":
        return _back(query, error="unsupported_response_type")
    if query.get("code_challenge") and query.get("code_challenge_method") != "S256":
        return _back(query, error="invalid_request", error_description="code_challenge_method must be S256")
    if client.secret is None and not query.get("code_challenge"):
        return _back(query, error="invalid_request", error_description="code_challenge is required")
    return _page(client, query, "")


def _page(client: Client, query: dict[str, str], problem: str, status: int = 200) -> HTMLResponse:
    # The redirect after the form must be allowed, or browsers stop it.
    policy = f"form-action 'self' {query['redirect_uri']}"
    return render("authorize.html", status=status, policy=policy, client=client, query=query, problem=problem)


@router.post("/oauth/authorize")
def agree(ctx: Ctx, request: Request, raw: RawBody) -> Response:
    """The answer of the user: a token of theirs, which stands for a password, and yes or no."""
    query = read_form(request, raw)
    client = _asked(ctx, query)
    origin = request.headers.get("origin")
    if origin not in (None, "null", ctx.base_url):
        raise BadRequestError("This form must be sent from the Hub's own page")
    if query.get("decision") != "allow":
        return _back(query, error="access_denied")
    try:
        identity = ctx.hub.accounts.identify(query.get("token", ""))
    except InvalidCredentialsError:
        return _page(client, query, "No user has this token.", 401)
    grant = Grant(
        client_id=client.id,
        user=identity.name,
        redirect_uri=query["redirect_uri"],
        scope=query.get("scope", "openid profile"),
        nonce=query.get("nonce"),
        challenge=query.get("code_challenge") or None,
        expires=time.time() + CODE_SECONDS,
    )
    return _back(query, code=ctx.hub.provider.issue_code(grant))
