"""Pages that do something: each needs a session, and a form that comes from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fastapi import Request, Response
from fastapi.responses import RedirectResponse

from merge_adapter.bot.app import Parts
from merge_adapter.bot.intake import pinned, too_many
from merge_adapter.bot.jobs import JobRequest, Source
from merge_adapter.bot.logs import log
from merge_adapter.bot.pages.forms import Wish, read_wish
from merge_adapter.bot.pages.login import Session, end_session, genuine, read_session
from merge_adapter.bot.pages.preview import plan_of
from merge_adapter.bot.pages.render import HEADERS, page
from merge_adapter.bot.rows import find_job
from merge_adapter.bot.sources import private_sources
from merge_adapter.bot.submission import OverLimit
from merge_adapter.errors import InputError, NotFoundError, PolicyError
from merge_adapter.hub import Hub
from merge_adapter.hub.catalogue import adapter_folders
from merge_adapter.hub.session import Patience

_PATIENCE = Patience(attempts=2, first_wait=0.5)


def plan(request: Request, form: Mapping[str, str], session: Session, parts: Parts) -> Response:
    """What the merge would do, and the button that starts it. `session` was checked."""
    wish = read_wish(form)
    found = plan_of(wish, _token(session, parts), parts.settings)
    error = found.get("error")
    if isinstance(error, dict):
        raise InputError(str(error.get("message", "")), hint=str(error.get("hint", "")))
    whole = not request.headers.get("HX-Request")
    return page(
        "plan_page.html" if whole else "plan.html",
        session=session,
        login_target="_self",
        plan=found,
        target=_target(found["adapter"], wish),
        form=form,
    )


def submit(request: Request, form: Mapping[str, str], parts: Parts) -> Response:
    """Queue the merge, with the user's own token, and go to its page."""
    session = checked(request, form, parts)
    submission = parts.queue.submit(
        _request(read_wish(form), session, parts), limit=parts.settings.jobs_per_user
    )
    if isinstance(submission, OverLimit):
        raise too_many(submission)
    log("submitted", job=submission.job_id, user=session.user)
    return _go(request, f"/jobs/{submission.job_id}")


def cancel(request: Request, form: Mapping[str, str], job_id: str, parts: Parts) -> Response:
    """Cancel a job."""
    session = checked(request, form, parts)
    found = find_job(parts.queue.store, job_id)
    if found is None or not session.viewer.may_see(found):
        raise NotFoundError(f"there is no job {job_id[:40]}")
    if not session.viewer.may_change(found):
        raise PolicyError("this job belongs to somebody else")
    parts.queue.cancel(found.id, reason=f"cancelled by {session.user}")
    log("cancelled", job=found.id, user=session.user)
    return _go(request, f"/jobs/{found.id}")


def logout(request: Request, form: Mapping[str, str], parts: Parts) -> Response:
    """End the session."""
    checked(request, form, parts)
    response = RedirectResponse("/", status_code=303, headers=HEADERS)
    end_session(request, response, parts)
    return response


def checked(request: Request, form: Mapping[str, str], parts: Parts) -> Session:
    """The session that a form comes from. Raises PolicyError for one that comes from elsewhere."""
    session = read_session(request, parts)
    if not session.user:
        raise PolicyError("you are not logged in, or no longer", hint="Log in, and send the form again.")
    if not genuine(request, session, form.get("csrf", ""), parts):
        raise PolicyError("this form does not come from this page", hint="Load the page again.")
    return session


def _target(adapter: Mapping[str, Any], wish: Wish) -> str:
    """Where the merge that was planned is offered."""
    folder = adapter.get("subfolder") or wish.subfolder
    return JobRequest(
        adapter["id"], adapter["revision"], Source.PAGE, subfolder=folder, options=wish.options
    ).target


def _token(session: Session, parts: Parts) -> str:
    assert session.token is not None
    return parts.vault.open(session.token)


def _request(wish: Wish, session: Session, parts: Parts) -> JobRequest:
    """The job, its adapter looked up as the user may see it."""
    observed = parts.queue.store.clock()
    hub = Hub(parts.settings.endpoint or None, _token(session, parts), patience=_PATIENCE)
    head = hub.open(wish.adapter, revision=wish.revision)
    folders = (wish.subfolder,) if wish.subfolder else adapter_folders(head.files)
    if len(folders) != 1:
        raise InputError(
            f"{head.repo_id} holds {len(folders) or 'no'} adapter{'s' if folders else ''}",
            hint="Name the folder that holds adapter_config.json.",
        )
    request = JobRequest(
        adapter=head.repo_id,
        revision=head.revision,
        source=Source.PAGE,
        ref=f"refs/heads/{wish.revision or 'main'}",
        subfolder=folders[0],
        options=pinned(wish.options, hub),
        requested_by=session.user,
        private=head.private,
        token=session.token,
        observed=observed,
    )
    return replace(request, private=head.private or bool(private_sources(request, hub)))


def _go(request: Request, place: str) -> Response:
    """To another page: htmx follows a header, a plain form a redirect."""
    if request.headers.get("HX-Request"):
        return Response(status_code=204, headers={**HEADERS, "HX-Redirect": place})
    return RedirectResponse(place, status_code=303, headers=HEADERS)
