"""Jobs on GitHub Actions: the API is Prism with GitHub's own description, the step runs docs/examples/dispatch.yml's
action, and its artifact is zipped as that workflow says.
"""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import threading
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from merge_adapter.bot.jobs import Job, JobKind, JobOptions, JobRequest, JobState, Outcome, Source
from merge_adapter.bot.queue import Queue
from merge_adapter.bot.runners import artifact
from merge_adapter.bot.runners.base import REPORT_FILE, Interrupted, Watch
from merge_adapter.bot.settings import RunnerKind
from merge_adapter.bot.store import Store
from merge_adapter.bot.worker import runner_for
from merge_adapter.errors import GitHubError, InputError
from merge_adapter.types import DType

ROOT = Path(__file__).parents[2]
RUN = 8
"""Id of the run."""


@dataclass
class Workflow:
    """A repository with the example workflow. As on GitHub, a dispatch is answered before its run exists."""

    api: Any
    work: Callable[[dict[str, Any]], tuple[str, bytes | None]]
    """The run's work: from the payload, conclusion and artifact."""
    dispatches: list[dict[str, Any]] = field(default_factory=list)
    run: dict[str, Any] | None = None
    archive: bytes | None = None

    def __post_init__(self) -> None:
        runs = "/repos/ada/ci/actions/runs"
        self.api.answer("POST", "/repos/ada/ci/dispatches", 204)
        for method, path, answer in (
            ("POST", "/repos/ada/ci/dispatches", self._dispatch),
            ("GET", runs, lambda request: self._answer({"total_count": 1, "workflow_runs": self._runs()})),
            ("GET", f"{runs}/{RUN}", lambda request: self._answer(self.run)),
            ("GET", f"{runs}/{RUN}/artifacts", lambda request: self._answer(self._artifacts())),
            ("GET", "/storage/archive", lambda request: self._answer(self.archive)),
        ):
            self.api.answer_by(method, path, answer)
        signed = f"{self.api.url.replace('127.0.0.1', 'localhost')}/storage/archive"
        self.api.answer("GET", "/repos/ada/ci/actions/artifacts/5/zip", 302, None, Location=signed)

    def _answer(self, body: Any) -> Any:
        from github_api import Answer

        return Answer(200, body)

    def _dispatch(self, request: Any) -> Any:
        from github_api import Answer

        self.dispatches.append(request.body)
        threading.Thread(target=self._start, args=(request.body["client_payload"],)).start()
        return Answer(204)

    def _runs(self) -> list[Any]:
        return [] if self.run is None else [self.run]

    def _artifacts(self) -> dict[str, Any]:
        address = f"{self.api.url}/repos/ada/ci/actions/artifacts/5"
        facts = {"id": 5, "name": artifact.NAME, "expired": False, "archive_download_url": f"{address}/zip"}
        other = {**facts, "id": 9, "name": "logs"}
        return {"total_count": 2, "artifacts": [other] + [facts] * (self.archive is not None)}

    def _start(self, payload: dict[str, Any]) -> None:
        address = f"{self.api.url}/repos/ada/ci/actions/runs/{RUN}"
        run = {
            "id": RUN,
            "display_title": f"Merge {payload['adapter']} ({payload['job']})",
            "html_url": address,
            "url": address,
            "artifacts_url": f"{address}/artifacts",
            "created_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "status": "in_progress",
            "conclusion": None,
        }
        self.run = run
        conclusion, self.archive = self.work(payload)
        self.run = {**run, "status": "completed", "conclusion": conclusion}


@pytest.fixture
def example(act: Any, hub: Any, workspace: Path) -> Callable[[dict[str, Any]], tuple[str, bytes | None]]:
    """What docs/examples/dispatch.yml does for a payload: the action, its shell step, its upload."""
    workflow = yaml.safe_load((ROOT / "docs/examples/dispatch.yml").read_text(encoding="utf-8"))
    merge, keep, upload = workflow["jobs"]["merge"]["steps"]
    assert upload["with"]["name"] == artifact.NAME

    def work(payload: dict[str, Any]) -> tuple[str, bytes | None]:
        event = {"action": "merge-adapter", "client_payload": payload}
        inputs = {**merge["with"], "hf-token": "hf_ada", "probe-tokens": "64"}
        step = act("repository_dispatch", event, inputs=inputs, env={"HF_ENDPOINT": hub.url})
        environment = {"RESULTS": step.outputs.get("results", "")}
        assert keep["env"] == {"RESULTS": "${{ steps.merge.outputs.results }}"}
        subprocess.run(["bash", "-e", "-c", keep["run"]], cwd=workspace, env=environment, check=True)
        files = [path for pattern in upload["with"]["path"].split() for path in workspace.glob(pattern)]
        return "failure" if step.code else "success", zipped(
            {str(path.relative_to(workspace)): path.read_bytes() for path in files}
        )

    return work


