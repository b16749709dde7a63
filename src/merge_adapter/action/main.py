"""The action from its environment to its exit code, and the one boundary where errors become annotations."""

from __future__ import annotations

import os
import tempfile
import traceback
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from merge_adapter.action import results, summary
from merge_adapter.action.candidates import Candidate, find_candidates
from merge_adapter.action.changes import inside
from merge_adapter.action.commands import Level, Log, write_outputs
from merge_adapter.action.events import Named, Nothing, read_trigger
from merge_adapter.action.feedback import give_feedback
from merge_adapter.action.inputs import Inputs, Secrets, hint_here, read_inputs, take_secrets
from merge_adapter.action.merging import check_device, failed, merge_one
from merge_adapter.action.results import Failed, Result
from merge_adapter.action.runner import Runner, read_runner
from merge_adapter.action.step import Step
from merge_adapter.errors import ExitCode, InputError, MergeAdapterError
from merge_adapter.types import PublishTo

if TYPE_CHECKING:
    from merge_adapter.hub import Hub

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
        _tell_failure(runner, log, error.message, hint_here(error.hint))
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


def _prepare(runner: Runner, log: Log) -> Step:
    """Everything checked that can be checked before any work: event, secrets, inputs, device."""
    for name in _NEVER_INHERITED:
        os.environ.pop(name, None)
    # The bars of the libraries below are no use in a log; they look when they are imported.
    os.environ.update(HF_HUB_DISABLE_PROGRESS_BARS="1", TQDM_DISABLE="1")
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
    if inputs.output is not None:
        inside(runner.workspace, str(inputs.output), what="the input output")
    hub = _hub(secrets)
    if inputs.publish is not PublishTo.NONE and not isinstance(wanted, Nothing):
        _check_credentials(secrets)
    github = None
    if secrets.github_token and runner.repository:
        from merge_adapter.github import GitHub

        github = GitHub(secrets.github_token, runner.repository, api_url=runner.api_url)
    return Step(log, runner, trigger, inputs, hub, github)


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


def _hub(secrets: Secrets) -> Hub:
    from merge_adapter.hub import Hub

    return Hub(token=secrets.hf_token or None)


def _check_credentials(secrets: Secrets) -> None:
    from merge_adapter.hub.access import has_token

    if not has_token(secrets.hf_token or None):
        raise InputError(NO_CREDENTIALS, hint=NO_CREDENTIALS_HINT)


def _work(step: Step, stack: ExitStack) -> Sequence[Result] | Nothing:
    """Find the adapters and merge one after the other; one that fails does not keep the next from its turn."""
    with step.log.group("Find the adapters"), step.log.foreign():
        found = find_candidates(step.inputs, step.trigger, step.runner, hub=step.hub, github=step.github)
    if isinstance(found, Nothing):
        return found
    _check_name(found, step.inputs)
    clashes = _clashes(found, step.inputs)
    scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="merge-adapter-action-")))
    step.log.line(f"{len(found)} to merge: {', '.join(candidate.label for candidate in found)}")
    done: list[Result] = []
    for candidate in found:
        clash = clashes.get(candidate)
        done.append(merge_one(step, candidate, scratch) if clash is None else failed(candidate, clash))
        _annotate(step.log, done[-1])
    return done


def _check_name(found: Sequence[Candidate], inputs: Inputs) -> None:
    """Refuse to publish a nameless adapter to a place that nobody named."""
    if inputs.publish is PublishTo.NONE or inputs.target_repo is not None:
        return
    if any(not candidate.name for candidate in found):
        raise InputError(
            "the adapter lies at the root of the repository, so it has no name that a target could be named after",
            hint="Give the input target-repo, for example acme/my-model-merged.",
        )


def _clashes(found: Sequence[Candidate], inputs: Inputs) -> dict[Candidate, InputError]:
    """Adapters that would be published to one place, where the second would take the first one's."""
    if inputs.publish is PublishTo.NONE:
        return {}
    at: dict[str, list[Candidate]] = {}
    for candidate in found:
        at.setdefault(_place(candidate, inputs).lower(), []).append(candidate)
    return {
        candidate: InputError(
            f"{group[0].label} and {group[1].label} would both be published to {_place(candidate, inputs)}"
            + (f", and {len(group) - 2} more" if len(group) > 2 else ""),
            hint="Put {name} into target-repo or path-in-repo; it stands for each adapter's own name. Adapters of one "
            "name need a step each, with a target of its own.",
        )
        for group in at.values()
        if len(group) > 1
        for candidate in group
    }


def _place(candidate: Candidate, inputs: Inputs) -> str:
    """Where it is published to, as far as the names tell: repository and folder."""
    from merge_adapter.publish.target import default_name

    owner = "" if candidate.folder is not None else candidate.reference.partition("/")[0]
    repository = candidate.named_in(inputs.target_repo) or f"{owner}/{default_name(candidate.name)}"
    return "/".join(filter(None, (repository, candidate.named_in(inputs.path_in_repo))))


def _annotate(log: Log, result: Result) -> None:
    """The outcome at the top of the run's page."""
    name = result.candidate.label
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


def _tell(step: Step, done: Sequence[Result] | Nothing) -> int:
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
