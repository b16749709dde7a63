"""The pipeline: resolve, plan, merge, package, verify, publish, in this order and nothing skipped unsaid.

One function per thing a person can ask for. Each returns what happened; none prints or exits.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from merge_adapter.checkpoint.quantization import quantization_of
from merge_adapter.domain import with_domain
from merge_adapter.errors import InputError, NotFoundError, StorageError
from merge_adapter.paperwork import Work, write_reports
from merge_adapter.plan import MergePlan, make_plan
from merge_adapter.report import document
from merge_adapter.resolve import SourceRequest, open_reference, resolve
from merge_adapter.staging.ahead import fetched_ahead
from merge_adapter.staging.needs import exceeds
from merge_adapter.types import (
    MergeSettings,
    Progress,
    Publication,
    PublishTo,
    QuantizedBase,
    Resolved,
    Verdict,
    Verification,
)
from merge_adapter.verify.settings import VerifySettings
from merge_adapter.workspace import (
    check_destination,
    check_space,
    deliver,
    memory_errors,
    partial_folder,
    storage_errors,
    temporary_files,
)

if TYPE_CHECKING:
    from merge_adapter.hub import Hub
    from merge_adapter.publish import PublishSettings


@dataclass(frozen=True)
class MergeRequest:
    """What to merge, and how."""

    source: SourceRequest
    settings: MergeSettings = field(default_factory=MergeSettings)
    gate: VerifySettings | None = field(default_factory=VerifySettings)
    """None: the gate is not run, and the report says so."""
    device: str = "auto"
    threads: int | None = None
    """None: one per core."""


@dataclass(frozen=True)
class Merged:
    """A merged folder with its report."""

    folder: Path
    """Where it is: the place asked for, or `<place>.rejected` when the verdict is not pass."""
    report: Mapping[str, Any]
    """merge_report.json as written there."""
    verification: Verification
    sources: Resolved
    plan: MergePlan

    @property
    def accepted(self) -> bool:
        """Whether the gate passed it, or was told not to look."""
        return self.verification.verdict is Verdict.PASS or self.verification == document.not_verified()


@dataclass(frozen=True)
class RunOutcome:
    """What a run did. `merged` is None when the Hub already had the result, or shards only passed through."""

    report: Mapping[str, Any]
    """merge_report.json with the section `publication` where something was published."""
    verdict: Verdict
    reasons: tuple[str, ...]
    publication: Publication | None
    merged: Merged | None
    stages: Mapping[str, float] | None = None
    """Within a disk budget: how many seconds each stage was at work, and all of them side by side (`total`)."""


def plan_merge(request: MergeRequest, *, hub: Hub) -> tuple[Resolved, MergePlan]:
    """What `merge` would do, from configs and headers alone."""
    sources = resolve(request.source, hub=hub, quantized_base=request.settings.quantized_base)
    return sources, make_plan(sources, request.settings)


@temporary_files()
@memory_errors()
def merge_to_folder(request: MergeRequest, output: Path, *, hub: Hub, progress: Progress) -> Merged:
    """Merge into `output`, which appears only when it is whole; `output`.rejected when the gate says no.

    Raises whatever a stage raises; then neither folder exists.
    """
    _check_output(output)
    sources, plan = plan_merge(request, hub=hub)
    return _build(sources, plan, _asking(request, sources, hub, progress), output, progress)


@temporary_files()
@memory_errors()
def verify_merged(
    merged: str,
    source: SourceRequest,
    gate: VerifySettings,
    *,
    hub: Hub,
    progress: Progress,
    subfolder: str = "",
    quantized_base: QuantizedBase = QuantizedBase.REFUSE,
) -> tuple[Resolved, Verification]:
    """Judge a merged checkpoint, whoever made it. Writes nothing to it."""
    from merge_adapter.verify import verify
    from merge_adapter.verify.models.storage import PICKLED, SAFETENSORS

    candidate = open_reference(merged, what="merged model", hub=hub, subfolder=subfolder)
    if not {"config.json", "modules.json", *SAFETENSORS, *PICKLED}.intersection(candidate.files):
        raise NotFoundError(
            f"there is no model in {candidate.origin}: neither a config.json nor weights",
            hint="Check the name. A merge that waits in pull request N is OWNER/NAME@refs/pr/N; where the model lies "
            "in a folder, say --merged-subfolder.",
        )
    sources = resolve(source, hub=hub, quantized_base=quantized_base)
    gate = with_domain(gate, sources, hub=hub, progress=progress)
    folder = candidate.folder(candidate.files)
    return sources, verify(folder, sources, settings=gate, progress=progress)


@temporary_files()
@memory_errors()
def run(
    request: MergeRequest,
    publishing: PublishSettings,
    *,
    hub: Hub,
    progress: Progress,
    output: Path | None = None,
    disk_budget: int | None = None,
) -> RunOutcome:
    """Resolve, merge, verify and publish; with `output`, keep the merged folder there.

    With `disk_budget`, in bytes, shards pass through one after another where base and merged model need more than that.
    Sources and settings already published are not merged again: the outcome says "unchanged".
    """
    from merge_adapter.publish import find_published, prepare, publish, repinned

    if output is not None:
        _check_output(output)
    sources = resolve(request.source, hub=hub, quantized_base=request.settings.quantized_base)
    if publishing.publish_to is not PublishTo.NONE:
        publishing = prepare(sources, request.settings, publishing, hub=hub)
        sources = repinned(sources, publishing, hub=hub)
        published = find_published(sources, request.settings, publishing, hub=hub)
        if published is not None and output is None:
            return _unchanged(published.report, published.publication)
    plan = make_plan(sources, request.settings)
    if disk_budget is not None and exceeds(disk_budget, sources, plan, request.settings):
        _check_nothing_kept(output, disk_budget)
        from merge_adapter.staging.run import run_within

        request = _asking(request, sources, hub, progress)
        return run_within(disk_budget, sources, plan, request, publishing, hub=hub, progress=progress)
    with ExitStack() as stack:
        place = output
        if place is None:
            place = Path(stack.enter_context(TemporaryDirectory(prefix="merge-adapter-"))) / "merged"
        request = _asking(request, sources, hub, progress)
        merged = _build(sources, plan, request, place, progress, publishing)
        publication = None
        report = merged.report
        if publishing.publish_to is not PublishTo.NONE:
            publication = publish(
                merged.folder,
                report,
                merged.verification,
                hub=hub,
                settings=publishing,
                progress=progress,
            )
        if publication is not None:
            report = {**report, "publication": document.publication_entry(publication)}
        return RunOutcome(
            report=report,
            verdict=merged.verification.verdict,
            reasons=merged.verification.reasons,
            publication=publication,
            merged=merged,
        )


def publish_folder(folder: Path, publishing: PublishSettings, *, hub: Hub, progress: Progress) -> RunOutcome:
    """Publish a folder merged earlier, by its report; refused when its files no longer match that report."""
    from merge_adapter.publish import prepare_folder, publish

    report = document.read(folder)
    verdict = Verdict(report["verification"]["verdict"])
    reasons = tuple(report["verification"]["reasons"])
    publishing = prepare_folder(report, publishing, hub=hub)
    publication = publish(
        folder,
        report,
        Verification(verdict, reasons),
        hub=hub,
        settings=publishing,
        progress=progress,
    )
    if publication is not None:
        report = {**report, "publication": document.publication_entry(publication)}
    return RunOutcome(report=report, verdict=verdict, reasons=reasons, publication=publication, merged=None)


def _asking(request: MergeRequest, sources: Resolved, hub: Hub, progress: Progress) -> MergeRequest:
    """`request` with what its gate will ask: documents of the adapter's own domain, where there are any."""
    if request.gate is None:
        return request
    return replace(request, gate=with_domain(request.gate, sources, hub=hub, progress=progress))


