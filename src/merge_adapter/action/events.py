"""What an event asks for: which adapters, seen from which commit, and where the answer is shown.

Payloads have GitHub's own shapes. The parts that people write (branch names, titles, `client_payload`) are untrusted;
what is used of them is checked here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from merge_adapter.action.inputs import split_lines
from merge_adapter.action.runner import Runner
from merge_adapter.errors import InputError, PolicyError

_SHA = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_REVISION = re.compile(r"[A-Za-z0-9][\w./-]{0,199}")
_OPTIONS = frozenset(
    {
        "base-model",
        "base-revision",
        "combination",
        "combine-with",
        "density",
        "dtype",
        "license",
        "majority-sign",
        "path-in-repo",
        "private",
        "quantized-base",
        "seed",
        "soft-prompt",
        "strategy",
        "subfolder",
        "svd-rank",
        "target-repo",
        "weights",
    }
)
"""Inputs that `client_payload` may set. Not those that widen trust, name files of the runner, or skip the gate."""
_RELEASE_ACTIONS = frozenset({"published", "released", "prereleased"})
"""Not `edited`: writing the notes of a release makes such an event, and would start over for ever."""


@dataclass(frozen=True)
class Named:
    """The event names adapters; none when it leaves them to the inputs."""

    adapters: tuple[str, ...] = ()
    hub_only: bool = False
    """They came in a payload: ids of the Hub, never folders of the workspace."""
    inputs: tuple[tuple[str, str], ...] = ()
    """Inputs that the payload sets, by their names in action.yml."""


@dataclass(frozen=True)
class Changed:
    """Adapters of the workspace that differ between two commits."""

    base: str | None
    """The commit before; None when the event has none, as on a new ref."""
    head: str
    pull_request: int | None = None
    """Compare as a pull request does: what its branch added since it left `base`."""
    trunk: str | None = None
    """The default branch, which a new branch is compared with; None for a tag, and for the default branch itself."""


@dataclass(frozen=True)
class Everything:
    """Every adapter of the workspace."""


@dataclass(frozen=True)
class Nothing:
    """Nothing is to be done, and why."""

    reason: str


Wanted = Named | Changed | Everything | Nothing


@dataclass(frozen=True)
class Trigger:
    """What started the run, and who should hear of the outcome."""

    event: str
    wanted: Wanted
    sha: str | None = None
    """Commit whose check shows the verdict."""
    pull_request: int | None = None
    """Pull request that gets a comment."""
    release: int | None = None
    """Release that gets the report."""
    from_fork: bool = False
    """The code comes from someone who may not write to this repository: nothing is published, no secret read."""
    scheduled: bool = False
    """Nobody is watching: a failure opens an issue."""


def read_trigger(runner: Runner) -> Trigger:
    """What the event in `runner` asks for.

    Raises PolicyError for `pull_request_target`, InputError for a payload that is not what GitHub sends.
    """
    name, event = runner.event_name, runner.event
    if name == "pull_request_target":
        raise PolicyError(
            "pull_request_target runs with the repository's secrets on code that anyone can propose",
            hint="Use `on: pull_request`; from forks the adapter is merged and verified, and nothing is published.",
        )
    reader = _READERS.get(name)
    return reader(event, runner) if reader else Trigger(name, Named(), from_fork=_from_fork(event))


def _push(event: Mapping[str, Any], runner: Runner) -> Trigger:
    if event.get("deleted") is True:
        return Trigger("push", Nothing("The push deleted a branch or tag."))
    head = _sha(event.get("after"), "after") or _sha(runner.sha, "GITHUB_SHA")
    if head is None:
        raise InputError("the push event has no `after` and GITHUB_SHA is not set")
    before = _sha(event.get("before"), "before")
    return Trigger("push", Changed(before, head, trunk=None if before else _trunk(event)), sha=head)


def _trunk(event: Mapping[str, Any]) -> str | None:
    """The default branch, for a push of another branch."""
    ref, repository = event.get("ref"), event.get("repository")
    name = repository.get("default_branch") if isinstance(repository, dict) else None
    if not isinstance(name, str) or not _REVISION.fullmatch(name) or ".." in name:
        return None
    is_other_branch = isinstance(ref, str) and ref.startswith("refs/heads/") and ref != f"refs/heads/{name}"
    return name if is_other_branch else None


def _pull_request(event: Mapping[str, Any], runner: Runner) -> Trigger:  # noqa: ARG001  # one shape for all
    pull = _object(event, "pull_request")
    base, head = _object(pull, "base"), _object(pull, "head")
    number = _number(pull, "number")
    if event.get("action") == "closed":
        return Trigger("pull_request", Nothing("The pull request was closed."))
    head_sha = _sha(head.get("sha"), "pull_request.head.sha")
    base_sha = _sha(base.get("sha"), "pull_request.base.sha")
    if head_sha is None or base_sha is None:
        raise InputError("the pull_request event names no commits")
    return Trigger(
        "pull_request",
        Changed(base_sha, head_sha, pull_request=number),
        sha=head_sha,
        pull_request=number,
        from_fork=_from_fork(event),
    )


def _release(event: Mapping[str, Any], runner: Runner) -> Trigger:
    action = event.get("action")
    if action not in _RELEASE_ACTIONS:
        return Trigger("release", Nothing(f"The release was {action}, not published."))
    release = _object(event, "release")
    return Trigger(
        "release", Everything(), sha=_sha(runner.sha, "GITHUB_SHA"), release=_number(release, "id")
    )


def _repository_dispatch(event: Mapping[str, Any], runner: Runner) -> Trigger:  # noqa: ARG001
    payload = event.get("client_payload")
    if not isinstance(payload, dict) or "adapter" not in payload:
        return Trigger("repository_dispatch", Named())
    return Trigger(
        "repository_dispatch",
        Named(
            (_reference(payload["adapter"], payload.get("revision")),), hub_only=True, inputs=_inputs(payload)
        ),
    )


def _workflow_dispatch(event: Mapping[str, Any], runner: Runner) -> Trigger:  # noqa: ARG001
    """Typed in by a person who may write to the repository: anything that the input adapter takes."""
    inputs = event.get("inputs")
    adapter = inputs.get("adapter") if isinstance(inputs, dict) else None
    return Trigger("workflow_dispatch", Named(split_lines(adapter) if isinstance(adapter, str) else ()))


def _schedule(event: Mapping[str, Any], runner: Runner) -> Trigger:  # noqa: ARG001
    return Trigger("schedule", Named(), scheduled=True)


_READERS = {
    "push": _push,
    "pull_request": _pull_request,
    "release": _release,
    "repository_dispatch": _repository_dispatch,
    "workflow_dispatch": _workflow_dispatch,
    "schedule": _schedule,
}


def _reference(adapter: object, revision: object) -> str:
    """A Hub reference out of a payload: never a path, never more than an id and a revision."""
    if not isinstance(adapter, str) or not _HUB_ID.fullmatch(adapter) or ".." in adapter:
        raise InputError(
            f"the event names {adapter!r} as the adapter, expected a Hub id, owner/name",
            hint="An event can only name adapters of the Hub; for a folder use the input adapter.",
        )
    if revision in (None, ""):
        return adapter
    if not isinstance(revision, str) or not _REVISION.fullmatch(revision) or ".." in revision:
        raise InputError(
            f"the event names {revision!r} as the revision of {adapter}, expected a branch or sha"
        )
    return f"{adapter}@{revision}"


def _inputs(payload: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """The inputs among `subfolder` and `options`; what decides about trust is the workflow's alone."""
    options = payload.get("options") or {}
    if not isinstance(options, dict):
        raise InputError(f"the event's options are a {type(options).__name__}, expected a JSON object")
    found: dict[str, str] = {}
    for key, value in (*sorted(options.items()), ("subfolder", payload.get("subfolder"))):
        name = key.replace("_", "-")
        if value is None or value == "":
            continue
        if name not in _OPTIONS:
            raise InputError(
                f"the event sets {name!r}, which is not for an event to set",
                hint=f"client_payload.options may hold: {', '.join(sorted(_OPTIONS))}.",
            )
        if not isinstance(value, str | bool | int | float):
            raise InputError(
                f"the event sets {name} to a {type(value).__name__}, expected text, a number, true or false",
                hint="Several values are one text with a line for each.",
            )
        if name == "base-model" and not _HUB_ID.fullmatch(str(value)):
            raise InputError(f"the event names {value!r} as the base model, expected a Hub id, owner/name")
        if name == "combine-with":
            value = "\n".join(_more(line) for line in str(value).splitlines() if line.strip())
        text = str(value).lower() if isinstance(value, bool) else str(value)
        if found.setdefault(name, text) != text:
            raise InputError(
                f"the event sets {name} twice, to {found[name]!r} and to {text!r}",
                hint="Keep one of the two.",
            )
    return tuple(found.items())


