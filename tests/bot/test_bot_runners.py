"""Jobs elsewhere, on Hugging Face Jobs (run by the embedded Hub as processes), and what workers make of outcomes."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from merge_adapter.bot.jobs import Job, JobKind, JobOptions, JobRequest, JobState, Outcome, Source
from merge_adapter.bot.queue import Hold, Queue
from merge_adapter.bot.rows import find_job
from merge_adapter.bot.runners.base import (
    REPORT_FILE,
    Interrupted,
    Watch,
    arguments_of,
    combined,
    merge_options,
    outcome_of,
)
from merge_adapter.bot.runners.flavours import choose_flavour, estimate
from merge_adapter.bot.settings import BotSettings, RunnerKind
from merge_adapter.bot.store import Store
from merge_adapter.bot.vault import open_vault
from merge_adapter.bot.worker import Worker, queue_for, runner_for
from merge_adapter.errors import HubError, InputError
from merge_adapter.hub import Hub
from merge_adapter.hub.errors import RefusedError
from merge_adapter.hub.jobs import Flavour, amount, hardware
from merge_adapter.types import CombinationType, QuantizedBase, SoftPrompt

CHEAP = Flavour("cpu-basic", 16 * 10**9, 50 * 10**9, gpu=False, dollars_per_hour=0.01)
LARGE = Flavour("cpu-xl", 124 * 10**9, None, gpu=False, dollars_per_hour=1.0)


def test_the_cheapest_hardware_that_fits_is_chosen() -> None:
    def chosen(wanted: str = "auto", **needs: int) -> str:
        return choose_flavour((LARGE, CHEAP), wanted, **{"memory": 1, "disk": 1, **needs}).name

    assert chosen() == "cpu-basic"
    assert chosen(memory=15 * 10**9) == "cpu-xl"  # the runtime takes room too
    assert chosen(disk=60 * 10**9) == "cpu-xl"
    assert chosen("cpu-xl") == "cpu-xl"
    with pytest.raises(InputError, match="no hardware"):
        chosen(memory=500 * 10**9)
    with pytest.raises(InputError, match="no hardware 'moon'"):
        chosen("moon")
    assert 0 < estimate(CHEAP, 10**9) < estimate(CHEAP, 10**11) < estimate(LARGE, 10**11)
    assert (amount("16 GB"), amount("1.5 TB"), amount("N/A")) == (16 * 10**9, 1_500 * 10**9, None)


@pytest.mark.parametrize(
    ("code", "document", "state", "message"),
    [
        (0, {"verification": {"verdict": "pass", "reasons": []}}, JobState.DONE, ""),
        (0, None, JobState.FAILED, "without a report"),
        (
            4,
            {"verification": {"verdict": "fail", "reasons": ["q_proj is off"]}},
            JobState.REJECTED,
            "q_proj is off",
        ),
        (
            3,
            {"error": {"type": "MethodError", "message": "no merge", "hint": ""}},
            JobState.REFUSED,
            "no merge",
        ),
        (6, {"error": {"type": "PolicyError", "message": "gated", "hint": ""}}, JobState.REFUSED, "gated"),
        (5, {"error": {"type": "HubError", "message": "away", "hint": ""}}, JobState.FAILED, "away"),
        (5, {"error": {"type": "RefusedError", "message": "403", "hint": ""}}, JobState.REFUSED, "403"),
        (2, {"error": {"type": "StorageError", "message": "full", "hint": ""}}, JobState.FAILED, "full"),
        (1, {}, JobState.FAILED, "last line"),
        (-9, {}, JobState.FAILED, "signal 9"),
        (130, {}, JobState.FAILED, "last line"),
    ],
)
def test_exit_codes_become_outcomes(code: int, document: Any, state: JobState, message: str) -> None:
    outcome = outcome_of(code, document, last_line="last line")
    assert outcome.state is state and message in outcome.message


def test_arguments_carry_choices_and_no_secret(tmp_path: Path) -> None:
    store = Store(tmp_path / "db")
    queue = Queue(store)
    options = JobOptions("meta/x", private=True, license="mit", target_repo="ada/y")
    queue.submit(JobRequest("ada/x", "a" * 40, Source.PAGE, options=options, token=b"s", subfolder="lora"))
    lease = queue.claim("w")
    assert lease is not None
    arguments = arguments_of(lease.job, BotSettings(token="hf_x", allow_base=("meta/*",)), device="cuda:1")
    assert " ".join(arguments) == (
        f"run ada/x@{'a' * 40} --allow-base meta/* --private --subfolder lora --target-repo ada/y --license mit "
        "--device cuda:1 --base-model meta/x --json"
    )
    small = arguments_of(lease.job, BotSettings(), disk_budget="6GB")
    assert small[:4] == ["run", f"ada/x@{'a' * 40}", "--disk-budget", "6GB"]
    more = JobOptions(
        adapters=("ada/two@v1",),
        weights=(1.0, -0.5),
        combination=CombinationType.TIES,
        density=0.4,
        quantized_base=QuantizedBase.ORIGINAL,
        soft_prompt=SoftPrompt.TOKENS,
        merged="ada/m",
    )
    several = replace(lease.job.request, subfolder="", options=more)
    weighted = "--adapter ada/two@v1 --weight=1.0 --weight=-0.5"
    common = f"{weighted} --device auto --quantized-base original --combination ties"
    run, verify = (
        " ".join(arguments_of(replace(lease.job, request=replace(several, kind=kind)), BotSettings()))
        for kind in (JobKind.MERGE, JobKind.VERIFY)
    )
    assert run == f"run ada/x@{'a' * 40} {common} --density 0.4 --soft-prompt tokens --json"
    assert verify == f"verify ada/m --adapter ada/x@{'a' * 40} {common} --density 0.4 --json"
    store.close()


def test_options_reach_the_command_line_as_they_were_given() -> None:
    """A branch may bear the name of another option's default, and a third has more than six digits."""
    options = JobOptions(base_revision="auto", weights=(1 / 3, 1e-9), density=0.123456789)
    assert merge_options(options) == {"--base-revision": "auto", "--density": "0.123456789"}
    assert [float(one.partition("=")[2]) for one in combined(options)] == [1 / 3, 1e-9]


