"""The outputs part on a model that is on the Hub and not here.

Base and merged model are opened on their headers, and answer while their weights come and go. The merged one is read
back from the commit that would be offered.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from merge_adapter.checkpoint.layout import find_layout
from merge_adapter.staging.paging import BLOCK, HerePager, Resident
from merge_adapter.staging.place import Place, copy_small
from merge_adapter.staging.window import Window
from merge_adapter.types import Progress, Verification
from merge_adapter.verify.findings import note, undecided
from merge_adapter.verify.settings import VerifySettings
from merge_adapter.verify.shardwise import ShardGate

if TYPE_CHECKING:
    from merge_adapter.hub import HubRepository
    from merge_adapter.pipeline import MergeRequest

_NOT_GREEDY = "greedy text was not compared: each of its tokens would cost a download of the model"


def judge_without_outputs(gate: ShardGate, settings: VerifySettings, merged: Path) -> Verification:
    """Everything but the outputs; what is left open says so."""
    gate.ask(merged, replace(settings, outputs=False))
    if settings.outputs:
        gate.findings = [one for one in gate.findings if one.part != "outputs"]
        return gate.verification(undecided("outputs", "", "the outputs are compared on what the Hub serves"))
    return gate.verification()


def judge_outputs(
    gate: ShardGate,
    request: MergeRequest,
    place: Place,
    published: HubRepository,
    *,
    limit: int,
    pager: HerePager,
    progress: Progress,
) -> Verification:
    """The whole verdict, with the answers of the merged model as the commit `published` holds it.

    At most `limit` bytes of weights are here at a time. Where that, or the way the adapter is merged, does not allow
    it, the verdict leaves the outputs open and says why.
    """
    assert request.gate is not None
    settings = request.gate
    reason = gate.unpaged
    if 2 * BLOCK + gate.largest > limit:
        reason = f"the largest tensor takes {gate.largest:,} bytes, too much for the disk budget"
    if reason:
        gate.ask(place.merged, replace(settings, outputs=False))
        gate.findings = [one for one in gate.findings if one.part != "outputs"]
        text = f"the outputs were not compared: {reason}; a run without a disk budget can compare them"
        return gate.verification(undecided("outputs", "", text))
    folder = place.frame.with_name("published")
    folder.mkdir()
    windows = {folder: Window(published, find_layout(published), folder)}
    copy_small(published, folder)
    if place.window is not None:
        windows[place.base] = place.window
    resident = Resident(windows, limit)
    with progress.task("Running the models on weights that come and go", None), pager.bringing(resident):
        gate.ask(folder, replace(settings, greedy_tokens=0, full_mutants=False))
    more = [note("greedy", "", _NOT_GREEDY)] if settings.greedy_tokens and settings.greedy_prompts else []
    return gate.verification(*more)
