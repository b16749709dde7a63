"""What a form sends, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import parse_qsl

from fastapi import Request

from merge_adapter.bot import choices
from merge_adapter.bot.app import Parts, read_body
from merge_adapter.bot.jobs import JobOptions
from merge_adapter.errors import InputError

_FIELDS = 40


@dataclass(frozen=True)
class Wish:
    """A merge as somebody asked for it in the form."""

    adapter: str
    revision: str | None
    subfolder: str
    options: JobOptions


async def read_form(request: Request, parts: Parts) -> dict[str, str]:
    """The fields of a form, each once. Raises InputError for anything else, BodyTooLargeError."""
    if not request.headers.get("content-type", "").startswith("application/x-www-form-urlencoded"):
        raise InputError("this address takes forms only")
    body = await read_body(request, min(parts.settings.max_body, 65_536))
    try:
        return dict(parse_qsl(body.decode(), keep_blank_values=True, max_num_fields=_FIELDS))
    except ValueError as error:
        raise InputError(f"the form cannot be read: {error}") from error


def read_wish(form: Mapping[str, str]) -> Wish:
    """The merge that the form asks for. Raises InputError naming what is wrong."""
    text = form.get("adapter", "").strip()
    for prefix in ("https://huggingface.co/", "https://hf.co/"):
        text = text.removeprefix(prefix)
    adapter, revision = choices.reference(text.rstrip("/"), what="adapter")
    options = choices.options_from({name: form.get(name, "") for name in choices.NAMES})
    return Wish(adapter, revision, choices.subfolder(form.get("subfolder", "").strip()), options)
