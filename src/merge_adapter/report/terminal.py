"""What a person reads in the terminal: the plan, the verdict, and what was made of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from merge_adapter.pipeline import Merged, RunOutcome
from merge_adapter.plan import MergePlan
from merge_adapter.report.document import adapter_entry, several_entries, source_entry
from merge_adapter.report.evidence import verdict_rows
from merge_adapter.report.printable import printable
from merge_adapter.report.progress import human_seconds
from merge_adapter.sizes import human_bytes
from merge_adapter.staging.needs import as_option, least_budget
from merge_adapter.types import Adapter, Operation, Resolved, Verdict

_VERDICT_STYLE = {Verdict.PASS: "bold green", Verdict.FAIL: "bold red", Verdict.INCONCLUSIVE: "bold yellow"}


def _plain(text: str) -> Text:
    """Text as it is: names come from strangers, carry no markup, and cannot steer the terminal."""
    return Text(printable(text))


def _facts(rows: list[tuple[str, str]]) -> Table:
    """Two columns without lines."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in rows:
        table.add_row(Text(label), _plain(value))
    return table


def show_plan(console: Console, sources: Resolved, plan: MergePlan) -> None:
    """Base, method, what changes, bytes, memory and disk, strategy."""
    tensors = sum(len(change.tensors) for change in plan.changes)
    merged = [shard for shard in plan.outputs if shard.bytes]
    least = least_budget(sources, plan)
    rows = [
        *(("adapter", _named(adapter)) for adapter in sources.adapters),
        *((("combination", sources.combination.type.value),) if len(sources.adapters) > 1 else ()),
        ("base model", str(sources.base.repository.origin)),
        ("tokenizer", str(sources.tokenizer.origin) if sources.tokenizer else "none"),
        ("method", plan.method),
        ("strategy", f"{plan.strategy.value}: {plan.strategy_reason}"),
        ("changes", f"{tensors} tensors, from {plan.consumed} of {plan.adapter_tensors} adapter tensors"),
        ("weight files", f"{len(merged)}, {human_bytes(sum(shard.bytes for shard in merged))}"),
        ("reads", human_bytes(plan.bytes_read)),
        ("writes", human_bytes(plan.bytes_written)),
        ("uploads", f"about {human_bytes(plan.bytes_changed)}: the changed tensors; the Hub has the others"),
        ("memory", human_bytes(plan.memory_bytes)),
        ("disk", human_bytes(plan.disk_bytes)),
        (
            "disk budget",
            f"{as_option(least)} or more" if least is not None else "none: the model must be here whole",
        ),
    ]
    rows += [("config", f"{key} = {value!r}") for key, value in plan.config_changes.items()]
    console.print(_facts(rows))
    show_notes(console, (*sources.notes, *plan.notes))


def _named(adapter: Adapter) -> str:
    """Where an adapter is, and its weight where that is not 1."""
    weight = "" if adapter.weight == 1 else f" times {adapter.weight:g}"
    return f"{adapter.repository.origin}{weight}"


def show_notes(console: Console, notes: tuple[str, ...]) -> None:
    for note in notes:
        console.print(Text.assemble(("note  ", "yellow"), _plain(note)))


def show_verdict(console: Console, verification: Mapping[str, Any]) -> None:
    """The verdict with its reasons and the one table of evidence; `verification` is that section of a report."""
    verdict = Verdict(verification["verdict"])
    table = Table(box=None, padding=(0, 2), header_style="dim")
    for heading in ("check", "result", "evidence"):
        table.add_column(heading, overflow="fold")
    for row in verdict_rows(verification):
        table.add_row(
            Text(row.check),
            Text(row.result.value, style=_VERDICT_STYLE.get(row.result, "dim")),
            _plain(row.evidence),
        )
    if table.row_count:
        console.print(table)
    console.print(Text.assemble(("verdict  ", "dim"), (verdict.value.upper(), _VERDICT_STYLE[verdict])))
    for reason in verification["reasons"]:
        console.print(_plain(f"  {reason}"))


def show_mutants(console: Console, verification: Mapping[str, Any]) -> None:
    """Which part of the gate caught which fault that was injected into it."""
    table = Table(box=None, padding=(0, 2), header_style="dim")
    for heading in ("injected fault", "caught by"):
        table.add_column(heading, overflow="fold")
    for mutant in verification.get("mutants", []):
        caught = ", ".join(mutant["caught_by"]) or "nothing: the gate is blind to it"
        table.add_row(_plain(mutant["fault"]), Text(caught))
    console.print(table)


def plan_document(sources: Resolved, plan: MergePlan) -> dict[str, Any]:
    """What `plan --json` prints. `least_disk_budget_bytes` is null where shards cannot pass through."""
    several = several_entries(sources)
    return {
        "schema": 1,
        "adapter": {
            **adapter_entry(sources),
            "tensors": plan.adapter_tensors,
            "consumed": plan.consumed,
        },
        **several,
        "base": source_entry(sources.base.repository.origin),
        "tokenizer": source_entry(sources.tokenizer.origin) if sources.tokenizer else None,
        "strategy": plan.strategy.value,
        "strategy_reason": plan.strategy_reason,
        "changes": [
            {
                "writes": list(change.tensors),
                "kind": change.kind.value,
                "consumes": list(change.consumes),
            }
            for change in plan.changes
        ],
        "files": [
            {"path": shard.path, "bytes": shard.bytes, "origin": shard.origin.value} for shard in plan.outputs
        ],
        "config_changes": dict(plan.config_changes),
        "bytes_read": plan.bytes_read,
        "bytes_written": plan.bytes_written,
        "bytes_changed": plan.bytes_changed,
        "memory_bytes": plan.memory_bytes,
        "disk_bytes": plan.disk_bytes,
        "least_disk_budget_bytes": least_budget(sources, plan),
        "notes": [*sources.notes, *plan.notes],
    }


def show_merged(console: Console, merged: Merged) -> None:
    """What was merged, how long it took, the verdict, and where it is."""
    report = merged.report
    work = report["merge"]
    console.print(
        _facts(
            [
                ("merged", f"{work['tensors_changed']} tensors changed, {work['tensors_copied']} copied"),
                (
                    "cost",
                    f"{human_seconds(work['seconds'])}, {human_bytes(work['bytes_written'])} written, "
                    f"peak memory {human_bytes(work['peak_rss_bytes'])}",
                ),
            ]
        )
    )
    show_notes(console, tuple(report["notes"]))
    show_verdict(console, report["verification"])


def show_run(console: Console, outcome: RunOutcome) -> None:
    """The merge, when there was one, and where it was published."""
    if outcome.merged is not None:
        show_merged(console, outcome.merged)
    elif outcome.stages is not None:  # shards passed through, and no folder is left to show
        show_verdict(console, outcome.report["verification"])
    publication = outcome.publication
    if publication is None:
        return
    what = {
        Operation.CREATED: "created",
        Operation.UPDATED: "updated",
        Operation.UNCHANGED: "unchanged: these sources and settings are published already",
    }[publication.operation]
    state = " (draft)" if publication.draft else ""
    facts = [("published", what + state), ("at", publication.url)]
    if publication.bytes_uploaded is not None and publication.bytes_saved is not None:
        sent, saved = human_bytes(publication.bytes_uploaded), human_bytes(publication.bytes_saved)
        facts.append(("uploaded", f"files of {sent}, by xet only what is new in them; {saved} the Hub had"))
    console.print(_facts(facts))
