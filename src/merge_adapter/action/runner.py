"""What the runner tells a step, from GITHUB_* alone."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge_adapter.errors import InputError
from merge_adapter.github import API_URL

_EVENT_LIMIT = 32 << 20
"""Bytes of an event's payload; GitHub sends 25 MB at most."""


@dataclass(frozen=True)
class Runner:
    """One step of one job."""

    workspace: Path
    """The checked-out repository, or an empty folder."""
    event_name: str
    event: Mapping[str, Any]
    """The payload as GitHub sent it; the parts that people write are untrusted."""
    repository: str
    """owner/name of the repository whose workflow runs."""
    sha: str
    server_url: str
    api_url: str
    run_id: str
    run_attempt: str
    workflow: str
    job: str
    outputs: Path | None
    """None where there is no runner, as in `docker run`."""
    summary: Path | None

    @property
    def run_url(self) -> str:
        """The page of this workflow run."""
        return f"{self.server_url}/{self.repository}/actions/runs/{self.run_id}/attempts/{self.run_attempt}"


def read_runner(environment: Mapping[str, str] | None = None) -> Runner:
    """The step this process is. Raises InputError for a payload that cannot be read."""
    given = os.environ if environment is None else environment
    return Runner(
        workspace=Path(given.get("GITHUB_WORKSPACE") or Path.cwd()).resolve(),
        event_name=given.get("GITHUB_EVENT_NAME") or "workflow_dispatch",
        event=_event(given.get("GITHUB_EVENT_PATH", "")),
        repository=given.get("GITHUB_REPOSITORY", ""),
        sha=given.get("GITHUB_SHA", ""),
        server_url=given.get("GITHUB_SERVER_URL") or "https://github.com",
        api_url=given.get("GITHUB_API_URL") or API_URL,
        run_id=given.get("GITHUB_RUN_ID", ""),
        run_attempt=given.get("GITHUB_RUN_ATTEMPT") or "1",
        workflow=given.get("GITHUB_WORKFLOW", ""),
        job=given.get("GITHUB_JOB", ""),
        outputs=_file(given.get("GITHUB_OUTPUT", "")),
        summary=_file(given.get("GITHUB_STEP_SUMMARY", "")),
    )


def _file(text: str) -> Path | None:
    return Path(text) if text else None


def _event(text: str) -> Mapping[str, Any]:
    if not text:
        return {}
    path = Path(text)
    try:
        if path.stat().st_size > _EVENT_LIMIT:
            raise InputError(
                f"the event in {path} has {path.stat().st_size} bytes, at most {_EVENT_LIMIT} are read"
            )
        payload = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"the event in GITHUB_EVENT_PATH, {path}, cannot be read: {error}",
            hint="The runner writes this file; outside of GitHub leave GITHUB_EVENT_PATH unset.",
        ) from error
    if not isinstance(payload, dict):
        raise InputError(f"the event in {path} is a {type(payload).__name__}, expected a JSON object")
    return payload
