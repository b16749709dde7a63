"""What passes between the stages: frozen dataclasses, tuples inside them.

The order is that of the pipeline: resolve, plan, merge, verify, publish. The evidence inside a
`Verification` is defined where it is measured, in `verify/`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from enum import StrEnum
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

# --------------------------------------------------------------------------------------- repositories


@dataclass(frozen=True)
class Origin:
    """Where a set of files came from: a repository of the Hub pinned to a commit, or a local folder."""

    repo_id: str | None = None
    """`owner/name`; None for a local folder."""
    revision: str | None = None
    """The 40 hex digits of a commit; None for a local folder."""
    folder: Path | None = None
    """The folder; None for a repository of the Hub."""
    subfolder: str = ""
    """Path inside the repository or folder under which the files lie, "" for its root."""

    def __str__(self) -> str:
        place = f"{self.repo_id}@{(self.revision or '')[:12]}" if self.repo_id else str(self.folder)
        return f"{place}/{self.subfolder}" if self.subfolder else place


class Repository(Protocol):
    """The files of one repository at one commit, or of one local folder, below `origin.subfolder`.

    Every path is relative to that subfolder, with forward slashes. Implemented by `checkpoint.folder.Folder`
    and by `hub.HubRepository`; the core sees only this. All of them raise NotFoundError for a path
    that `files` does not list, and HubError when the Hub fails.
    """

    @property
    def origin(self) -> Origin: ...

    @property
    def files(self) -> Mapping[str, int]:
        """Every file: path -> bytes."""
        ...

    def read(self, path: str, *, offset: int = 0, length: int | None = None) -> bytes:
        """`length` bytes from `offset` (to the end when None) without fetching the rest."""
        ...

    def local(self, path: str) -> Path:
        """A file on this machine that holds the whole content, downloaded when it must be. Never to be changed."""
        ...

    def folder(self, paths: Iterable[str]) -> Path:
        """A folder on this machine that holds at least these files under their own paths; for libraries
        that load from folders. Never to be changed."""
        ...


# -------------------------------------------------------------------------------------------- resolve


@dataclass(frozen=True)
class Adapter:
    """One adapter, its files pinned."""

    repository: Repository
    config: Mapping[str, Any]
    """adapter_config.json as parsed; untrusted."""
    method: str
    """`peft_type` in upper case, for example "LORA"."""
    weight: float = 1.0
    """Its weight where several adapters are merged at once."""


@dataclass(frozen=True)
class BaseModel:
    """The model an adapter belongs to, its files pinned."""

    repository: Repository
    config: Mapping[str, Any]
    """config.json as parsed; untrusted."""


class CombinationType(StrEnum):
    """How several adapters become one update; but for the first, PEFT's names and arithmetic."""

    SEQUENTIAL = "sequential"
    """Every adapter's update times its weight, added up."""
    LINEAR = "linear"
    CAT = "cat"
    SVD = "svd"
    TIES = "ties"
    TIES_SVD = "ties_svd"
    DARE_LINEAR = "dare_linear"
    DARE_LINEAR_SVD = "dare_linear_svd"
    DARE_TIES = "dare_ties"
    DARE_TIES_SVD = "dare_ties_svd"
    MAGNITUDE_PRUNE = "magnitude_prune"
    MAGNITUDE_PRUNE_SVD = "magnitude_prune_svd"


class MajoritySign(StrEnum):
    """How TIES elects the sign of an element: by the sum of its values, or by their number."""

    TOTAL = "total"
    FREQUENCY = "frequency"


@dataclass(frozen=True)
class Combination:
    """How several adapters are combined; their weights stand with each of them."""

    type: CombinationType = CombinationType.SEQUENTIAL
    density: float | None = None
    """The part of the values that pruning keeps, above 0 and at most 1; None for types that prune nothing."""
    majority_sign: MajoritySign = MajoritySign.TOTAL
    svd_rank: int | None = None
    """The rank that an SVD leaves; None for the largest of the adapters'."""
    seed: int = 0
    """Of the random pruning of DARE."""

    def seed_of(self, module: str) -> int:
        """The seed of one module's draws, 63 bit, so that modules can be combined in any order."""
        digest = sha256(f"{self.seed}:{module}".encode()).digest()
        return int.from_bytes(digest[:8], "big") >> 1


@dataclass(frozen=True)
class Resolved:
    """The sources of a merge."""

    adapters: tuple[Adapter, ...]
    """At least one; most merges have exactly one."""
    base: BaseModel
    tokenizer: Repository | None
    """Where the tokenizer and chat template come from: the adapter when it carries them, else the base.
    None when neither has one."""
    notes: tuple[str, ...] = ()
    """What a person should know about the choice, one sentence each."""
    combination: Combination = field(default_factory=Combination)
    """How several adapters become one update."""

    @property
    def adapter(self) -> Adapter:
        """The adapter, or the first of several."""
        return self.adapters[0]


# ------------------------------------------------------------------------------------------- settings


class DType(StrEnum):
    """Target dtype of the floating-point weights; AUTO keeps each tensor's own."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class Strategy(StrEnum):
    """How to merge: in row blocks from the files, or PEFT's merge on the loaded model."""

    AUTO = "auto"
    STREAM = "stream"
    MEMORY = "memory"


