"""The pipeline: resolve, plan, merge, package, verify, publish, in this order and nothing skipped unsaid.

One function per thing a person can ask for. Each returns what happened; none prints or exits.
"""

from __future__ import annotations

import resource
import shutil
import sys
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_adapter.checkpoint.quantization import quantization_of
from merge_adapter.domain import with_domain
from merge_adapter.errors import StorageError
from merge_adapter.plan import MergePlan, make_plan
from merge_adapter.report import document
from merge_adapter.resolve import SourceRequest, open_reference, resolve
from merge_adapter.types import (
    MergeResult,
    MergeSettings,
    OutputFile,
    Progress,
    Publication,
    PublishTo,
    QuantizedBase,
    Resolved,
    Verdict,
    Verification,
)
from merge_adapter.verify.settings import VerifySettings
from merge_adapter.workspace import check_destination, check_space, deliver, partial_folder, storage_errors

if TYPE_CHECKING:
    from merge_adapter.hub import Hub
    from merge_adapter.package import Packaged
    from merge_adapter.publish import PublishSettings

REPORT_PAGE = "merge_report.html"


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
    """What a run did. `merged` is None when the Hub already had the result."""

    report: Mapping[str, Any]
    """merge_report.json with the section `publication` where something was published."""
    verdict: Verdict
    reasons: tuple[str, ...]
    publication: Publication | None
    merged: Merged | None


def plan_merge(request: MergeRequest, *, hub: Hub) -> tuple[Resolved, MergePlan]:
    """What `merge` would do, from configs and headers alone."""
    sources = resolve(request.source, hub=hub, quantized_base=request.settings.quantized_base)
    return sources, make_plan(sources, request.settings)


def merge_to_folder(request: MergeRequest, output: Path, *, hub: Hub, progress: Progress) -> Merged:
    """Merge into `output`, which appears only when it is whole; `output`.rejected when the gate says no.

    Raises whatever a stage raises; then neither folder exists.
    """
    _check_output(output)
    sources, plan = plan_merge(request, hub=hub)
    return _build(sources, plan, _asking(request, sources, hub, progress), output, progress)


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

    candidate = open_reference(merged, what="merged model", hub=hub, subfolder=subfolder)
    sources = resolve(source, hub=hub, quantized_base=quantized_base)
    gate = with_domain(gate, sources, hub=hub, progress=progress)
    folder = candidate.folder(candidate.files)
    return sources, verify(folder, sources, settings=gate, progress=progress)


def run(
    request: MergeRequest,
    publishing: PublishSettings,
    *,
    hub: Hub,
    progress: Progress,
    output: Path | None = None,
) -> RunOutcome:
    """Resolve, merge, verify and publish; with `output`, keep the merged folder there.

    Sources and settings already published are not merged again: the outcome says "unchanged".
    """
    from merge_adapter.publish import find_published, prepare, publish

    if output is not None:
        _check_output(output)
    sources = resolve(request.source, hub=hub, quantized_base=request.settings.quantized_base)
    if publishing.publish_to is not PublishTo.NONE:
        publishing = prepare(sources, request.settings, publishing, hub=hub)
        published = find_published(sources, request.settings, publishing, hub=hub)
        if published is not None and output is None:
            return _unchanged(published.report, published.publication)
    plan = make_plan(sources, request.settings)
    with ExitStack() as stack:
        if output is None:
            scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="merge-adapter-"))
            place = Path(scratch) / "merged"
        else:
            place = output
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
        from merge_adapter.verify.quantized import check_library

        check_library(sources.base.config)  # said before the work, not after it
    check_space(output.parent, plan.disk_bytes)
    with partial_folder(output) as partial, storage_errors(output):
        result = merge(
            plan,
            sources,
            partial,
            settings=request.settings,
            device=request.device,
            threads=request.threads,
            progress=progress,
        )
        packaged = package(sources, plan, partial, settings=request.settings)
        verification = _judge(partial, sources, request, progress)
        work = _Work(sources, plan, request.settings, result, packaged, verification)
        report = _write_reports(partial, work, publishing)
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


@dataclass(frozen=True)
class _Work:
    """What the stages before the reports gave."""

    sources: Resolved
    plan: MergePlan
    settings: MergeSettings
    result: MergeResult
    packaged: Packaged
    verification: Verification

    def document(self, *written: OutputFile) -> dict[str, Any]:
        """The report, with the files `written` after the stages."""
        result = self.result
        return document.build(
            sources=self.sources,
            settings=self.settings,
            adapter_tensors=self.plan.adapter_tensors,
            consumed=self.plan.consumed,
            files=(*result.files, *self.packaged.files, *written),
            merge={
                "seconds": round(result.seconds, 3),
                "bytes_read": result.bytes_read,
                "bytes_written": result.bytes_written,
                "bytes_changed": result.bytes_changed,
                "peak_rss_bytes": peak_rss_bytes(),
                "tensors_changed": result.tensors_changed,
                "tensors_copied": result.tensors_copied,
                "strategy": self.plan.strategy.value,
            },
            verification=self.verification,
            notes=(*self.sources.notes, *self.plan.notes, *result.notes, *self.packaged.notes),
        )


def _write_reports(folder: Path, work: _Work, publishing: PublishSettings | None) -> dict[str, Any]:
    """Card, page and merge_report.json, the last of which names every other file."""
    from merge_adapter.card import write_card
    from merge_adapter.report.evidence import verdict_markdown
    from merge_adapter.report.page import write_page

    draft = work.document()
    target = publishing.target if publishing is not None else None
    card = write_card(
        folder,
        sources=work.sources,
        plan=work.plan,
        report=draft,
        table=verdict_markdown(draft["verification"]),
        license=publishing.license if publishing is not None else None,
        place=target.repo_id if target is not None else None,
        subfolder=target.path_in_repo if target is not None else "",
    )
    page = write_page(folder / REPORT_PAGE, draft)
    report = work.document(card, page)
    document.write(report, folder)
    return report


def peak_rss_bytes() -> int:
    """The most memory this process has had resident, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def rejected(output: Path) -> Path:
    """Where a folder goes that the gate did not pass."""
    return output.with_name(output.name + ".rejected")


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
