"""What a job is: one merge or one verification that somebody, or some push, asked for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from merge_adapter.errors import ExitCode
from merge_adapter.publish.target import default_name
from merge_adapter.types import CombinationType, DType, QuantizedBase, SoftPrompt, Strategy


class JobKind(StrEnum):
    """What is to be done."""

    MERGE = "merge"
    VERIFY = "verify"


class Source(StrEnum):
    """Who asked."""

    WEBHOOK = "webhook"
    COMMENT = "comment"
    PAGE = "page"
    BACKFILL = "backfill"


PRIORITY = {Source.PAGE: 0, Source.COMMENT: 0, Source.WEBHOOK: 1, Source.BACKFILL: 2}
"""Lower goes first: a person who waits goes before a push, a push before catching up."""


class JobState(StrEnum):
    """Where a job stands. The first two are open, the others final."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    """The verdict is pass, and the result is published (or was already)."""
    REJECTED = "rejected"
    """Merged, but the gate did not say pass."""
    REFUSED = "refused"
    """Bad input, an adapter that cannot be merged, or policy: trying again changes nothing."""
    FAILED = "failed"
    """The network stayed away, the worker kept dying, or a bug."""
    CANCELLED = "cancelled"


OPEN_STATES = (JobState.QUEUED, JobState.RUNNING)
_STATE_OF_EXIT = {
    ExitCode.DONE: JobState.DONE,
    ExitCode.BUG: JobState.FAILED,
    ExitCode.INPUT: JobState.REFUSED,
    ExitCode.UNMERGEABLE: JobState.REFUSED,
    ExitCode.NOT_EQUIVALENT: JobState.REJECTED,
    ExitCode.REMOTE: JobState.FAILED,
    ExitCode.POLICY: JobState.REFUSED,
}


def state_of_exit(code: int) -> JobState:
    """The final state that an exit code of `merge-adapter` means; unknown codes and signals are failures."""
    try:
        return _STATE_OF_EXIT.get(ExitCode(code), JobState.FAILED)
    except ValueError:
        return JobState.FAILED


@dataclass(frozen=True)
class JobOptions:
    """What may be chosen about a job; the names are those of the command line's options."""

    base_model: str | None = None
    base_revision: str | None = None
    dtype: DType = DType.AUTO
    strategy: Strategy = Strategy.AUTO
    target_repo: str | None = None
    private: bool | None = None
    license: str | None = None
    quantized_base: QuantizedBase = QuantizedBase.REFUSE
    soft_prompt: SoftPrompt = SoftPrompt.REFUSE
    adapters: tuple[str, ...] = ()
    """More adapters, merged together with the job's own: `owner/name@sha`."""
    weights: tuple[float, ...] = ()
    """One per adapter, the job's own first; empty: 1 each."""
    combination: CombinationType = CombinationType.SEQUENTIAL
    density: float | None = None
    svd_rank: int | None = None
    merged: str | None = None
    """For VERIFY: the checkpoint to judge, `owner/name` or `owner/name@revision`."""

    def chosen(self) -> dict[str, Any]:
        """Only what differs from the default."""
        return {key: value for key, value in asdict(self).items() if value != getattr(_DEFAULTS, key)}

    def to_json(self) -> str:
        """What was chosen, with sorted keys: equal options give equal text."""
        return json.dumps(self.chosen(), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> JobOptions:
        parsed: dict[str, Any] = json.loads(text)
        for key, kind in _KINDS.items():
            if key in parsed:
                parsed[key] = kind(parsed[key])
        return cls(**parsed)


_DEFAULTS = JobOptions()
_KINDS: Mapping[str, Callable[[Any], Any]] = {
    "dtype": DType,
    "strategy": Strategy,
    "quantized_base": QuantizedBase,
    "soft_prompt": SoftPrompt,
    "combination": CombinationType,
    "adapters": tuple,
    "weights": tuple,
}
"""What JSON does not keep."""


@dataclass(frozen=True)
class Reply:
    """The discussion in which the asker waits for an answer."""

    repo_id: str
    number: int


@dataclass(frozen=True)
class JobRequest:
    """A job as it is asked for. Everything in it was validated: it ends up in arguments and URLs."""

    adapter: str
    """`owner/name`."""
    revision: str
    """Commit sha, 40 hex digits."""
    source: Source
    kind: JobKind = JobKind.MERGE
    ref: str = "refs/heads/main"
    """What named the commit; a newer commit under the same ref replaces this job."""
    subfolder: str = ""
    options: JobOptions = field(default_factory=JobOptions)
    requested_by: str = ""
    """User name; "" for a push."""
    private: bool = True
    """Whether strangers may not see that this job exists. Assumed until the Hub said otherwise."""
    reply: Reply | None = None
    token: bytes | None = None
    """The asker's own token, sealed; None: the bot's."""
    batch: str = ""
    """Jobs of one backfill share it."""
    observed: float = 0.0
    """When the Hub was asked which commit the ref names, seconds since the epoch."""

    @property
    def place(self) -> str:
        """The adapter for people: its repository, and its folder there."""
        return f"{self.adapter}/{self.subfolder}" if self.subfolder else self.adapter

    @property
    def target(self) -> str:
        """The repository that will be written unless another is chosen. One job at a time per target."""
        if self.kind is JobKind.VERIFY:
            return f"verify:{self.options.merged}"
        owner = self.adapter.partition("/")[0]
        return self.options.target_repo or f"{owner}/{default_name(self.adapter, self.subfolder)}"

    @property
    def dedupe(self) -> str:
        """Equal for requests of which one is enough."""
        facts = (self.kind, self.adapter, self.ref, self.revision, self.subfolder, self.options.to_json())
        whose = self.requested_by if self.token is not None else ""
        return hashlib.sha256("\0".join((*facts, whose)).encode()).hexdigest()


@dataclass(frozen=True)
class Stage:
    """What a running job does now."""

    label: str
    done: int = 0
    total: int | None = None
    unit: str = "bytes"


@dataclass(frozen=True)
class Outcome:
    """How a job ended."""

    state: JobState
    exit_code: int | None = None
    message: str = ""
    hint: str = ""
    verdict: str | None = None
    publication: Mapping[str, Any] | None = None
    """Section `publication` of the report."""
    error_type: str = ""
    """Name of the error's class, where one was told; not stored."""


@dataclass(frozen=True)
class Job:
    """A job as it is stored."""

    id: str
    request: JobRequest
    state: JobState
    created: float
    started: float | None
    finished: float | None
    not_before: float
    owner: str | None
    attempt: int
    """How often it was leased. With `owner`, the fence against a worker that lost its lease."""
    failures: int
    """How often it failed in a way that is tried again."""
    lease_until: float | None
    cancel: str | None
    """Why a running job is to stop; None when it is not."""
    stage: Stage | None
    remote: str | None
    """Where it runs when not here: what its runner needs to find it again."""
    round: int
    """How often it was started afresh. A worker that dies does not end what runs elsewhere: the round stays."""
    exit_code: int | None
    message: str
    hint: str
    verdict: str | None
    publication: Mapping[str, Any] | None

    @property
    def open(self) -> bool:
        return self.state in OPEN_STATES
