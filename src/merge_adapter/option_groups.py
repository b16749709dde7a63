"""Options that belong together, one dataclass a group, so that a command names groups and not each option.

Typer reads a command's options from its signature. `grouped` gives a function that takes groups the signature
that Typer wants, each field of a group an option, and hands the groups over filled.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any, get_type_hints

from merge_adapter import options as opt
from merge_adapter.types import (
    Combination,
    CombinationType,
    DType,
    MajoritySign,
    MergeSettings,
    OnFail,
    PublishTo,
    QuantizedBase,
    SoftPrompt,
    Strategy,
)

if TYPE_CHECKING:
    from merge_adapter.publish import PublishSettings
    from merge_adapter.resolve import SourceRequest
    from merge_adapter.verify.settings import VerifySettings


@dataclass(frozen=True)
class BaseOptions:
    """Which base model, and where the adapter lies in its repository."""

    base_model: opt.BaseModelOption = None
    base_revision: opt.BaseRevision = None
    subfolder: opt.Subfolder = ""


@dataclass(frozen=True)
class CombineOptions:
    """What becomes of several adapters."""

    weights: opt.Weights = None
    combination: opt.CombinationOption = CombinationType.SEQUENTIAL
    density: opt.Density = None
    majority_sign: opt.MajoritySignOption = MajoritySign.TOTAL
    svd_rank: opt.SvdRank = None
    seed: opt.CombinationSeed = 0

    def source_request(
        self, adapters: list[str], base: BaseOptions, soft_prompt: SoftPrompt
    ) -> SourceRequest:
        """What the user named, for the pipeline."""
        from merge_adapter.resolve import SourceRequest

        return SourceRequest(
            tuple(adapters),
            tuple(self.weights or ()),
            base.base_model,
            base.base_revision,
            base.subfolder,
            combination=Combination(
                self.combination, self.density, self.majority_sign, self.svd_rank, self.seed
            ),
            soft_prompt=soft_prompt,
        )


@dataclass(frozen=True)
class MergeOptions:
    """How to merge."""

    dtype: opt.DTypeOption = DType.AUTO
    strategy: opt.StrategyOption = Strategy.AUTO
    quantized_base: opt.QuantizedBaseOption = QuantizedBase.REFUSE
    soft_prompt: opt.SoftPromptOption = SoftPrompt.REFUSE
    trust_remote_code: opt.TrustRemoteCode = False

    def settings(self) -> MergeSettings:
        return MergeSettings(
            self.dtype, self.strategy, self.quantized_base, self.trust_remote_code, self.soft_prompt
        )


@dataclass(frozen=True)
class GateOptions:
    """How the gate looks."""

    probe_tokens: opt.ProbeTokens = None
    probes: opt.Probes = None
    dataset_probes: opt.DatasetProbes = True

    def settings(self, dtype: DType, device: str, *, trust_remote_code: bool) -> VerifySettings:
        from merge_adapter.verify.settings import VerifySettings

        return VerifySettings(
            dtype=dtype,
            device=device,
            probe_tokens=self.probe_tokens,
            probes=self.probes,
            dataset_probes=self.dataset_probes,
            trust_remote_code=trust_remote_code,
        )


@dataclass(frozen=True)
class PublishOptions:
    """Where the result goes."""

    publish: opt.PublishOption = PublishTo.PULL_REQUEST
    target_repo: opt.TargetRepo = None
    private: opt.Private = None
    path_in_repo: opt.PathInRepo = None
    on_fail: opt.OnFailOption = OnFail.DRAFT
    license: opt.LicenseOption = None
    allow_base: opt.AllowBase = None

    def settings(self) -> PublishSettings:
        from merge_adapter.publish import PublishSettings

        return PublishSettings(
            publish_to=self.publish,
            target_repo=self.target_repo,
            private=self.private,
            path_in_repo=self.path_in_repo,
            on_fail=self.on_fail,
            license=self.license,
            allow_base=tuple(self.allow_base or ()),
        )


@dataclass(frozen=True)
class OutputOptions:
    """What is shown."""

    json: opt.Json = False
    quiet: opt.Quiet = False


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """`command`, whose parameters may be groups of options, as a function of single options.

    Options stand in the order of the groups. Every field of a group needs a default.
    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, type[Any]] = {}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        hint = hints[parameter.name]
        if is_dataclass(hint):
            assert isinstance(hint, type)
            groups[parameter.name] = hint
            parameters += _parameters(hint)
        else:
            parameters.append(parameter.replace(annotation=hint, kind=inspect.Parameter.KEYWORD_ONLY))

    @wraps(command)
    def call(**given: Any) -> None:
        filled = {
            name: group(**{field.name: given.pop(field.name) for field in fields(group)})
            for name, group in groups.items()
        }
        command(**given, **filled)

    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return call


def _parameters(group: type[Any]) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    for field in fields(group):
        assert field.default is not MISSING, f"{group.__name__}.{field.name} has no default"
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=field.default,
            annotation=hints[field.name],
        )
        for field in fields(group)
    ]
