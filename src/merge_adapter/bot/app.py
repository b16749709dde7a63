"""The HTTP side: `POST /webhook`, `/health`, `/metrics`, and the pages where they are wanted."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from merge_adapter import __version__
from merge_adapter.bot.events import Ignored, read_payload
from merge_adapter.bot.inbox import Inbox, Known
from merge_adapter.bot.jobs import JobState
from merge_adapter.bot.logs import log
from merge_adapter.bot.metrics import Metrics
from merge_adapter.bot.queue import Queue
from merge_adapter.bot.rows import count_jobs
from merge_adapter.bot.settings import BotSettings
from merge_adapter.bot.vault import Vault
from merge_adapter.errors import MalformedError, StorageError

SECRET_HEADER = "X-Webhook-Secret"  # noqa: S105  # the name of a header


@dataclass(frozen=True)
class Parts:
    """What the routes work with."""

    settings: BotSettings
    queue: Queue
    inbox: Inbox
    vault: Vault
    metrics: Metrics = field(default_factory=Metrics)
    wake: Callable[[], None] = lambda: None
    """Tells the look-up that an event came."""
    workers_alive: Callable[[], int] = lambda: 0
    intake_alive: Callable[[], bool] = lambda: True


class BodyTooLargeError(Exception):
    """The request's body is longer than is read."""


def make_app(parts: Parts) -> FastAPI:
    """The application. Its own docs are off: the routes are for the Hub and for browsers."""
    app = FastAPI(title="merge-adapter", version=__version__, docs_url=None, redoc_url=None, openapi_url=None)

    @app.post("/webhook")
    async def webhook(request: Request) -> JSONResponse:
        begun = time.perf_counter()
        outcome, answer = await _receive(request, parts)
        parts.metrics.answered(outcome, time.perf_counter() - begun)
        return answer

    @app.get("/health")
    def health() -> JSONResponse:
        return _health(parts)

    @app.get("/metrics")
    def metrics() -> Response:
        try:
            text = parts.metrics.text(parts.inbox, workers=parts.workers_alive())
        except StorageError as error:
            return PlainTextResponse(f"{error.message}\n", status_code=503)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    if parts.settings.pages:
        from merge_adapter.bot.pages.routes import add_pages

        add_pages(app, parts)
    app.add_middleware(HeadAsGet)
    return app


class HeadAsGet:
    """HEAD is answered as GET is, without the body, which the server leaves out: monitors and proxies ask so."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        head = scope.get("method") == "HEAD"
        await self._app({**scope, "method": "GET"} if head else scope, receive, send)


async def read_body(request: Request, limit: int) -> bytes:
    """The body of a request, never more than `limit` bytes of it. Raises BodyTooLargeError."""
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limit:
        raise BodyTooLargeError
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise BodyTooLargeError
    return bytes(body)


async def _receive(request: Request, parts: Parts) -> tuple[str, JSONResponse]:
    """The word for the metrics, and the answer to a webhook. What is accepted is on the disk by then."""
    expected, given = parts.settings.webhook_secret, request.headers.get(SECRET_HEADER, "")
    if not expected:
        return "refused", _answer(503, error="no webhook secret is configured; set webhook_secret")
    if not hmac.compare_digest(given.encode(), expected.encode()):
        return "refused", _answer(401, error=f"the header {SECRET_HEADER} is missing or wrong")
    try:
        event = read_payload(await read_body(request, parts.settings.max_body), parts.settings)
    except BodyTooLargeError:
        return "refused", _answer(413, error=f"the body has more than {parts.settings.max_body} bytes")
    except MalformedError as error:
        return "refused", _answer(400, error=error.message)
    if isinstance(event, Ignored):
        return "ignored", _answer(200, accepted=False, reason=event.reason)
    try:
        stored = await asyncio.wrap_future(parts.inbox.put(event))
    except StorageError as error:
        log("event-lost", key=event.key, error=error.message)
        return "failed", _answer(503, error="the event could not be stored; deliver it again")
    if isinstance(stored, Known):
        return "duplicate", _answer(200, accepted=False, reason="this event was delivered before")
    parts.wake()
    return "accepted", _answer(202, accepted=True, event=stored.event_id)


def _answer(status: int, **content: object) -> JSONResponse:
    return JSONResponse(content, status_code=status)


def _health(parts: Parts) -> JSONResponse:
    """200 while jobs are taken in and carried out, 503 with what is wrong otherwise."""
    problems = []
    facts: dict[str, object] = {"version": __version__, "workers": parts.workers_alive()}
    try:
        parts.queue.store.check()
        counts = count_jobs(parts.queue.store)
        facts |= {
            "queued": counts.get(JobState.QUEUED, 0),
            "running": counts.get(JobState.RUNNING, 0),
            "events": parts.inbox.waiting(),
        }
    except StorageError as error:
        problems.append(error.message)
    if parts.settings.workers and not parts.workers_alive():
        problems.append("no worker process is alive")
    if not parts.intake_alive():
        problems.append("the look-up of events ended")
    return JSONResponse(
        {"status": "failing" if problems else "ok", "problems": problems, **facts},
        status_code=503 if problems else 200,
    )
