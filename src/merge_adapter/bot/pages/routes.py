"""What each address of the page shows."""

from __future__ import annotations

from collections.abc import Mapping

from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import HTMLResponse, PlainTextResponse, RedirectResponse

from merge_adapter.bot.answers import of_whom
from merge_adapter.bot.app import BodyTooLargeError, Parts
from merge_adapter.bot.logs import log
from merge_adapter.bot.pages import actions, login, views
from merge_adapter.bot.pages.forms import read_form
from merge_adapter.bot.pages.preview import Turns
from merge_adapter.bot.pages.render import HEADERS, page, static_file
from merge_adapter.errors import MergeAdapterError, NotFoundError, PolicyError, RemoteError, StorageError
from merge_adapter.hub.oauth import authorize_url, finish_login, new_attempt

_FOR_EVER = {"Cache-Control": "public, max-age=31536000, immutable", "X-Content-Type-Options": "nosniff"}


def add_pages(app: FastAPI, parts: Parts) -> None:
    """Mount the pages. An error of ours becomes a page that says what to do."""
    _add_views(app, parts)
    _add_actions(app, parts)
    _add_login(app, parts)

    @app.exception_handler(MergeAdapterError)
    async def failed(request: Request, error: MergeAdapterError) -> HTMLResponse:
        return _error(request, parts, error.message, error.hint, _status_of(error))

    @app.exception_handler(BodyTooLargeError)
    async def too_large(request: Request, error: BodyTooLargeError) -> HTMLResponse:  # noqa: ARG001
        return _error(request, parts, "the form is too long", "", 413)

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> HTMLResponse:  # noqa: ARG001  # the server logs it
        return _error(request, parts, "merge-adapter has a bug", "The bot's log tells more.", 500)

    @app.exception_handler(404)
    async def missing(request: Request, error: Exception) -> HTMLResponse:  # noqa: ARG001
        return _error(request, parts, "there is no such page", "The jobs are listed on the first page.", 404)

    @app.exception_handler(405)
    async def no_page(request: Request, error: Exception) -> HTMLResponse:  # noqa: ARG001
        return _error(request, parts, "this address is not a page", "Begin at the first page.", 405)


def _add_views(app: FastAPI, parts: Parts) -> None:
    @app.get("/", response_class=HTMLResponse)
    def home(request: Request) -> HTMLResponse:
        return views.home(request, login.read_session(request, parts), parts)

    @app.get("/jobs", response_class=HTMLResponse)
    def jobs(request: Request) -> HTMLResponse:
        return views.jobs(request, login.read_session(request, parts), parts)

    @app.get("/jobs/{job_id}", response_class=HTMLResponse)
    def job(request: Request, job_id: str) -> HTMLResponse:
        return views.job(job_id, login.read_session(request, parts), parts)

    @app.get("/jobs/{job_id}/live", response_class=HTMLResponse)
    def live(request: Request, job_id: str) -> HTMLResponse:
        return views.live(job_id, login.read_session(request, parts), parts)

    @app.get("/jobs/{job_id}/log")
    def job_log(request: Request, job_id: str) -> Response:
        text = views.whole_log(job_id, login.read_session(request, parts), parts)
        return PlainTextResponse(text, headers=HEADERS)

    @app.get("/jobs/{job_id}/report")
    def report(request: Request, job_id: str) -> Response:
        return views.report_page(job_id, login.read_session(request, parts), parts)

    @app.get("/jobs/{job_id}/report.json")
    def report_json(request: Request, job_id: str) -> Response:
        return views.report_json(job_id, login.read_session(request, parts), parts)

    @app.get("/static/{name}")
    def static(name: str) -> Response:
        found = static_file(name)
        if found is None:
            raise NotFoundError("there is no such file")
        return Response(found[0], media_type=found[1], headers=_FOR_EVER)


def _add_actions(app: FastAPI, parts: Parts) -> None:
    turns = Turns()

    @app.post("/plan")
    async def plan(request: Request) -> Response:
        form = await read_form(request, parts)
        session = await run_in_threadpool(actions.checked, request, form, parts)
        async with turns.take(session.user):
            return await run_in_threadpool(actions.plan, request, form, session, parts)

    @app.post("/jobs")
    async def submit(request: Request) -> Response:
        form = await read_form(request, parts)
        return await run_in_threadpool(actions.submit, request, form, parts)

    @app.post("/jobs/{job_id}/cancel")
    async def cancel(request: Request, job_id: str) -> Response:
        form = await read_form(request, parts)
        return await run_in_threadpool(actions.cancel, request, form, job_id, parts)

    @app.post("/logout")
    async def logout(request: Request) -> Response:
        form = await read_form(request, parts)
        return await run_in_threadpool(actions.logout, request, form, parts)


def _add_login(app: FastAPI, parts: Parts) -> None:
    @app.get("/login")
    def begin(request: Request) -> Response:  # noqa: ARG001
        oauth = login.oauth_app(parts)
        if oauth is None:
            raise PolicyError("nobody can log in here", hint="The bot's owner has not set oauth_client_id.")
        attempt = new_attempt()
        response = RedirectResponse(authorize_url(oauth, attempt), status_code=303, headers=HEADERS)
        login.keep_attempt(response, attempt, parts)
        return response

    @app.get("/login/callback")
    def callback(request: Request, code: str = "", state: str = "") -> Response:
        oauth, attempt = login.oauth_app(parts), login.read_attempt(request, parts)
        if oauth is None or attempt is None or not code:
            raise PolicyError("the login did not come to an end", hint="Log in again.")
        done = finish_login(oauth, attempt, code=code, state=state)
        log("login", user=done.user)
        response = RedirectResponse("/", status_code=303, headers=HEADERS)
        response.delete_cookie(login.ATTEMPT, path="/")
        login.begin_session(response, done, parts)
        return response


_STATUS: Mapping[type[MergeAdapterError], int] = {
    NotFoundError: 404,
    PolicyError: 403,
    RemoteError: 502,
    StorageError: 503,
}


def _status_of(error: MergeAdapterError) -> int:
    """422, unless it is not what was asked for that is wrong."""
    return next((status for kind, status in _STATUS.items() if isinstance(error, kind)), 422)


def _error(request: Request, parts: Parts, message: str, hint: str, status: int) -> HTMLResponse:
    """A whole page, or for htmx only what goes where the answer was expected."""
    template = "problem.html" if request.headers.get("HX-Request") else "error.html"
    try:
        session = login.read_session(request, parts)
    except StorageError:  # it may be what the page is to say
        session = login.NOBODY
    message, hint = (of_whom(text, "your login") for text in (message, hint))
    return page(
        template,
        status=status,
        session=session,
        login_target=login.login_target(parts),
        message=message,
        hint=hint,
    )