@pytest.fixture
def jobs_hub(tmp_path: Path, lm_base: Path, lm_adapter: Path) -> Iterator[tuple[Any, str]]:
    """A Hub that runs jobs, with base and adapter; the commit of the adapter."""
    from huggingface_hub import HfApi

    from localhub.process import LocalHub

    users = {"ada": "hf_ada", "merge-bot": "hf_merge_bot"}
    with LocalHub(tmp_path / "hub", users, {"demo": ["ada"]}, options=["--run-jobs"]) as hub:
        api = HfApi(endpoint=hub.url, token="hf_ada")
        for repo_id, folder in (("demo/pydoc-llama", lm_base), ("ada/remote", lm_adapter)):
            api.create_repo(repo_id)
            sha = api.upload_folder(repo_id=repo_id, folder_path=folder).oid
        yield hub, sha


def test_a_merge_on_hugging_face_jobs(
    jobs_hub: Any, tmp_path: Path, make_settings: Any, eventually: Any
) -> None:
    """Flavour from the plan, token as a secret, log followed, report read back; and a worker that comes later
    follows the same job instead of paying for a second."""
    hub, sha = jobs_hub
    settings = make_settings(
        hub.url, tmp_path / "bot", runner=RunnerKind.HF_JOBS, jobs_image="merge-adapter:test", workers=1
    )
    client = Hub(hub.url, "hf_ada")
    assert hardware(client)[0].name == "cpu-basic"
    with Store(settings.database) as store:
        queue = queue_for(store, settings)
        job_id = queue.submit(JobRequest("ada/remote", sha, Source.BACKFILL)).job_id
        first = Worker(queue, runner_for(settings), settings, open_vault(settings))
        first.start()
        eventually(lambda: find_job(store, job_id).remote)
        first.stop()
        waiting = find_job(store, job_id)
        assert waiting is not None and waiting.state is JobState.QUEUED and waiting.remote
        second = Worker(queue, runner_for(settings), settings, open_vault(settings))
        second.start()
        eventually(lambda: not find_job(store, job_id).open)
        second.stop()
        job = find_job(store, job_id)
    assert job is not None and (job.state, job.verdict, job.message) == (JobState.DONE, "pass", "")
    report = json.loads((settings.job_folder(job_id) / REPORT_FILE).read_text())
    assert report["adapter"]["revision"] == sha
    (remote,) = client.api.list_jobs(namespace="ada")
    assert remote.flavor == "cpu-basic" and remote.id == job.remote
    assert "hf_ada" not in json.dumps([remote.command, remote.environment])
    assert set(remote.secrets or {}) == {"HF_TOKEN"}
    log = (settings.job_folder(job_id) / "log.txt").read_text()
    assert "hardware cpu-basic, about $" in log and "following job" in log and '"result"' not in log


