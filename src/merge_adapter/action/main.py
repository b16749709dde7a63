"""The action from its environment to its exit code, and the one boundary where errors become annotations."""

from __future__ import annotations

import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from merge_adapter.action import keeping, results, summary
from merge_adapter.action.candidates import Candidate, check_base, find_candidates
from merge_adapter.action.changes import resolve_pointers
from merge_adapter.action.commands import Level, Log, write_outputs
from merge_adapter.action.events import Named, Nothing, Trigger, read_trigger
from merge_adapter.action.feedback import give_feedback
from merge_adapter.action.inputs import Inputs, Secrets, read_inputs, take_secrets
from merge_adapter.action.results import Failed, Finished, Result
from merge_adapter.action.runner import Runner, read_runner
from merge_adapter.errors import ExitCode, InputError, MergeAdapterError, StorageError
from merge_adapter.types import MergeSettings, PublishTo

if TYPE_CHECKING:
    from merge_adapter.github import GitHub
    from merge_adapter.hub import Hub
    from merge_adapter.pipeline import MergeRequest
    from merge_adapter.publish import PublishSettings

_NEVER_INHERITED = (
    "ACTIONS_RUNTIME_TOKEN",
    "ACTIONS_RUNTIME_URL",
    "ACTIONS_CACHE_URL",
    "ACTIONS_RESULTS_URL",
)
"""Keys to the run's caches and artifacts, which the runner hands to every container and no merge needs."""
_HUB_CREDENTIALS = (
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "HF_OIDC_RESOURCE",
    "HF_OIDC_ID_TOKEN",
    "ACTIONS_ID_TOKEN_REQUEST_TOKEN",
    "ACTIONS_ID_TOKEN_REQUEST_URL",
)
NO_CREDENTIALS = "publishing to the Hub needs a token, and there is none"
NO_CREDENTIALS_HINT = (
    "Give one that may write to the target, `hf-token: ${{ secrets.HF_TOKEN }}`; or make this repository a Trusted "
    "Publisher of it and set `env: {HF_OIDC_RESOURCE: …}` with `permissions: {id-token: write}`; or only merge and "
    "verify, `publish: none`."
)
NO_GPU_HINT = (
    "A container action cannot ask the runner for a GPU. Call the reusable workflow "
    "merge-adapter/merge-adapter/.github/workflows/merge.yml on a GPU runner, or use the image in a job with "
    "`container: {image: …, options: --gpus all}`; see docs/github-action.md. Or leave out `device`."
)


@dataclass(frozen=True)
class _Step:
    """What one run of the action works with."""

    log: Log
    runner: Runner
    trigger: Trigger
    inputs: Inputs
    hub: Hub
    github: GitHub | None


def main() -> int:
    """Run the step that the environment describes. Returns its exit code; see errors.py."""
    log = Log()
    runner: Runner | None = None
    try:
        runner = read_runner()
        with ExitStack() as stack:
            step = _prepare(runner, log)
            done = _work(step, stack)
            return _tell(step, done)
    except MergeAdapterError as error:
        _tell_failure(runner, log, error.message, error.hint)
        return int(error.exit_code)
    except Exception as error:  # noqa: BLE001  # the boundary: a bug is told, too
        log.line(traceback.format_exc())
        _tell_failure(
            runner,
            log,
            f"this is a bug in merge-adapter: {type(error).__name__}: {error}",
            "Please report it with the lines of the log: https://github.com/merge-adapter/merge-adapter/issues",
        )
        return int(ExitCode.BUG)


def _prepare(runner: Runner, log: Log) -> _Step:
    """Everything checked that can be checked before any work: event, secrets, inputs, device."""
    for name in _NEVER_INHERITED:
        os.environ.pop(name, None)
    trigger = read_trigger(runner)
    secrets = _no_secrets() if trigger.from_fork else take_secrets()
    log.hide((secrets.hf_token, secrets.github_token, os.environ.get("HF_TOKEN", "")))
    wanted = trigger.wanted
    inputs = read_inputs(instead=wanted.inputs if isinstance(wanted, Named) else ())
    if trigger.from_fork:
        inputs = _for_fork(inputs, log)
    if runner.workspace.is_dir():
        os.chdir(runner.workspace)
    check_device(inputs.device)
    if inputs.probes is not None and not inputs.probes.is_file():
        raise InputError(
            f"the input probes names {str(inputs.probes)!r}, which is no file of the workspace",
            hint="Is the repository checked out? Put actions/checkout before this action.",
        )
    hub = _hub(secrets)
    if inputs.publish is not PublishTo.NONE and not isinstance(wanted, Nothing):
        _check_credentials(secrets)
    github = None
    if secrets.github_token and runner.repository:
        from merge_adapter.github import GitHub

        github = GitHub(secrets.github_token, runner.repository, api_url=runner.api_url)
    return _Step(log, runner, trigger, inputs, hub, github)


