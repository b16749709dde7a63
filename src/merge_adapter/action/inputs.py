"""What a user of the action can set, read from INPUT_* alone and checked before anything else happens.

The runner passes an input as INPUT_NAME in upper case with its hyphens kept. A `run:` step in a job container
passes the same by `env:`; a shell drops names that hold a hyphen, so an underscore is accepted as well.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from enum import StrEnum
from pathlib import Path
from typing import TypeVar

from merge_adapter.errors import InputError
from merge_adapter.sizes import parse_bytes, parse_number, parse_whole
from merge_adapter.types import (
    Combination,
    CombinationType,
    DType,
    MajoritySign,
    OnFail,
    PublishTo,
    QuantizedBase,
    SoftPrompt,
    Strategy,
)

Choice = TypeVar("Choice", bound=StrEnum)

NAMES = (
    "adapter",
    "base-model",
    "base-revision",
    "subfolder",
    "combine-with",
    "weights",
    "combination",
    "density",
    "majority-sign",
    "svd-rank",
    "seed",
    "path",
    "watch",
    "publish",
    "target-repo",
    "path-in-repo",
    "private",
    "on-fail",
    "license",
    "allow-base",
    "dtype",
    "device",
    "strategy",
    "quantized-base",
    "soft-prompt",
    "trust-remote-code",
    "verify",
    "probe-tokens",
    "probes",
    "dataset-probes",
    "disk-budget",
    "output",
    "hf-token",
    "github-token",
)
"""Every input, in the order of action.yml."""
SECRETS = ("hf-token", "github-token")
_OF_THE_RUNNER = frozenset({"args", "entrypoint"})
"""What the runner itself adds for container actions."""
_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")
_OWNER_PATTERN = re.compile(r"[\w.-]+/(\*|[\w.-]+)")
_FEWEST_PROBE_TOKENS = 16
_OPTION = re.compile(r"(?<![\w-])--([a-z][a-z-]*)")
OPTIONS_ARE_INPUTS = "An option --NAME is the input NAME of the action."


@dataclass(frozen=True)
class Inputs:
    """The inputs, checked one by one and against each other. See action.yml for what each means."""

    adapters: tuple[str, ...] = ()
    base_model: str | None = None
    base_revision: str | None = None
    subfolder: str = ""
    combine_with: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    combination: Combination = field(default_factory=Combination)
    path: str = "."
    watch: str | None = None
    publish: PublishTo = PublishTo.PULL_REQUEST
    target_repo: str | None = None
    path_in_repo: str | None = None
    private: bool | None = None
    on_fail: OnFail = OnFail.DRAFT
    license: str | None = None
    allow_base: tuple[str, ...] = ()
    dtype: DType = DType.AUTO
    device: str = "auto"
    strategy: Strategy = Strategy.AUTO
    quantized_base: QuantizedBase = QuantizedBase.REFUSE
    soft_prompt: SoftPrompt = SoftPrompt.REFUSE
    trust_remote_code: bool = False
    verify: bool = True
    probe_tokens: int | None = None
    probes: Path | None = None
    dataset_probes: bool = True
    disk_budget: int | None = None
    """Bytes."""
    output: Path | None = None


@dataclass(frozen=True)
class Secrets:
    """Tokens; a class of its own so that the inputs can be shown."""

    hf_token: str = ""
    github_token: str = ""

    def __repr__(self) -> str:
        return "Secrets(…)"


def read_inputs(
    environment: Mapping[str, str] | None = None, *, instead: Iterable[tuple[str, str]] = ()
) -> Inputs:
    """The inputs without the tokens, which `take_secrets` reads. Raises InputError naming the first that is wrong.

    `instead` are names and values that an event sets; they take the place of the workflow's.
    """
    given = _given(os.environ if environment is None else environment) | dict(instead)
    _check_names(given)
    inputs = Inputs(
        adapters=split_lines(given.get("adapter", "")),
        base_model=given.get("base-model"),
        base_revision=given.get("base-revision"),
        subfolder=given.get("subfolder", ""),
        combine_with=split_lines(given.get("combine-with", "")),
        weights=tuple(
            parse_number(text, what="a line of the input weights")
            for text in split_lines(given.get("weights", ""))
        ),
        combination=_combination(given),
        path=given.get("path", "."),
        watch=given.get("watch"),
        publish=_choice(given, "publish", PublishTo.PULL_REQUEST),
        target_repo=given.get("target-repo"),
        path_in_repo=given.get("path-in-repo"),
        private=_switch(given, "private", default=None),
        on_fail=_choice(given, "on-fail", OnFail.DRAFT),
        license=given.get("license"),
        allow_base=_owners(given),
        dtype=_choice(given, "dtype", DType.AUTO),
        device=_device(given),
        strategy=_choice(given, "strategy", Strategy.AUTO),
        quantized_base=_choice(given, "quantized-base", QuantizedBase.REFUSE),
        soft_prompt=_choice(given, "soft-prompt", SoftPrompt.REFUSE),
        trust_remote_code=bool(_switch(given, "trust-remote-code", default=False)),
        verify=bool(_switch(given, "verify", default=True)),
        probe_tokens=_whole(given, "probe-tokens", least=_FEWEST_PROBE_TOKENS),
        probes=Path(given["probes"]) if "probes" in given else None,
        dataset_probes=bool(_switch(given, "dataset-probes", default=True)),
        disk_budget=_disk_budget(given),
        output=Path(given["output"]) if "output" in given else None,
    )
    _check_together(inputs)
    return inputs


def take_secrets(environment: dict[str, str] | os._Environ[str] | None = None) -> Secrets:
    """The tokens, taken out of the environment so that no child process inherits them under these names."""
    given = os.environ if environment is None else environment
    found = {"hf-token": "", "github-token": ""}
    for key in list(given):
        name = _name(key)
        if name in found:
            found[name] = given.pop(key).strip() or found[name]
    return Secrets(found["hf-token"], found["github-token"])


def hint_here(hint: str) -> str:
    """A hint of the stages, which speak of the command line's options, for someone who has inputs."""
    return f"{hint} {OPTIONS_ARE_INPUTS}" if set(_OPTION.findall(hint)) & set(NAMES) else hint