def _unchanged(report: Mapping[str, Any], publication: Publication) -> RunOutcome:
    verdict = Verdict(report["verification"]["verdict"])
    return RunOutcome(
        report={**report, "publication": document.publication_entry(publication)},
        verdict=verdict,
        reasons=tuple(report["verification"]["reasons"]),
        publication=publication,
        merged=None,
    )


def _build(
    sources: Resolved,
    plan: MergePlan,
    request: MergeRequest,
    output: Path,
    progress: Progress,
    publishing: PublishSettings | None = None,
) -> Merged:
    from merge_adapter.merge import merge
    from merge_adapter.package import package

    if request.gate is not None and quantization_of(sources.base.config) is not None:
        from merge_adapter.verify.models.quantized import check_library

        check_library(sources.base.config)  # said before the work, not after it
    check_space(output.parent, plan.disk_bytes)
    with partial_folder(output) as partial, storage_errors(output):
        with fetched_ahead(sources, plan) as arriving:
            result = merge(
                plan,
                arriving,
                partial,
                settings=request.settings,
                device=request.device,
                threads=request.threads,
                progress=progress,
            )
        packaged = package(sources, plan, partial, settings=request.settings)
        verification = _judge(partial, sources, request, progress)
        license = publishing.license if publishing is not None else None
        work = Work(sources, plan, request.settings, result, packaged, verification, license)
        report = write_reports(partial, work, publishing)
        merged = Merged(output, report, verification, sources, plan)
        if not merged.accepted:
            merged = replace(merged, folder=rejected(output))
            shutil.rmtree(merged.folder, ignore_errors=True)
        deliver(partial, merged.folder)
        return merged


def _judge(folder: Path, sources: Resolved, request: MergeRequest, progress: Progress) -> Verification:
    if request.gate is None:
        return document.not_verified()
    from merge_adapter.verify import verify

    return verify(folder, sources, settings=request.gate, progress=progress)


def rejected(output: Path) -> Path:
    """Where a folder goes that the gate did not pass."""
    return output.with_name(output.name + ".rejected")


def _check_nothing_kept(output: Path | None, disk_budget: int) -> None:
    """Raise InputError where a folder is to stay that the disk budget does not hold."""
    if output is not None:
        raise InputError(
            f"the merged model cannot be kept in {output} within a disk budget of {disk_budget:,} bytes",
            hint="Leave out one of --output and --disk-budget.",
        )


def _check_output(output: Path) -> None:
    """Raise StorageError unless a merge may end at `output`, and a rejected one beside it.

    A rejected folder of an earlier run gives way to the next; anything else of that name is not ours.
    """
    check_destination(output)
    place = rejected(output)
    if place.exists() and not (place / document.REPORT_FILE).is_file():
        raise StorageError(
            f"{place} is in the way, where a rejected merge would go",
            hint="Move it, or name another --output.",
        )