def test_a_cancelled_job_is_cancelled_there(
    jobs_hub: Any, tmp_path: Path, make_settings: Any, eventually: Any
) -> None:
    hub, sha = jobs_hub
    settings = make_settings(
        hub.url, tmp_path / "bot", runner=RunnerKind.HF_JOBS, jobs_image="x", jobs_flavor="cpu-basic"
    )
    with Store(settings.database) as store:
        queue = queue_for(store, settings)
        job_id = queue.submit(JobRequest("ada/remote", sha, Source.PAGE)).job_id
        worker = Worker(queue, runner_for(settings), replace(settings, workers=1), open_vault(settings))
        worker.start()
        eventually(lambda: find_job(store, job_id).remote)
        queue.cancel(job_id, reason="not needed")
        eventually(lambda: not find_job(store, job_id).open)
        worker.stop()
        assert find_job(store, job_id).state is JobState.CANCELLED
    (remote,) = Hub(hub.url, "hf_ada").api.list_jobs(namespace="ada")
    assert str(getattr(remote.status.stage, "value", remote.status.stage)) == "CANCELED"


def test_a_job_that_vanished_there_is_started_afresh(
    jobs_hub: Any, tmp_path: Path, make_settings: Any, eventually: Any
) -> None:
    """It is nobody's refusal: what became of it cannot be asked any more, and the next one finds what it published."""
    hub, sha = jobs_hub
    settings = make_settings(
        hub.url,
        tmp_path / "bot",
        runner=RunnerKind.HF_JOBS,
        jobs_image="x",
        jobs_flavor="cpu-basic",
        workers=1,
    )
    with Store(settings.database) as store:
        queue = queue_for(store, settings)
        job_id = queue.submit(JobRequest("ada/remote", sha, Source.BACKFILL)).job_id
        lease = queue.claim("a worker that was here before")
        queue.hold(lease, remote="0" * 24)
        queue.release(lease)
        worker = Worker(queue, runner_for(settings), settings, open_vault(settings))
        worker.start()
        eventually(lambda: not find_job(store, job_id).open)
        worker.stop()
        job = find_job(store, job_id)
    assert (job.state, job.verdict, job.round, job.failures) == (JobState.DONE, "pass", 1, 1)
    (remote,) = Hub(hub.url, "hf_ada").api.list_jobs(namespace="ada")
    assert remote.id == job.remote
    log = (settings.job_folder(job_id) / "log.txt").read_text()
    assert f"job {'0' * 24} is no longer on Hugging Face Jobs" in log
    assert settings.job_folder(job_id).stat().st_mode & 0o077 == 0, "it may tell of private repositories"


@pytest.mark.parametrize("kind", [RunnerKind.GITHUB, RunnerKind.HF_JOBS])
def test_a_runner_without_its_settings_is_refused_before_anything_starts(kind: RunnerKind) -> None:
    with pytest.raises(InputError, match="needs the setting"):
        runner_for(BotSettings(runner=kind))


