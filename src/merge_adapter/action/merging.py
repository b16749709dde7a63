"""One adapter through the pipeline: inputs become requests, whatever happens becomes a result."""

from __future__ import annotations

import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from merge_adapter.action import keeping
from merge_adapter.action.candidates import Candidate, folders_read
from merge_adapter.action.changes import resolve_pointers
from merge_adapter.action.inputs import Inputs, hint_here
from merge_adapter.action.results import Failed, Finished, Result
from merge_adapter.action.step import Step
from merge_adapter.errors import ExitCode, InputError, MergeAdapterError
from merge_adapter.types import MergeSettings
from merge_adapter.workspace import storage_errors

if TYPE_CHECKING:
    from merge_adapter.pipeline import MergeRequest
    from merge_adapter.publish import PublishSettings

NO_GPU_HINT = (
    "A container action cannot ask the runner for a GPU. Call the reusable workflow "
    "merge-adapter/merge-adapter/.github/workflows/merge.yml on a GPU runner, or use the image in a job with "
    "`container: {image: …, options: --gpus all}`; see docs/github-action.md. Or leave out `device`."
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


def merge_one(step: Step, candidate: Candidate, scratch: Path) -> Result:
    """Merge one adapter with everything it prints as text in the log. `scratch` is emptied when the step ends.

    Raises nothing but KeyboardInterrupt: an error, a bug of ours among them, is a result too.
    """
    started = time.monotonic()
    log = step.log
    try:
        with log.group(f"Merge {candidate.label}"), log.foreign():
            return _run_pipeline(step, candidate, scratch, started)
    except MergeAdapterError as error:
        return failed(candidate, error, seconds=time.monotonic() - started)
    except Exception as error:  # noqa: BLE001  # a bug with one adapter is no reason to drop the others
        with log.group(f"What went wrong with {candidate.label}"):
            log.line(traceback.format_exc())
        return Failed(
            candidate,
            f"a bug in merge-adapter: {type(error).__name__}: {error}",
            "Please report it with the lines of the log: https://github.com/merge-adapter/merge-adapter/issues",
            int(ExitCode.BUG),
            time.monotonic() - started,
            error_type=type(error).__name__,
        )


def failed(candidate: Candidate, error: MergeAdapterError, *, seconds: float = 0.0) -> Failed:
    """What an error of ours makes of an adapter."""
    return Failed(
        candidate,
        error.message,
        hint_here(error.hint),
        int(error.exit_code),
        seconds,
        error_type=type(error).__name__,
    )


def _run_pipeline(step: Step, candidate: Candidate, scratch: Path, started: float) -> Finished:
    from merge_adapter import pipeline
    from merge_adapter.report.progress import LogProgress

    inputs, runner = step.inputs, step.runner
    for folder in folders_read(candidate, inputs, runner.workspace):
        resolve_pointers(runner.workspace, folder)
    request = _request(inputs, candidate)
    outcome = pipeline.run(
        request,
        _publishing(inputs, candidate),
        hub=step.hub,
        progress=LogProgress(sys.stderr),
        output=keeping.place(step, candidate, scratch),
        disk_budget=inputs.disk_budget,
    )
    source = keeping.papers(step, candidate, outcome)
    with storage_errors(runner.workspace):
        files = keeping.keep_report(runner.workspace, candidate, outcome, source)
    return Finished(
        candidate,
        report=outcome.report,
        verdict=outcome.verdict,
        reasons=outcome.reasons,
        publication=outcome.publication,
        seconds=time.monotonic() - started,
        report_file=files[0],
        merged_here=outcome.merged is not None or outcome.stages is not None,
        verified=inputs.verify,
        files=files,
    )


def _request(inputs: Inputs, candidate: Candidate) -> MergeRequest:
    from merge_adapter.pipeline import MergeRequest
    from merge_adapter.resolve import SourceRequest
    from merge_adapter.verify.settings import VerifySettings

    source = SourceRequest(
        (candidate.reference, *inputs.combine_with),
        inputs.weights,
        inputs.base_model,
        inputs.base_revision,
        candidate.subfolder or inputs.subfolder,
        inputs.combination,
        inputs.soft_prompt,
        local_paths=not candidate.hub_only,
    )
    settings = MergeSettings(
        dtype=inputs.dtype,
        strategy=inputs.strategy,
        quantized_base=inputs.quantized_base,
        soft_prompt=inputs.soft_prompt,
        trust_remote_code=inputs.trust_remote_code,
    )
    gate = VerifySettings(
        dtype=inputs.dtype,
        device=inputs.device,
        probe_tokens=inputs.probe_tokens,
        probes=inputs.probes,
        dataset_probes=inputs.dataset_probes,
        trust_remote_code=inputs.trust_remote_code,
    )
    return MergeRequest(source, settings, gate if inputs.verify else None, inputs.device)


def _publishing(inputs: Inputs, candidate: Candidate) -> PublishSettings:
    from merge_adapter.publish import PublishSettings

    return PublishSettings(
        publish_to=inputs.publish,
        target_repo=candidate.named_in(inputs.target_repo),
        private=inputs.private,
        path_in_repo=candidate.named_in(inputs.path_in_repo),
        on_fail=inputs.on_fail,
        license=inputs.license,
        allow_base=inputs.allow_base,
    )
