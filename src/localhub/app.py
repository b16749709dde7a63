"""The web application: routes, error answers, background threads."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from email.utils import formatdate

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from localhub import routing
from localhub.errors import RefusedError, RepoNotFoundError
from localhub.git import UNREADABLE
from localhub.hub import Hub

routing.register()

from localhub.api import (  # noqa: E402 - routes need the convertors registered above
    account,
    collections,
    commit,
    content,
    discussions,
    jobs,
    lfs,
    oauth,
    repos,
    resolve,
    validate,
    webhooks,
    xet,
)
from localhub.pages import routes as pages  # noqa: E402
from localhub.pages.render import render  # noqa: E402


def make_app(hub: Hub) -> FastAPI:
    """The application that serves one Hub."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        courier = hub.courier()
        courier.start()
        hub.jobs.resume()
        yield
        courier.stop()
        hub.jobs.stop()

    app = FastAPI(title="localhub", openapi_url=None, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.hub = hub
    app.router.redirect_slashes = False
    app.add_exception_handler(RefusedError, _refused)
    app.add_exception_handler(HTTPException, _http_error)
    app.middleware("http")(_common_headers)
    app.add_middleware(routing.KeepEncodedSlashes)
    for module in (account, collections, jobs, webhooks, oauth, validate, lfs, xet, content, commit):
        app.include_router(module.router)
    # Routes of two free segments (`/{owner}/{name}`) come last.
    for module in (discussions, repos, resolve, pages):
        app.include_router(module.router)
    return app


def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, RefusedError)
    # A HEAD answer has no body; the headers say it all.
    if request.method == "HEAD":
        return Response(status_code=error.status, headers=error.headers())
    if "text/html" in request.headers.get("accept", ""):
        return render("error.html", status=error.status, viewer=None, error=error)
    return JSONResponse(error.body, status_code=error.status, headers=error.headers())


def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse(
        {"error": error.detail},
        status_code=error.status_code,
        headers={"X-Error-Message": str(error.detail), **(error.headers or {})},
    )


async def _common_headers(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
    """The id that clients quote in error messages, and the exact time.

    Clients that read a log compare its timestamps with Date; uvicorn's own may be a second old.
    """
    try:
        response = await call_next(request)
    except UNREADABLE:
        repository = getattr(request.state, "reading", None)
        if repository is None or request.app.state.hub.git.path(repository).exists():
            raise
        # Deleted or moved while it was read.
        response = _refused(request, RepoNotFoundError(anonymous="authorization" not in request.headers))
    response.headers["Date"] = formatdate(usegmt=True)
    response.headers["X-Request-Id"] = request.headers.get("x-amzn-trace-id") or secrets.token_hex(8)
    return response
