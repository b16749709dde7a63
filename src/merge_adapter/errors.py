"""Everything that can go wrong on purpose, one tree.

    MergeAdapterError                      exit 1, never raised itself
    ├── InputError                         exit 2   bad usage or bad input
    │   ├── NotFoundError                           no such folder, file, repository or revision
    │   ├── MalformedError                          a file that is not what its name says
    │   ├── StorageError                            the disk is full or not writable
    │   └── MemoryShortError                        the machine, or its GPU, has too little memory
    ├── UnmergeableError                   exit 3   this adapter or this base cannot be merged
    │   ├── MethodError                             the PEFT method, or this use of it, has no merge
    │   ├── AccountingError                         adapter tensors left over, used twice, or without a target
    │   │   └── UnknownModulesError                 of modules that no class of the base has
    │   ├── ShapeError                              adapter and base do not fit each other
    │   └── BaseModelError                          the base cannot serve as one (quantised, wrong, changed at init)
    ├── NotEquivalentError                 exit 4   the gate said fail or inconclusive
    ├── RemoteError                        exit 5   the Hub or GitHub could not be reached, or refused
    │   ├── HubError
    │   └── GitHubError
    └── PolicyError                        exit 6   refused: a licence, a gate, a private base, untrusted code

An error says what failed, on what, what was expected against what was found, and what to do next. The
last of these is `hint`. Only the outermost boundary (`cli.py`, `action.py`, the bot's worker) turns an
error into a message, an annotation or an exit code.
"""

from __future__ import annotations

from enum import IntEnum
from typing import ClassVar


class ExitCode(IntEnum):
    """Exit codes of every `merge-adapter` command; part of the stable interface."""

    DONE = 0
    BUG = 1
    INPUT = 2
    UNMERGEABLE = 3
    NOT_EQUIVALENT = 4
    REMOTE = 5
    POLICY = 6
    INTERRUPTED = 130


class MergeAdapterError(Exception):
    """The root. `hint` is the next thing to do, one or two sentences, or "" when there is none."""

    exit_code: ClassVar[ExitCode] = ExitCode.BUG

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class InputError(MergeAdapterError):
    """Bad usage or bad input: an option, a file, a header, a config."""

    exit_code = ExitCode.INPUT


class NotFoundError(InputError):
    """A folder, file, repository or revision that does not exist (or that the token may not see)."""


class MalformedError(InputError):
    """A file that exists but is not what it claims to be."""


class StorageError(InputError):
    """The place to write to is full, read-only or already taken."""


class MemoryShortError(InputError):
    """The machine, or its GPU, has too little memory for what was asked."""


class UnmergeableError(MergeAdapterError):
    """This adapter or this base cannot be merged; the message says why, the hint what to do instead."""

    exit_code = ExitCode.UNMERGEABLE


class MethodError(UnmergeableError):
    """The PEFT method, or the way this adapter uses it, has no merge into plain weights."""


class AccountingError(UnmergeableError):
    """An adapter tensor is left over, is used twice, or has no tensor of the base to change.

    `tensors` holds the names concerned, all of them.
    """

    def __init__(self, message: str, *, tensors: tuple[str, ...], hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.tensors = tensors


class UnknownModulesError(AccountingError):
    """Adapter tensors belong to modules that no class of the base has."""


class ShapeError(UnmergeableError):
    """Adapter and base do not fit: the shapes of a tensor, a vocabulary or a head disagree."""


class BaseModelError(UnmergeableError):
    """The base named cannot serve as one: stored quantised, changed at initialisation, of unknown architecture."""


class NotEquivalentError(MergeAdapterError):
    """The merged model is not equivalent to base + adapter, or that could not be shown."""

    exit_code = ExitCode.NOT_EQUIVALENT


class RemoteError(MergeAdapterError):
    """A service could not be reached, or refused for reasons other than policy."""

    exit_code = ExitCode.REMOTE


class HubError(RemoteError):
    """The Hugging Face Hub could not be reached, failed, or refused a call."""


class GitHubError(RemoteError):
    """GitHub could not be reached, failed, or refused a call."""


class PolicyError(MergeAdapterError):
    """Refused by policy: a licence, a gate, a private source, an untrusted code path."""

    exit_code = ExitCode.POLICY


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether this is how Python or torch says that memory could not be had. torch has no class for it on a CPU."""
    words = str(error)
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (
            isinstance(error, RuntimeError)
            and ("can't allocate memory" in words or "not enough memory" in words)
        )
    )
