"""Pages that only show. What a viewer may not see does not exist for them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from fastapi import Request
from fastapi.responses import HTMLResponse, JSONResponse

from merge_adapter.bot.answers import THE_BOTS, of_whom
from merge_adapter.bot.app import Parts
from merge_adapter.bot.jobs import Job, JobKind, JobState, Source
from merge_adapter.bot.pages.login import Session, login_target
from merge_adapter.bot.pages.render import HEADERS, page
from merge_adapter.bot.rows import JobFilter, count_jobs, find_job, list_jobs
from merge_adapter.bot.runners.base import LOG_FILE, REPORT_FILE
from merge_adapter.errors import MalformedError, NotFoundError
from merge_adapter.report import document
from merge_adapter.report.charts import histogram_svg, tensors_svg
from merge_adapter.report.evidence import text_columns, verdict_rows
from merge_adapter.report.page import page as report_html
from merge_adapter.types import CombinationType, DType, QuantizedBase, Strategy

_PAGE = 25
_TEXTS = 3
"""Pieces of greedy text on a job's page; its report has them all."""
_LOG_LINES = 200
_LOG_BYTES = 200_000
_HUB = "https://huggingface.co"
_SHA = re.compile(r"(@[0-9a-f]{12})[0-9a-f]{28}$")


def common(session: Session, parts: Parts) -> dict[str, Any]:
    """What every whole page needs."""
    return {"session": session, "login_target": login_target(parts)}


def home(request: Request, session: Session, parts: Parts) -> HTMLResponse:
    """The form and the newest jobs."""
    recent = list_jobs(parts.queue.store, JobFilter(viewer=session.viewer), limit=8)
    return page(
        "home.html",
        **common(session, parts),
        jobs=recent,
        filtered=False,
        adapter=request.query_params.get("adapter", "")[:200],
        dtypes=[one.value for one in DType],
        strategies=[one.value for one in Strategy],
        combinations=[one.value for one in CombinationType],
        references=[one.value for one in QuantizedBase],
    )


def jobs(request: Request, session: Session, parts: Parts) -> HTMLResponse:
    """The list with filter and search; for htmx the list alone."""
    query = request.query_params
    state, text = query.get("state", ""), query.get("q", "")[:200]
    number = query.get("page", "1")[:9]
    at = min(int(number), 10_000) if number.isdecimal() and int(number) else 1
    states = (JobState(state),) if state in {one.value for one in JobState} else ()
    wanted = JobFilter(states, text, viewer=session.viewer)
    found = list_jobs(parts.queue.store, wanted, limit=_PAGE + 1, offset=(at - 1) * _PAGE)
    counts = count_jobs(parts.queue.store, JobFilter(text=text, viewer=session.viewer))

    def url(page_number: int) -> str:
        return "/jobs?" + urlencode({"state": state, "q": text, "page": page_number})

    partial = request.headers.get("HX-Request") and not request.headers.get("HX-History-Restore-Request")
    return page(
        "job_list.html" if partial else "jobs.html",
        **common(session, parts),
        jobs=found[:_PAGE],
        states=[(one.value, counts.get(one, 0)) for one in JobState],
        state=state,
        text=text,
        total=sum(counts.values()),
        filtered=bool(state or text),
        newer=url(at - 1) if at > 1 else "",
        older=url(at + 1) if len(found) > _PAGE else "",
    )


def job(job_id: str, session: Session, parts: Parts) -> HTMLResponse:
    """One job: its facts, and the part that moves."""
    return page("job.html", **common(session, parts), **_job_values(job_id, session, parts))


def live(job_id: str, session: Session, parts: Parts) -> HTMLResponse:
    """The part of a job's page that moves; once the job has ended it asks no more."""
    return page("job_live.html", **_job_values(job_id, session, parts))