def zipped(files: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return packed.getvalue()


@pytest.fixture
def github_settings(make_settings: Any, hub: Any, tmp_path: Path, github_api: Any) -> Any:
    return replace(
        make_settings(hub.url, tmp_path / "bot"),
        runner=RunnerKind.GITHUB,
        github_repository="ada/ci",
        github_token="gh_secret",
        github_api=github_api.url,
    )


def leased(place: Path, request: JobRequest) -> Job:
    with Store(place / "db") as store:
        queue = Queue(store)
        queue.submit(request)
        lease = queue.claim("w")
        assert lease is not None
        return lease.job


def carry_out(settings: Any, job: Job) -> tuple[Outcome, Watch]:
    watch = Watch(settings.job_folder(job.id), "")
    try:
        outcome = runner_for(settings).run(job, settings.token, watch, slot=0)
    finally:
        watch.close()
    assert not isinstance(outcome, Interrupted)
    return outcome, watch


def test_a_merge_is_dispatched_with_its_options_and_its_verdict_read_back(
    github_settings: Any,
    github_api: Any,
    example: Any,
    tmp_path: Path,
    push_adapter: Any,
    lm_adapter: Path,
    api: Any,
) -> None:
    """Subfolder and options reach the action; verdict, report and pull request come back, and a verdict that is not
    pass is that verdict, not a failure."""
    folder = tmp_path / "pushed"
    shutil.copytree(lm_adapter, folder / "lora")
    repo_id, sha = push_adapter("ada/on-github", folder=folder)
    second, at = push_adapter("ada/second-on-github")
    options = JobOptions(
        target_repo="ada/from-github",
        dtype=DType.BFLOAT16,
        private=True,
        adapters=(f"{second}@{at}",),
        weights=(1.5, -0.5),
    )
    job = leased(tmp_path, JobRequest(repo_id, sha, Source.COMMENT, subfolder="lora", options=options))
    workflow = Workflow(github_api, example)
    outcome, watch = carry_out(github_settings, job)
    assert (outcome.state, outcome.exit_code, outcome.verdict) == (JobState.DONE, 0, "pass"), outcome
    assert outcome.publication is not None and outcome.publication["repo"] == "ada/from-github"
    assert api.model_info("ada/from-github").private
    report = json.loads((watch.folder / REPORT_FILE).read_text())
    assert report["output"]["dtype"] == "bfloat16" and report["adapter"]["subfolder"] == "lora"
    assert [(one["id"], one["weight"]) for one in report["adapters"]] == [(repo_id, 1.5), (second, -0.5)]
    assert watch.remote == str(RUN) and len(workflow.dispatches) == 1
    assert workflow.dispatches[0]["event_type"] == "merge-adapter"
    (fetched,) = github_api.sent("GET", "/storage/archive")
    assert fetched.authorization == "", "GitHub's token went to where it stores artifacts"

    assert workflow.archive is not None
    with zipfile.ZipFile(io.BytesIO(workflow.archive)) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    (entry,) = json.loads(files["results.json"])
    assert entry["subfolder"] == "lora"
    elsewhere = artifact.read_result(workflow.archive, replace(job.request, subfolder="other"))
    assert elsewhere is not None and elsewhere.report is None, "the report is of another folder"
    report["verification"] |= {"verdict": "fail", "reasons": ["tensors differ"]}
    files["results.json"] = json.dumps([{**entry, "verdict": "fail", "exit-code": 4}]).encode()
    files[entry["report"]] = json.dumps(report).encode()
    workflow.archive = zipped(files)
    workflow.run = {**(workflow.run or {}), "conclusion": "failure"}
    rejected, _ = carry_out(github_settings, replace(job, remote=str(RUN)))  # a worker that came later
    assert (rejected.state, rejected.verdict, rejected.message) == (
        JobState.REJECTED,
        "fail",
        "tensors differ",
    )
    assert "/actions/runs/8" in rejected.hint and len(workflow.dispatches) == 1


def test_what_the_action_refuses_is_refused_with_its_words(
    github_settings: Any, github_api: Any, example: Any, tmp_path: Path, push_adapter: Any
) -> None:
    repo_id, sha = push_adapter("ada/refused-on-github")
    options = JobOptions(base_model="nobody/nothing")
    job = leased(tmp_path, JobRequest(repo_id, sha, Source.COMMENT, options=options))
    Workflow(github_api, example)
    outcome, _ = carry_out(github_settings, job)
    assert (outcome.state, outcome.exit_code) == (JobState.REFUSED, 2)
    assert "nobody/nothing" in outcome.message and "/actions/runs/8" in outcome.hint


@pytest.mark.parametrize(
    ("error_type", "state"),
    [("RefusedError", JobState.REFUSED), ("HubError", JobState.FAILED), ("", JobState.FAILED)],
)
def test_a_refusal_of_the_hub_inside_the_run_is_told_from_a_fault_of_its_network(
    github_settings: Any, github_api: Any, tmp_path: Path, error_type: str, state: JobState
) -> None:
    """Both have exit code 5; the first is never tried again."""
    job = leased(tmp_path, REQUEST)
    results = json.dumps([{**ERROR, "exit-code": 5, "error-type": error_type}]).encode()
    Workflow(github_api, lambda payload: ("failure", zipped({"results.json": results})))
    outcome, _ = carry_out(github_settings, job)
    assert (outcome.state, outcome.exit_code) == (state, 5)


@pytest.mark.parametrize(
    ("conclusion", "archive", "state"),
    [
        ("failure", None, JobState.FAILED),
        ("timed_out", b"not an archive", JobState.FAILED),
        ("failure", zipped({"results.json": b"[]"}), JobState.FAILED),
        ("cancelled", None, JobState.CANCELLED),
    ],
)
def test_a_run_without_a_result_is_told_with_its_address(
    github_settings: Any,
    github_api: Any,
    tmp_path: Path,
    conclusion: str,
    archive: bytes | None,
    state: JobState,
) -> None:
    job = leased(tmp_path, JobRequest("ada/x", "a" * 40, Source.WEBHOOK))
    Workflow(github_api, lambda payload: (conclusion, archive))
    outcome, _ = carry_out(github_settings, job)
    assert outcome.state is state and "/actions/runs/8" in outcome.message


@pytest.mark.parametrize(
    ("status", "message", "hint"),
    [
        (401, "GitHub does not accept the token to list workflow runs: Bad credentials", "give a new one"),
        (403, "the setting github_token may not list workflow runs in ada/ci", "`actions: read` for ada/ci"),
        (404, "the setting github_token may not list workflow runs in ada/ci", "`actions: read` for ada/ci"),
    ],
)
def test_a_token_that_github_does_not_take_is_told_to_the_bots_owner(
    github_settings: Any, github_api: Any, tmp_path: Path, status: int, message: str, hint: str
) -> None:
    """Which setting, and what it needs: no workflow's `permissions:` are meant here."""
    said = {"message": "Bad credentials" if status == 401 else "Not Found"}
    github_api.answer("GET", "/repos/ada/ci/actions/runs", status, said)
    with pytest.raises(GitHubError, match=message) as caught:
        carry_out(github_settings, leased(tmp_path, REQUEST))
    assert hint in caught.value.hint and "gh_secret" not in str(caught.value)


def test_a_huge_artifact_is_not_taken_in(
    github_settings: Any, github_api: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artifact, "LIMIT", 1000)
    Workflow(github_api, lambda payload: ("success", bytes(1001)))
    with pytest.raises(GitHubError, match="more than 1,000 bytes"):
        carry_out(github_settings, leased(tmp_path, JobRequest("ada/x", "a" * 40, Source.WEBHOOK)))


def test_what_cannot_run_there_is_refused_before_a_dispatch(
    github_settings: Any, github_api: Any, tmp_path: Path
) -> None:
    """A user's own token, and verifying."""
    job = leased(tmp_path, JobRequest("ada/x", "a" * 40, Source.WEBHOOK))
    for request in (
        replace(job.request, token=b"sealed"),
        replace(job.request, kind=JobKind.VERIFY, options=JobOptions(merged="a/b")),
    ):
        with pytest.raises(InputError):
            carry_out(github_settings, replace(job, request=request))
    assert github_api.requests == []


REQUEST = JobRequest("ada/x", "a" * 40, Source.WEBHOOK)
ERROR = {"adapter": f"ada/x@{'a' * 40}", "verdict": "error", "exit-code": 3, "error": "no", "hint": ""}


@pytest.mark.parametrize(
    "results",
    [
        b"",
        b"{}",
        b"[" * 100_000,
        json.dumps([ERROR, ERROR]).encode(),
        json.dumps([{**ERROR, "adapter": "ada/other@" + "a" * 40}]).encode(),
        json.dumps([{**ERROR, "adapter": "ada/x@" + "b" * 40}]).encode(),
        json.dumps([{**ERROR, "exit-code": True}]).encode(),
    ],
)
def test_results_of_something_else_are_none(results: bytes) -> None:
    assert artifact.read_result(zipped({"results.json": results}), REQUEST) is None


def test_a_report_of_something_else_is_left_out() -> None:
    """The exit code counts; the report does not fit the schema."""
    entry = {**ERROR, "report": "merge-adapter-report/x/merge_report.json"}
    files = {"results.json": json.dumps([entry]).encode(), entry["report"]: b'{"schema": 1}'}
    found = artifact.read_result(zipped(files), REQUEST)
    assert found == artifact.RunResult(3, {"message": "no", "hint": "", "type": ""}, None)