def _more(line: str) -> str:
    """One more adapter, `owner/name` or `owner/name@revision`, with `:subfolder` or without."""
    reference, colon, subfolder = line.strip().partition(":")
    name, _, revision = reference.partition("@")
    return f"{_reference(name, revision)}{colon}{subfolder}"


def _sha(value: object, field: str) -> str | None:
    """A commit; None for what is missing or all zeros, which GitHub sends for a ref that did not exist."""
    if value in (None, ""):
        return None
    if not isinstance(value, str) or not _SHA.fullmatch(value):
        raise InputError(f"the event's {field} is {value!r}, expected the sha of a commit")
    return value if value.strip("0") else None


def _object(event: Mapping[str, Any], field: str) -> Mapping[str, Any]:
    value = event.get(field)
    if not isinstance(value, dict):
        raise InputError(f"the event has no {field}: GITHUB_EVENT_PATH and GITHUB_EVENT_NAME do not fit")
    return value


def _number(of: Mapping[str, Any], field: str) -> int:
    value = of.get(field)
    if not isinstance(value, int) or isinstance(value, bool):
        raise InputError(f"the event's {field} is {value!r}, expected a number")
    return value


def _from_fork(event: Mapping[str, Any]) -> bool:
    """Whether the event is about code of another repository: a review or a `workflow_run` may be, too.

    A fork that was deleted since has no name, and stays a fork.
    """
    pull, run = event.get("pull_request"), event.get("workflow_run")
    if isinstance(pull, dict):
        theirs, ours = _full_name(pull.get("head"), "repo"), _full_name(pull.get("base"), "repo")
    elif isinstance(run, dict):
        theirs, ours = _full_name(run, "head_repository"), _full_name(event, "repository")
    else:
        return False
    return theirs is None or theirs != ours


def _full_name(of: object, field: str) -> object:
    repository = of.get(field) if isinstance(of, dict) else None
    return repository.get("full_name") if isinstance(repository, dict) else None