class QuantizedBase(StrEnum):
    """Which reference an adapter trained on a quantised base is merged into."""

    REFUSE = "refuse"
    DEQUANTIZE = "dequantize"
    ORIGINAL = "original"


class SoftPrompt(StrEnum):
    """What becomes of learned virtual tokens, which are an input to the model rather than a part of its weights."""

    REFUSE = "refuse"
    TOKENS = "tokens"
    """Real tokens, new rows of the vocabulary, that the tokenizer puts in front of every input."""


@dataclass(frozen=True)
class MergeSettings:
    """What a user can choose about a merge; equal settings and sources give equal bytes."""

    dtype: DType = DType.AUTO
    strategy: Strategy = Strategy.AUTO
    quantized_base: QuantizedBase = QuantizedBase.REFUSE
    trust_remote_code: bool = False
    soft_prompt: SoftPrompt = SoftPrompt.REFUSE


# ------------------------------------------------------------------------------------- merge, package


class FileOrigin(StrEnum):
    """How a file of the merged folder came to be."""

    MERGED = "merged"
    """Weights, at least one tensor of which was changed or added."""
    COPIED = "copied"
    """Byte for byte a file of the base or of the adapter."""
    WRITTEN = "written"
    """Written by merge-adapter: configs it had to edit, the card, the reports."""


@dataclass(frozen=True)
class OutputFile:
    """One file of the merged folder."""

    path: str
    bytes: int
    sha256: str
    """64 hex digits."""
    origin: FileOrigin
    source: str = ""
    """For COPIED: `base` or `adapter`."""


@dataclass(frozen=True)
class MergeResult:
    """What a merge did."""

    files: tuple[OutputFile, ...]
    """The weight files and their index."""
    seconds: float
    bytes_read: int
    bytes_written: int
    bytes_changed: int
    """Bytes of the tensors that were changed or added."""
    tensors_changed: int
    tensors_copied: int
    retained: Mapping[str, float] = field(default_factory=dict)
    """Per changed tensor: the part of the update that survived rounding to the output dtype,
    `<M-W, D>/<D, D>`, 1.0 when all of it did. Absent where it is not defined."""
    notes: tuple[str, ...] = ()


# --------------------------------------------------------------------------------------------- verify


class Verdict(StrEnum):
    """The gate's answer. Only PASS is ever offered as ready."""

    PASS = "pass"
    FAIL = "fail"
    INCONCLUSIVE = "inconclusive"


@dataclass(frozen=True)
class Verification:
    """The verdict with its evidence, as it stands in merge_report.json."""

    verdict: Verdict
    reasons: tuple[str, ...]
    """Why, one sentence each, the most telling first; what would decide it when inconclusive."""
    evidence: Mapping[str, Any] = field(default_factory=dict)
    """JSON-ready sections: weights, modules, outputs, greedy, tokenizer, mutants, probes."""


# -------------------------------------------------------------------------------------------- publish


class PublishTo(StrEnum):
    """Where the merged folder goes."""

    PULL_REQUEST = "pull-request"
    NEW_REPO = "new-repo"
    NONE = "none"


class OnFail(StrEnum):
    """What happens to a merge whose verdict is not pass."""

    DRAFT = "draft"
    DISCARD = "discard"


class Operation(StrEnum):
    """What publishing did."""

    CREATED = "created"
    UPDATED = "updated"
    UNCHANGED = "unchanged"


@dataclass(frozen=True)
class Publication:
    """Where the merged model can be seen."""

    repo: str
    url: str
    operation: Operation
    commit: str
    """Commit sha that holds the files."""
    number: int | None = None
    """Number of the pull request; None for a commit on main."""
    draft: bool = False
    """True when the pull request waits for a verdict of pass."""
    bytes_uploaded: int | None = None
    """Of the files that were handed to the Hub; None where nothing had to be committed."""
    bytes_saved: int | None = None
    """Of the files that the Hub held already or copied on the server."""


# ------------------------------------------------------------------------------------------- progress


class Task(Protocol):
    """One running stage of work with a total, from `Progress.task`."""

    def advance(self, amount: int, /) -> None:
        """`amount` more units (bytes, unless the stage said otherwise) are done. Thread-safe."""
        ...


class Progress(Protocol):
    """How the core tells that it moves; `report.progress` shows it, the core never prints."""

    def task(self, label: str, total: int | None, *, unit: str = "bytes") -> AbstractContextManager[Task]:
        """A stage that ends when the context does. `total` None when it is unknown; nothing is counted then, unless
        another `unit` than bytes is named."""
        ...

    def note(self, text: str) -> None:
        """One sentence worth showing now."""
        ...


class _SilentTask(AbstractContextManager["_SilentTask"]):
    def advance(self, amount: int, /) -> None:
        pass

    def __exit__(self, *exc: object) -> None:
        pass


class Silent:
    """A Progress that shows nothing."""

    def task(self, label: str, total: int | None, *, unit: str = "bytes") -> _SilentTask:  # noqa: ARG002
        return _SilentTask()

    def note(self, text: str) -> None:
        pass
