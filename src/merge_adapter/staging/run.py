"""From Hub to Hub with little disk: the whole job.

plan -> what must be here at the same time -> open the gate on headers alone
     -> fetch | merge | judge | send, shard by shard
     -> one commit to a draft -> the outputs part on what the Hub serves -> ready, or still a draft
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from merge_adapter.checkpoint.layout import Layout
from merge_adapter.errors import StorageError
from merge_adapter.merge import merge, write_index
from merge_adapter.paperwork import Work, write_reports
from merge_adapter.pipeline import MergeRequest, RunOutcome
from merge_adapter.plan import MergePlan
from merge_adapter.publish import Outbox, PublishSettings, discard, publish
from merge_adapter.publish.contents import Gone
from merge_adapter.report import document
from merge_adapter.report.evidence import verdict_markdown
from merge_adapter.sizes import human_bytes
from merge_adapter.staging.ledger import Ledger
from merge_adapter.staging.needs import (
    Needs,
    check_budget,
    check_possible,
    copied_by_hub,
    measure,
    passage,
    weights_of,
)
from merge_adapter.staging.outputs import judge_outputs, judge_without_outputs
from merge_adapter.staging.paging import HerePager
from merge_adapter.staging.place import Place, passing, set_up
from merge_adapter.staging.relay import Made, Seconds, Stages, relay
from merge_adapter.staging.shown import Meter
from merge_adapter.staging.tally import Tally
from merge_adapter.staging.units import Schedule, Unit, schedule
from merge_adapter.staging.window import check_sparse
from merge_adapter.types import (
    FileOrigin,
    OnFail,
    OutputFile,
    Progress,
    Publication,
    PublishTo,
    Resolved,
    Verdict,
    Verification,
)
from merge_adapter.workspace import check_space

if TYPE_CHECKING:
    from merge_adapter.hub import Hub
    from merge_adapter.verify.shardwise import ShardGate


class NotLeaving(Exception):
    """The gate found a fault in a shard: nothing of this merge leaves any more."""


def run_within(
    budget: int,
    sources: Resolved,
    plan: MergePlan,
    request: MergeRequest,
    publishing: PublishSettings,
    *,
    hub: Hub,
    progress: Progress,
) -> RunOutcome:
    """Merge, judge and publish with at most `budget` bytes of disk.

    Raises InputError for a merge that needs the whole model at once and StorageError for a budget that is too small,
    both before any weights are downloaded; and whatever a stage raises.
    """
    layout = weights_of(sources, request.settings)
    check_possible(sources, plan, layout)
    needs = measure(sources, plan, layout)
    if publishing.publish_to is PublishTo.NONE:
        raise StorageError(
            f"the merge needs {human_bytes(needs.whole)} of disk, more than the disk budget of {human_bytes(budget)}, "
            "and shards can only pass through where the result is published",
            hint="Publish it, or raise the budget.",
        )
    least = passage(sources, plan, layout)
    check_budget(budget, needs, least)
    with TemporaryDirectory(prefix="merge-adapter-") as name, ExitStack() as stack:
        folder = Path(name)
        check_space(folder, needs.fixed + least.least_bytes)
        check_sparse(folder)
        place = set_up(folder, sources, plan, layout, request.settings)
        job = Passage(budget, sources, plan, request, publishing, layout, needs, place, hub, progress)
        return job.run(copied_by_hub(sources, plan), stack)


class Passage:
    """One merge on its way through. `run` may be called once."""

    def __init__(
        self,
        budget: int,
        sources: Resolved,
        plan: MergePlan,
        request: MergeRequest,
        publishing: PublishSettings,
        layout: Layout,
        needs: Needs,
        place: Place,
        hub: Hub,
        progress: Progress,
    ) -> None:
        self.budget = budget
        self.sources = sources
        self.plan = plan
        self.request = request
        self.publishing = publishing
        self.layout = layout
        self.needs = needs
        self.place = place
        self.hub = hub
        self.progress = progress
        self.tally = Tally()
        self.gate: ShardGate | None = None
        self.pager = HerePager()
        self.outbox = Outbox(
            self._work(document.not_verified()).document(), hub=hub, settings=publishing, progress=progress
        )
        self.ledger: Ledger | None = None
        self.seconds: Seconds | None = None

    def run(self, copied: Mapping[str, str], stack: ExitStack) -> RunOutcome:
        """All of it; `copied` are outputs that the Hub can copy, with their sha256."""
        self._open_gate(stack)
        if self.gate is not None:
            copied = {path: sha256 for path, sha256 in copied.items() if self.gate.may_be_copied(path)}
        units = self._schedule(frozenset(copied))
        check_budget(self.budget, self.needs, units)
        self._say(units)
        self._copy(units, copied)
        try:
            self._relay(units)
        except NotLeaving:
            return self._stopped()
        self._index()
        verification = self._judged()
        draft = self._publish(verification, pending=self._asks_outputs)
        if not self._asks_outputs or draft is None:
            return self._outcome(verification, draft)
        assert self.gate is not None
        final = judge_outputs(
            self.gate,
            self.request,
            self.place,
            self.hub.open(draft.repo, revision=draft.commit, subfolder=self._subfolder),
            limit=self.budget - self.needs.fixed,
            pager=self.pager,
            progress=self.progress,
        )
        return self._finish(final, draft)

    # ------------------------------------------------------------------------------------------- opening

    def _open_gate(self, stack: ExitStack) -> None:
        if self.request.gate is None:
            return
        from merge_adapter.verify.memory.mapped import paged
        from merge_adapter.verify.shardwise import ShardGate

        stack.enter_context(paged(self.pager))
        self.gate = ShardGate(
            self.place.frame,
            self.place.base,
            tuple(file.path for file in self.layout.files),
            self.sources,
            self.request.gate,
            self.progress,
        )
        stack.callback(self.gate.close)
        self.gate.start()

    def _schedule(self, copied: frozenset[str]) -> Schedule:
        return schedule(
            self.plan,
            self.layout,
            fetched=self.place.window is not None,
            copied=copied,
            together=self.gate.together if self.gate is not None else (),
            wanted=self.gate.wanted if self.gate is not None else None,
        )

    def _say(self, units: Schedule) -> None:
        copied = sum(shard.bytes for shard in units.copied)
        text = (
            f"{len(units.units)} shards or groups of shards pass through {human_bytes(self.budget)} of disk"
        )
        if copied:
            text += f"; {len(units.copied)} shards without a change ({copied:,} bytes) are copied by the Hub"
        self.progress.note(text + ".")

    # ------------------------------------------------------------------------------------------- passing

    def _relay(self, units: Schedule) -> None:
        fetched = sum(unit.source_bytes for unit in units.units)
        made = sum(unit.output_bytes for unit in units.units)
        self.ledger = Ledger(
            self.budget - self.needs.fixed,
            {number: unit.output_bytes for number, unit in enumerate(units.units)},
        )
        with ExitStack() as stack:

            def meter(label: str, total: int) -> Meter:
                return Meter(stack.enter_context(self.progress.task(label, total)), self.progress)

            stages = Stages(
                fetch=partial(self._fetch, meter("Downloading", fetched)),
                merge=partial(self._merge, meter("Merging", made)),
                judge=partial(self._judge, meter("Judging", made)),
                release=self._release,
                send=partial(self._send, meter("Uploading", made)),
            )
            self.seconds = relay(units.units, stages, self.ledger)
        took = self.seconds
        self.progress.note(
            f"Passed through in {took.total:.0f} s: {took.fetch:.0f} s of downloading, {took.merge:.0f} s of merging, "
            f"{took.judge:.0f} s of judging and {took.send:.0f} s of uploading, side by side."
        )

    def _fetch(self, meter: Meter, unit: Unit) -> None:
        assert self.ledger is not None
        if self.place.window is not None:
            for path in unit.sources:
                self.place.window.fetch(path, check=self.ledger.check, advance=meter.advance)

    def _merge(self, meter: Meter, unit: Unit) -> Made:
        made = merge(
            unit.part_of(self.plan),
            passing(self.sources, self.place),
            self.place.shards,
            settings=self.request.settings,
            device=self.request.device,
            threads=self.request.threads,
            progress=meter,
        )
        self.tally.add(made)
        return made.files

    def _judge(self, meter: Meter, unit: Unit, made: Made) -> None:
        if self.gate is not None:
            self.gate.progress = meter
            if self.gate.judge({file.path: self.place.shards / file.path for file in made}):
                raise NotLeaving(unit.name)

    def _release(self, unit: Unit) -> None:
        if self.place.window is not None:
            for path in unit.sources:
                self.place.window.drop(path)

    def _send(self, meter: Meter, _: Unit, made: Made) -> None:
        for file in made:
            here = self.place.shards / file.path
            gone = self.outbox.send(file, here)
            if gone is None:  # too small for the Hub's large files: it goes with the commit
                here.rename(self.place.merged / file.path)
            else:
                here.unlink()
                self.tally.gone[file.path] = gone
            meter.advance(file.bytes)

    def _copy(self, units: Schedule, copied: Mapping[str, str]) -> None:
        """Note the shards that the Hub copies."""
        for shard in units.copied:
            file = OutputFile(shard.path, shard.bytes, copied[shard.path], FileOrigin.COPIED, "base")
            self.tally.files[shard.path] = file
            self.tally.gone[shard.path] = Gone(fetch=partial(self.place.bring, shard))
            if self.gate is not None:
                self.gate.judge_copied(shard.path)

    def _index(self) -> None:
        if self.plan.index is not None:
            self.tally.files[self.plan.index] = write_index(self.plan, self.place.merged)

    # ---------------------------------------------------------------------------------------- publishing

    @property
    def _asks_outputs(self) -> bool:
        return self.request.gate is not None and self.request.gate.outputs

    @property
    def _subfolder(self) -> str:
        assert self.publishing.target is not None
        return self.publishing.target.path_in_repo

    def _judged(self) -> Verification:
        """The verdict on everything but the outputs."""
        if self.gate is None:
            return document.not_verified()
        assert self.request.gate is not None
        self.gate.progress = self.progress
        self.gate.settle()
        return judge_without_outputs(self.gate, self.request.gate, self.place.merged)

    def _stopped(self) -> RunOutcome:
        """A shard is not what it must be: say so where something was sent already, and end."""
        assert self.gate is not None
        self.gate.settle(ended_early=True)
        verification = self.gate.verification()
        report = self._work(verification).document()
        self.outbox.withdraw(
            "The gate found a fault before the last shard was sent; nothing was committed.\n\n"
            + verdict_markdown(report["verification"])
        )
        return RunOutcome(report, verification.verdict, verification.reasons, None, None)

    def _publish(
        self, verification: Verification, *, pending: bool = False, held_at: str | None = None
    ) -> Publication | None:
        report = write_reports(self.place.merged, self._work(verification), self.publishing)
        gone = self.tally.gone if held_at is None else {path: Gone() for path in self.tally.gone}
        return publish(
            self.place.merged,
            report,
            verification,
            hub=self.hub,
            settings=self.publishing,
            progress=self.progress,
            gone=gone,
            held_at=held_at,
            pending=pending,
        )

    def _finish(self, verification: Verification, draft: Publication) -> RunOutcome:
        """The last word on what lies in the draft."""
        if verification.verdict is not Verdict.PASS and self.publishing.on_fail is OnFail.DISCARD:
            discard(draft, f"Not offered: the verdict is {verification.verdict.value}.", hub=self.hub)
            return self._outcome(verification, None)
        published = self._publish(verification, held_at=draft.commit)
        assert published is not None
        return self._outcome(
            verification,
            replace(
                published,
                operation=draft.operation,
                bytes_uploaded=(draft.bytes_uploaded or 0) + (published.bytes_uploaded or 0),
                bytes_saved=draft.bytes_saved,
            ),
        )

    def _outcome(self, verification: Verification, publication: Publication | None) -> RunOutcome:
        report: dict[str, Any] = self._work(verification).document()
        if (self.place.merged / document.REPORT_FILE).is_file():
            report = document.read(self.place.merged)
        if publication is not None:
            report = {**report, "publication": document.publication_entry(publication)}
        stages = self.seconds.stages() if self.seconds is not None else None
        return RunOutcome(report, verification.verdict, verification.reasons, publication, None, stages)

    def _work(self, verification: Verification) -> Work:
        return Work(
            self.sources,
            self.plan,
            self.request.settings,
            self.tally.result(self.plan),
            self.place.packaged,
            verification,
            self.publishing.license,
        )