def whole_log(job_id: str, session: Session, parts: Parts) -> str:
    """A job's log."""
    found = _visible(job_id, session, parts)
    path = parts.settings.job_folder(found.id) / LOG_FILE
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def report_page(job_id: str, session: Session, parts: Parts) -> HTMLResponse:
    """The report as its own page, under a policy that lets it do nothing."""
    report = _report(_visible(job_id, session, parts), parts)
    if report is None:
        raise NotFoundError("this job has no report")
    policy = "default-src 'none'; style-src 'unsafe-inline'; sandbox"
    return HTMLResponse(report_html(report), headers={**HEADERS, "Content-Security-Policy": policy})


def report_json(job_id: str, session: Session, parts: Parts) -> JSONResponse:
    """merge_report.json."""
    report = _report(_visible(job_id, session, parts), parts)
    if report is None:
        raise NotFoundError("this job has no report")
    return JSONResponse(report, headers=HEADERS)


def _visible(job_id: str, session: Session, parts: Parts) -> Job:
    found = find_job(parts.queue.store, job_id)
    if found is None or not session.viewer.may_see(found):
        hint = "" if session.user else "Log in, if it is yours."
        raise NotFoundError(f"there is no job {job_id[:40]}", hint=hint)
    return found


def _job_values(job_id: str, session: Session, parts: Parts) -> dict[str, Any]:
    found = _visible(job_id, session, parts)
    report = _report(found, parts)
    verification = report["verification"] if report else {}
    outputs = verification.get("outputs") or {}
    weights = verification.get("weights") or {}
    texts = ((verification.get("greedy") or {}).get("texts") or ())[:_TEXTS]
    stage = found.stage
    whose = "the login of who asked" if found.request.source is Source.PAGE else THE_BOTS
    share = None
    if stage is not None and stage.total:
        share = max(0.0, min(1.0, stage.done / stage.total))
    return {
        "job": found,
        "hub": parts.settings.endpoint or _HUB,
        "url": _safe_url(found),
        "chosen": _chosen(found),
        "message": of_whom(found.message, whose),
        "hint": of_whom(found.hint, whose),
        "may_cancel": found.open and found.cancel is None and session.viewer.may_change(found),
        "csrf": session.csrf,
        "share": share,
        "log": _log_end(parts.settings.job_folder(found.id) / LOG_FILE),
        "report": report,
        "rows": verdict_rows(verification) if report else (),
        "reasons": verification.get("reasons") or (),
        "histogram": histogram_svg(outputs.get("histogram") or {}, str(outputs.get("metric", ""))),
        "tensors": tensors_svg(weights.get("per_tensor") or ()),
        "texts": texts,
        "columns": text_columns(texts),
    }


def _chosen(found: Job) -> dict[str, str]:
    """The options of a job that differ from the default, for people."""
    options = json.loads(found.request.options.to_json())
    if "adapters" in options:  # pinned: twelve digits of a commit tell it
        options["adapters"] = [_SHA.sub(r"\1", reference) for reference in options["adapters"]]
    return {
        name.replace("_", " ").capitalize(): ", ".join(map(str, value))
        if isinstance(value, list)
        else str(value)
        for name, value in options.items()
        if name not in ("target_repo", "merged")
    }


def _safe_url(found: Job) -> str:
    """Where the result is, when that is a web address."""
    url = str((found.publication or {}).get("url", ""))
    return url if url.startswith(("https://", "http://")) else ""


def _report(found: Job, parts: Parts) -> dict[str, Any] | None:
    """The job's report; None when it has none that is one. A remote job's was fetched from a repository."""
    path = parts.settings.job_folder(found.id) / REPORT_FILE
    if found.open or not path.is_file():
        return None
    try:
        parsed = json.loads(path.read_text(encoding="utf-8"))
        sections = {k: v for k, v in parsed.items() if k != "publication"}
        judged = found.request.kind is JobKind.VERIFY
        (document.validate_judgement if judged else document.validate)(sections, place=found.id)
    except (ValueError, AttributeError, MalformedError):
        return None
    return dict(parsed)


def _log_end(path: Path) -> str:
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _LOG_BYTES))
        return "\n".join(file.read().decode("utf-8", errors="replace").splitlines()[-_LOG_LINES:])