def test_a_lost_lease_stops_the_job_and_stores_nothing(
    tmp_path: Path, make_settings: Any, eventually: Any
) -> None:
    """A worker that was paused for longer than its lease ends what it does, and another's outcome counts."""
    settings = make_settings("http://127.0.0.1:9", tmp_path / "bot", workers=1, lease_seconds=0.8)
    begun, ended = threading.Event(), threading.Event()

    class Patient:
        def run(self, job: Job, token: str, watch: Watch, *, slot: int) -> Outcome | Interrupted:
            begun.set()
            watch.stop.wait(240)
            ended.set()
            return Outcome(JobState.DONE, 0)

    with Store(settings.database) as store:
        queue = queue_for(store, settings)
        job_id = queue.submit(JobRequest("ada/x", "a" * 40, Source.PAGE)).job_id
        worker = Worker(queue, Patient(), settings, open_vault(settings))
        worker.start()
        assert begun.wait(240)
        store.write(
            lambda db: db.execute("UPDATE jobs SET owner = 'other', attempt = 2, lease_until = 9e9") and None
        )
        assert ended.wait(240)
        worker.stop()  # whatever it would store is stored then
        job = find_job(store, job_id)
        assert job is not None and (job.state, job.owner) == (JobState.RUNNING, "other")
        lease = replace(queue_lease(job), owner="other", attempt=2)
        assert queue.finish(lease, Outcome(JobState.REJECTED, 4)) is Hold.HELD


def queue_lease(job: Job) -> Any:
    from merge_adapter.bot.queue import Lease

    return Lease(job, job.owner or "", job.attempt)


def test_a_fault_of_the_network_is_tried_again_and_a_refusal_is_not(
    tmp_path: Path, make_settings: Any, eventually: Any
) -> None:
    """Raised or reported, the fault comes back to the queue; a verdict and a refusal end the job."""
    settings = make_settings("http://127.0.0.1:9", tmp_path / "bot", workers=1, first_wait=0.05)
    away = Outcome(JobState.FAILED, 5, "away")
    answers: dict[str, list[Any]] = {
        "ada/flaky": [HubError("away"), away, Outcome(JobState.DONE, 0, verdict="pass")],
        "ada/refused": [RefusedError("403")],
        "ada/rejected": [Outcome(JobState.REJECTED, 4, verdict="fail")],
        "ada/killed": [Outcome(JobState.FAILED, -9, "signal 9"), Outcome(JobState.DONE, 0, verdict="pass")],
        "ada/bug": [RuntimeError("oops")],
    }

    class Scripted:
        def run(self, job: Job, token: str, watch: Watch, *, slot: int) -> Outcome | Interrupted:
            answer = answers[job.request.adapter].pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer

    with Store(settings.database) as store:
        queue = queue_for(store, settings)
        ids = {name: queue.submit(JobRequest(name, "a" * 40, Source.PAGE)).job_id for name in answers}
        worker = Worker(queue, Scripted(), settings, open_vault(settings))
        worker.start()
        eventually(lambda: not any(find_job(store, one).open for one in ids.values()))
        worker.stop()
        ended = {name: find_job(store, one) for name, one in ids.items()}
    assert {name: (job.state, job.attempt, job.failures) for name, job in ended.items()} == {
        "ada/flaky": (JobState.DONE, 3, 2),
        "ada/refused": (JobState.REFUSED, 1, 0),
        "ada/rejected": (JobState.REJECTED, 1, 0),
        "ada/killed": (JobState.DONE, 2, 1),
        "ada/bug": (JobState.FAILED, 1, 0),
    }
    assert all(answers[name] == [] for name in answers)


@pytest.mark.parametrize("kind", list(RunnerKind))
def test_server_and_worker_start_without_torch(kind: RunnerKind) -> None:
    """It takes seconds and hundreds of megabytes to import, and only merges need it, which run elsewhere."""
    program = f"""
import sys
import merge_adapter.bot.server, merge_adapter.bot.pages.routes
from merge_adapter.bot.settings import BotSettings
from merge_adapter.bot.worker import runner_for
runner_for(BotSettings(runner={kind.value!r}, github_repository="a/b", github_token="t", jobs_image="i", token="t"))
print([name for name in ("torch", "transformers", "peft") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
