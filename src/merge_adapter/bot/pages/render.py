"""Templates, and the headers that keep a page harmless whatever strangers named their repositories."""

from __future__ import annotations

import hashlib
import time
from functools import cache
from importlib.resources import files
from typing import Any

from fastapi.responses import HTMLResponse
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from merge_adapter import __version__
from merge_adapter.report.charts import STYLE
from merge_adapter.sizes import human_bytes

HTMX = "htmx-4.0.1.min.js"
_STATIC = {
    HTMX: "text/javascript; charset=utf-8",
    "app.css": "text/css; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'self' https://huggingface.co https://*.huggingface.co"
)
HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
    "Cross-Origin-Opener-Policy": "same-origin-allow-popups",
    "Cache-Control": "no-store",
}


@cache
def static_file(name: str) -> tuple[bytes, str] | None:
    """Content and type of a file that is served; None for any other name."""
    kind = _STATIC.get(name)
    if kind is None:
        return None
    content = (files("merge_adapter.bot") / "static" / name).read_bytes()
    return (content + STYLE.encode() if name == "app.css" else content), kind


@cache
def static_url(name: str) -> str:
    """The address of a static file, which changes with its content, so that it can be kept for ever."""
    found = static_file(name)
    assert found is not None, name
    return f"/static/{name}?{hashlib.sha256(found[0]).hexdigest()[:12]}"


def ago(moment: float | None) -> str:
    """How long ago a moment was, for people: the larger unit alone tells enough."""
    if moment is None:
        return ""
    seconds = max(0.0, time.time() - moment)
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds // size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


def clock(moment: float | None) -> str:
    """A moment in UTC, as <time> wants it."""
    return "" if moment is None else time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(moment))


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("merge_adapter.bot.pages"),
        autoescape=select_autoescape(default=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"bytes": human_bytes, "ago": ago, "clock": clock}
    environment.globals |= {"static": static_url, "htmx": HTMX, "version": __version__, "markup": Markup}
    return environment


def page(
    template: str, *, status: int = 200, headers: dict[str, str] | None = None, **values: Any
) -> HTMLResponse:
    """A rendered template with the headers of every page."""
    text = _environment().get_template(template).render(**values)
    return HTMLResponse(text, status_code=status, headers={**HEADERS, **(headers or {})})