def _no_secrets() -> Secrets:
    """Drop every credential unread, and see that the Hub's client does not find another."""
    for name in (
        *_HUB_CREDENTIALS,
        "INPUT_HF-TOKEN",
        "INPUT_HF_TOKEN",
        "INPUT_GITHUB-TOKEN",
        "INPUT_GITHUB_TOKEN",
    ):
        os.environ.pop(name, None)
    # Read once, when huggingface_hub is imported.
    os.environ["HF_HUB_DISABLE_IMPLICIT_TOKEN"] = "1"  # noqa: S105  # a switch
    return Secrets()


def _for_fork(inputs: Inputs, log: Log) -> Inputs:
    log.annotate(
        Level.NOTICE,
        "The pull request comes from a fork: the adapter is merged and verified, nothing is published, "
        "no secret is read, no remote code is run.",
        title="From a fork",
    )
    return replace(
        inputs, publish=PublishTo.NONE, target_repo=None, path_in_repo=None, trust_remote_code=False
    )


def check_device(device: str) -> None:
    """Raise InputError at once when `device` names a GPU that is not there."""
    if not device.startswith("cuda"):
        return
    import torch

    if torch.version.cuda is None:
        raise InputError(
            f"device is {device}, but this image has PyTorch for CPUs only",
            hint=f"The images whose tag ends in -cuda have the other. {NO_GPU_HINT}",
        )
    if not torch.cuda.is_available():
        raise InputError(f"device is {device}, but this container sees no GPU", hint=NO_GPU_HINT)
    index = int(device.partition(":")[2] or 0)
    if index >= torch.cuda.device_count():
        raise InputError(
            f"device is {device}, but there are {torch.cuda.device_count()} GPUs, counted from 0"
        )


def _hub(secrets: Secrets) -> Hub:
    from merge_adapter.hub import Hub

    return Hub(token=secrets.hf_token or None)


def _check_credentials(secrets: Secrets) -> None:
    from merge_adapter.hub.access import has_token

    if not has_token(secrets.hf_token or None):
        raise InputError(NO_CREDENTIALS, hint=NO_CREDENTIALS_HINT)


def _work(step: _Step, stack: ExitStack) -> Sequence[Result] | Nothing:
    """Find the adapters and merge one after the other; one that fails does not keep the next from its turn."""
    with step.log.group("Find the adapters"), step.log.foreign():
        found = find_candidates(step.inputs, step.trigger, step.runner, hub=step.hub, github=step.github)
    if isinstance(found, Nothing):
        return found
    _check_several(found, step.inputs)
    scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="merge-adapter-action-")))
    step.log.line(f"{len(found)} to merge: {', '.join(candidate.reference for candidate in found)}")
    return [_merge_one(step, candidate, scratch) for candidate in found]


def _check_several(found: Sequence[Candidate], inputs: Inputs) -> None:
    """Refuse to publish several adapters to one place, and a nameless one to a place that nobody named."""
    if inputs.publish is PublishTo.NONE:
        return
    place = f"{inputs.target_repo or '{name}'}/{inputs.path_in_repo or ''}"
    if len(found) > 1 and "{name}" not in place:
        raise InputError(
            f"{len(found)} adapters would all be published to {inputs.target_repo}",
            hint="Put {name} into target-repo or path-in-repo; it stands for each adapter's own name.",
        )
    if inputs.target_repo is None and any(not candidate.name for candidate in found):
        raise InputError(
            "the adapter lies at the root of the repository, so it has no name that a target could be named after",
            hint="Give the input target-repo, for example acme/my-model-merged.",
        )


def _merge_one(step: _Step, candidate: Candidate, scratch: Path) -> Result:
    started = time.monotonic()
    log = step.log
    result: Result
    try:
        with log.group(f"Merge {candidate.reference}"), log.foreign():
            result = _run_pipeline(step, candidate, scratch, started)
    except MergeAdapterError as error:
        result = Failed(
            candidate, error.message, error.hint, int(error.exit_code), time.monotonic() - started
        )
    except Exception as error:  # noqa: BLE001  # a bug with one adapter is no reason to drop the others
        with log.group(f"What went wrong with {candidate.reference}"):
            log.line(traceback.format_exc())
        result = Failed(
            candidate,
            f"a bug in merge-adapter: {type(error).__name__}: {error}",
            "Please report it with the lines of the log: https://github.com/merge-adapter/merge-adapter/issues",
            int(ExitCode.BUG),
            time.monotonic() - started,
        )
    _annotate(log, result)
    return result


def _run_pipeline(step: _Step, candidate: Candidate, scratch: Path, started: float) -> Finished:
    from merge_adapter import pipeline
    from merge_adapter.report.progress import LogProgress

    inputs, runner = step.inputs, step.runner
    check_base(candidate, inputs, runner.workspace)
    if candidate.folder is not None:
        resolve_pointers(runner.workspace, candidate.folder)
    request = _request(inputs, candidate)
    if inputs.disk_budget is not None:
        _check_budget(request, inputs.disk_budget, step.hub)
    keep = keeping.place(inputs, candidate, step.trigger, workspace=runner.workspace, scratch=scratch)
    with _progress_lines():
        outcome = pipeline.run(
            request,
            _publishing(inputs, candidate),
            hub=step.hub,
            progress=LogProgress(sys.stderr),
            output=keep,
        )
    files = keeping.keep_report(runner.workspace, candidate, outcome)
    return Finished(
        candidate,
        report=outcome.report,
        verdict=outcome.verdict,
        reasons=outcome.reasons,
        publication=outcome.publication,
        seconds=time.monotonic() - started,
        report_file=files[0],
        merged_here=outcome.merged is not None,
        verified=inputs.verify,
        files=files,
    )