def _given(environment: Mapping[str, str]) -> dict[str, str]:
    """Inputs that are not blank, by their name in action.yml."""
    found: dict[str, str] = {}
    for key, value in environment.items():
        name = _name(key)
        if name is None or not value.strip():
            continue
        if name in SECRETS:
            value = "(not shown)"
        if found.setdefault(name, value.strip()) != value.strip():
            raise InputError(
                f"the input {name} is set twice, with a hyphen and with an underscore, and the two differ",
                hint=f"Keep one of INPUT_{name.upper()} and INPUT_{name.upper().replace('-', '_')}.",
            )
    return found


def _name(key: str) -> str | None:
    if not key.startswith("INPUT_"):
        return None
    return key.removeprefix("INPUT_").lower().replace("_", "-")


def _check_names(given: Mapping[str, str]) -> None:
    unknown = sorted(name for name in given if name not in NAMES and name not in _OF_THE_RUNNER)
    if unknown:
        close = get_close_matches(unknown[0], NAMES, n=1)
        meant = f"Did you mean {close[0]}? " if close else ""
        raise InputError(
            f"there is no input {unknown[0]!r}", hint=f"{meant}The inputs are: {', '.join(NAMES)}."
        )


def _check_together(inputs: Inputs) -> None:
    if inputs.adapters and inputs.watch:
        raise InputError(
            "the inputs adapter and watch exclude each other: one names adapters, the other looks for them",
            hint="Keep one of the two.",
        )
    _check_combined(inputs)
    if not inputs.verify and (inputs.probe_tokens is not None or inputs.probes is not None):
        raise InputError(
            "probe-tokens and probes say how to verify, but verify is false",
            hint="Remove them, or leave verify out.",
        )
    if not inputs.verify and inputs.publish is not PublishTo.NONE and inputs.on_fail is OnFail.DISCARD:
        raise InputError(
            "verify is false and on-fail is discard: a merge that is not verified never passes, so nothing would "
            "ever be published",
            hint="Leave verify out, or set publish: none.",
        )
    if inputs.publish is PublishTo.NONE:
        for name, value in (("target-repo", inputs.target_repo), ("path-in-repo", inputs.path_in_repo)):
            if value:
                raise InputError(
                    f"{name} says where to publish, but publish is none", hint=f"Remove {name} or publish."
                )
    if inputs.base_revision and not inputs.base_model and inputs.watch:
        raise InputError(
            "base-revision without base-model does not fit watch: the adapters found may have different bases"
        )


