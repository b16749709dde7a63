"""What the bot tells people: in discussions, where names and messages of strangers are escaped, and on its page."""

from __future__ import annotations

from merge_adapter.bot.jobs import Job, JobKind, JobRequest, JobState
from merge_adapter.errors import MergeAdapterError
from merge_adapter.report.evidence import escape

_ENDED = {
    JobState.DONE: "is done",
    JobState.REJECTED: "was merged, but the merged model did not pass the equivalence gate",
    JobState.REFUSED: "was refused",
    JobState.FAILED: "failed",
    JobState.CANCELLED: "was cancelled",
}


THE_BOTS = "the bot's token"
_TOKENS = ("the token in HF_TOKEN", "the token that was passed")
"""How the command line and the Hub's client call a token."""


def of_whom(text: str, whose: str) -> str:
    """A message for somebody who set no variable and passed no token: it tells whose token it was."""
    for one in _TOKENS:
        text = text.replace(one, whose)
    return text


def marker_of(key: str) -> str:
    """An invisible line by which the bot finds its own answer again. `key` is one of its own ids."""
    return f"<!-- merge-adapter-answer {key} -->"


def accepted_text(job_id: str, request: JobRequest, public_url: str, *, known: bool) -> str:
    """The answer to a command that started a job, or that one open job already carries out."""
    what = "merge" if request.kind is JobKind.MERGE else "verification"
    queued = "is on its way already" if known else "is queued"
    return f"The {what} of `{request.revision[:12]}` {queued} as {_job(job_id, public_url)}."


def refused_text(error: MergeAdapterError, author: str) -> str:
    """The answer to a command that starts nothing."""
    message, hint = (of_whom(text, THE_BOTS) for text in (error.message, error.hint))
    return f"@{escape(author)}: {escape(message)}. {escape(hint)}".rstrip()


def ended_text(job: Job, public_url: str) -> str:
    """The answer when a job has ended: verdict, where it is, or why not."""
    what = "merge" if job.request.kind is JobKind.MERGE else "verification"
    lines = [f"The {what} of `{job.request.revision[:12]}` {_ENDED[job.state]} ({_job(job.id, public_url)})."]
    if job.verdict:
        lines.append(f"Verdict: **{escape(job.verdict)}**.")
    if job.publication is not None:
        url = str(job.publication.get("url", ""))
        if url.startswith(("https://", "http://")) and not set(url) & set(" <>()[]\"'`"):
            lines.append(f"Published at {url} ({escape(str(job.publication.get('operation', '')))}).")
    if job.state is not JobState.DONE:
        lines += [escape(of_whom(text, THE_BOTS)) for text in (job.message, job.hint) if text]
    return "\n\n".join(lines)


def _job(job_id: str, public_url: str) -> str:
    return f"[job {job_id}]({public_url.rstrip('/')}/jobs/{job_id})" if public_url else f"job {job_id}"