@contextmanager
def _progress_lines() -> Iterator[None]:
    """Plain lines only: the bars of the libraries below are no use in a log."""
    before = {name: os.environ.get(name) for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE")}
    os.environ.update(dict.fromkeys(before, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _request(inputs: Inputs, candidate: Candidate) -> MergeRequest:
    from merge_adapter.pipeline import MergeRequest
    from merge_adapter.resolve import SourceRequest
    from merge_adapter.verify.settings import VerifySettings

    source = SourceRequest(
        (candidate.reference,),
        (),
        inputs.base_model,
        inputs.base_revision,
        inputs.subfolder,
        local_paths=not candidate.hub_only,
    )
    settings = MergeSettings(
        dtype=inputs.dtype,
        strategy=inputs.strategy,
        quantized_base=inputs.quantized_base,
        trust_remote_code=inputs.trust_remote_code,
    )
    gate = VerifySettings(
        dtype=inputs.dtype,
        device=inputs.device,
        probe_tokens=inputs.probe_tokens,
        probes=inputs.probes,
        trust_remote_code=inputs.trust_remote_code,
    )
    return MergeRequest(source, settings, gate if inputs.verify else None, inputs.device)


def _publishing(inputs: Inputs, candidate: Candidate) -> PublishSettings:
    from merge_adapter.publish import PublishSettings

    def named(text: str | None) -> str | None:
        return text.replace("{name}", candidate.name) if text else None

    return PublishSettings(
        publish_to=inputs.publish,
        target_repo=named(inputs.target_repo),
        private=inputs.private,
        path_in_repo=named(inputs.path_in_repo),
        on_fail=inputs.on_fail,
        license=inputs.license,
        allow_base=inputs.allow_base,
    )


def _check_budget(request: MergeRequest, budget: int, hub: Hub) -> None:
    """Refuse before the first download what would not fit. Reads configs and headers alone."""
    from merge_adapter.pipeline import plan_merge
    from merge_adapter.report.progress import human_bytes

    _, plan = plan_merge(request, hub=hub)
    if plan.disk_bytes > budget:
        raise StorageError(
            f"the merge needs {human_bytes(plan.disk_bytes)} of disk, more than the disk-budget of "
            f"{human_bytes(budget)}",
            hint="Raise disk-budget, or use a runner with a larger disk.",
        )


def _annotate(log: Log, result: Result) -> None:
    """The outcome at the top of the run's page."""
    name = result.candidate.reference
    if isinstance(result, Failed):
        log.annotate(Level.ERROR, f"{result.message}\n{result.hint}".strip(), title=f"{name} was not merged")
        return
    where = f" {result.publication.url}" if result.publication else ""
    why = "\n".join(result.reasons)
    if result.outcome == "pass":
        log.annotate(Level.NOTICE, f"The merged model answers as base + adapter does.{where}", title=name)
    elif not result.verified:
        log.annotate(Level.WARNING, f"Merged, and not verified, as asked.{where}", title=name)
    else:
        log.annotate(Level.ERROR, f"The verdict is {result.outcome}.{where}\n{why}", title=name)


def _tell(step: _Step, done: Sequence[Result] | Nothing) -> int:
    """Outputs, feedback on GitHub, the summary; then the exit code."""
    runner, log = step.runner, step.log
    if isinstance(done, Nothing):
        log.annotate(Level.NOTICE, done.reason, title="Nothing to merge")
        if runner.summary is not None:
            summary.write(runner.summary, [summary.nothing(done.reason)])
        if runner.outputs is not None:
            write_outputs(runner.outputs, results.outputs([]))
        return int(ExitCode.DONE)
    if runner.outputs is not None:
        write_outputs(runner.outputs, ((name, log.masked(value)) for name, value in results.outputs(done)))
    with log.group("Tell GitHub"), log.foreign():
        notes = give_feedback(
            done, trigger=step.trigger, runner=runner, github=step.github, masked=log.masked
        )
    for note in notes:
        log.line(note)
    if runner.summary is not None:
        sections = [summary.overview(done)] if len(done) > 1 else []
        sections += [summary.section(result) for result in done]
        summary.write(runner.summary, [log.masked(text) for text in (*sections, *summary.notes(notes))])
    return results.exit_code(done)


def _tell_failure(runner: Runner | None, log: Log, message: str, hint: str) -> None:
    """An error that ended the step before any result was there."""
    log.annotate(Level.ERROR, f"{message}\n{hint}".strip(), title="merge-adapter")
    if runner is not None and runner.summary is not None:
        summary.write(runner.summary, [log.masked(summary.failure(message, hint))])
    if runner is not None and runner.outputs is not None:
        write_outputs(runner.outputs, [("verdict", results.ERROR), ("results", "[]")])