def _check_combined(inputs: Inputs) -> None:
    """combine-with belongs to one adapter: several lines in `adapter` are several merges."""
    if inputs.combine_with and (inputs.watch or len(inputs.adapters) > 1):
        raise InputError(
            "combine-with names adapters that are merged into one model with another, but several others are named",
            hint="Name one adapter in the input adapter, and the rest in combine-with; leave watch out.",
        )
    expected = 1 + len(inputs.combine_with)
    if inputs.weights and len(inputs.weights) != expected:
        raise InputError(
            f"weights has {len(inputs.weights)} numbers, expected {expected}: one for the adapter, and one for each "
            "line of combine-with",
            hint="Write them in that order, one a line; or leave weights out for 1 each.",
        )


def _combination(given: Mapping[str, str]) -> Combination:
    return Combination(
        _choice(given, "combination", CombinationType.SEQUENTIAL),
        parse_number(given["density"], what="the input density") if "density" in given else None,
        _choice(given, "majority-sign", MajoritySign.TOTAL),
        _whole(given, "svd-rank"),
        _whole(given, "seed") or 0,
    )


def split_lines(text: str) -> tuple[str, ...]:
    """One value a line; commas are accepted too, since no Hub id holds one."""
    return tuple(part.strip() for part in re.split(r"[\n,]", text) if part.strip())


def _choice(given: Mapping[str, str], name: str, default: Choice) -> Choice:
    value = given.get(name)
    if value is None:
        return default
    kind = type(default)
    try:
        return kind(value.lower())
    except ValueError:
        raise InputError(
            f"the input {name} is {value!r}, expected one of: {', '.join(member.value for member in kind)}"
        ) from None


def _switch(given: Mapping[str, str], name: str, *, default: bool | None) -> bool | None:
    value = given.get(name)
    if value is None:
        return default
    if value.lower() not in ("true", "false"):
        raise InputError(f"the input {name} is {value!r}, expected true or false")
    return value.lower() == "true"


def _device(given: Mapping[str, str]) -> str:
    value = given.get("device", "auto").lower()
    if not _DEVICE.fullmatch(value):
        raise InputError(f"the input device is {value!r}, expected auto, cpu, cuda or cuda:N")
    return value


def _owners(given: Mapping[str, str]) -> tuple[str, ...]:
    patterns = split_lines(given.get("allow-base", ""))
    for pattern in patterns:
        if not _OWNER_PATTERN.fullmatch(pattern):
            raise InputError(f"allow-base has {pattern!r}, expected OWNER/* or OWNER/NAME on each line")
    return patterns


def _whole(given: Mapping[str, str], name: str, *, least: int = 0) -> int | None:
    value = given.get(name)
    return parse_whole(value, what=f"the input {name}", least=least) if value is not None else None


def _disk_budget(given: Mapping[str, str]) -> int | None:
    value = given.get("disk-budget")
    return parse_bytes(value, what="the input disk-budget") if value is not None else None
