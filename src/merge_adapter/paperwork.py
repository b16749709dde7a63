"""What a merge says of itself: merge_report.json, the page beside it, and the model card."""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_adapter.plan import MergePlan
from merge_adapter.report import document
from merge_adapter.types import MergeResult, MergeSettings, OutputFile, Resolved, Verification

if TYPE_CHECKING:
    from merge_adapter.package import Packaged
    from merge_adapter.publish import PublishSettings

REPORT_PAGE = "merge_report.html"


@dataclass(frozen=True)
class Work:
    """What the stages before the reports gave."""

    sources: Resolved
    plan: MergePlan
    settings: MergeSettings
    result: MergeResult
    packaged: Packaged
    verification: Verification
    license: str | None = None
    """The licence that was chosen for the publication, where one was."""

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
            license=self.license,
        )


def write_reports(folder: Path, work: Work, publishing: PublishSettings | None) -> dict[str, Any]:
    """Card, page and merge_report.json, the last of which names every other file."""
    from merge_adapter.card import write_card
    from merge_adapter.report.evidence import evidence_markdown
    from merge_adapter.report.page import write_page

    draft = work.document()
    target = publishing.target if publishing is not None else None
    card = write_card(
        folder,
        sources=work.sources,
        plan=work.plan,
        report=draft,
        table=evidence_markdown(draft["verification"]),
        license=work.license,
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
