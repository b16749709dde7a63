"""The command line. Every command reads its options, calls one function of the pipeline, and shows the result.

Stdout carries results (with --json, one JSON document), stderr everything else. Imports that cost more
than a few milliseconds stand inside the functions that need them.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from merge_adapter import __version__
from merge_adapter import options as opt
from merge_adapter.bot.cli import add_commands
from merge_adapter.collecting import seldom_collected
from merge_adapter.errors import ExitCode, MergeAdapterError, NotEquivalentError
from merge_adapter.interrupts import interruptible
from merge_adapter.option_groups import (
    BaseOptions,
    CombineOptions,
    GateOptions,
    MergeOptions,
    OutputOptions,
    PublishOptions,
    grouped,
)
from merge_adapter.types import DType, QuantizedBase, SoftPrompt, Verdict

if TYPE_CHECKING:
    from rich.console import Console

    from merge_adapter.hub import Hub
    from merge_adapter.pipeline import MergeRequest, RunOutcome
    from merge_adapter.types import Progress

app = typer.Typer(
    name="merge-adapter",
    help="Merge a PEFT adapter into its base model, prove that the result answers as base + adapter does, "
    "and offer it on the Hugging Face Hub.",
    epilog="Start with: merge-adapter plan OWNER/ADAPTER\n\n"
    "Exit codes: 0 done, 1 a bug, 2 bad input, 3 cannot be merged, 4 not shown to be equivalent, "
    "5 the Hub or GitHub failed or refused, 6 refused by policy.\n\n"
    "Documentation: https://github.com/merge-adapter/merge-adapter",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """The console script: run the command line and leave with its exit code."""
    with seldom_collected():
        code = run(sys.argv[1:])
    sys.exit(code)


def run(arguments: list[str]) -> int:
    """Run one command and return its exit code. The one place where errors become messages."""
    as_json = "--json" in arguments
    # It warns of an optional kernel of its own whenever PEFT is imported beside it.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        with interruptible():
            app(args=arguments, prog_name="merge-adapter")
    except SystemExit as leaving:  # how Typer ends: usage errors it has told itself, and Ctrl-C
        code = leaving.code if isinstance(leaving.code, int) else ExitCode.DONE
        if code == ExitCode.INTERRUPTED:
            _say("interrupted: nothing was left behind")
        return code
    except KeyboardInterrupt:
        _say("interrupted: nothing was left behind")
        return ExitCode.INTERRUPTED
    except NotEquivalentError as error:
        _say(f"error: {error.message}", error.hint)
        return error.exit_code
    except MergeAdapterError as error:
        _say(f"error: {error.message}", error.hint)
        if as_json:
            _print_json({"error": _error_entry(error)})
        return error.exit_code
    except Exception:  # noqa: BLE001  # the outermost boundary: whatever is not ours is a bug, and said so
        from traceback import print_exc

        print_exc()
        _say(
            "error: this is a bug in merge-adapter",
            "Please report it with the lines above: https://github.com/merge-adapter/merge-adapter/issues",
        )
        return ExitCode.BUG
    return ExitCode.DONE


@app.command()
@grouped
def merge(
    adapter: opt.AdapterArgument,
    output: opt.OutputFolder,
    base: BaseOptions,
    adapters: opt.MoreAdapters = None,
    *,
    combine: CombineOptions,
    how: MergeOptions,
    device: opt.DeviceOption = "auto",
    no_verify: opt.NoVerify = False,
    gate: GateOptions,
    show: OutputOptions,
) -> None:
    """Merge into a folder, and verify the result: weights, tokenizer, model card and merge_report.json."""
    from merge_adapter.pipeline import merge_to_folder
    from merge_adapter.report.terminal import show_merged

    merged = merge_to_folder(
        _request([adapter, *(adapters or ())], base, combine, how, None if no_verify else gate, device),
        output,
        hub=_hub(),
        progress=_progress(show),
    )
    if show.json:
        _print_json(merged.report)
    else:
        show_merged(_console(), merged)
    if not merged.accepted:
        raise _not_equivalent(
            merged.verification.verdict, f"the merge is left for inspection in {merged.folder}"
        )
    if not show.json:
        _say(f"merged into {output}")


@app.command()
@grouped
def verify(
    merged: opt.MergedArgument,
    adapter: opt.AdapterOption,
    base: BaseOptions,
    combine: CombineOptions,
    merged_subfolder: opt.MergedSubfolder = "",
    dtype: opt.DTypeOption = DType.AUTO,
    quantized_base: opt.QuantizedBaseOption = QuantizedBase.REFUSE,
    device: opt.DeviceOption = "auto",
    trust_remote_code: opt.TrustRemoteCode = False,
    *,
    gate: GateOptions,
    mutants: opt.Mutants = False,
    show: OutputOptions,
) -> None:
    """Check whether a merged model, whoever made it, is equivalent to base + adapter. Changes nothing."""
    from merge_adapter.pipeline import verify_merged
    from merge_adapter.report import document
    from merge_adapter.report.terminal import show_mutants, show_verdict

    settings = gate.settings(dtype, device, trust_remote_code=trust_remote_code)
    sources, verification = verify_merged(
        merged,
        combine.source_request(adapter, base, SoftPrompt.TOKENS),
        replace(settings, full_mutants=mutants),
        hub=_hub(),
        progress=_progress(show),
        subfolder=merged_subfolder,
        quantized_base=quantized_base,
    )
    report = document.verdict_only(sources, verification)
    if show.json:
        _print_json(report)
    else:
        show_verdict(_console(), report["verification"])
        if mutants:
            show_mutants(_console(), report["verification"])
    if verification.verdict is not Verdict.PASS:
        raise _not_equivalent(verification.verdict, f"{merged} was judged and left as it is")


@app.command()
@grouped
def plan(
    adapter: opt.AdapterArgument,
    base: BaseOptions,
    adapters: opt.MoreAdapters = None,
    *,
    combine: CombineOptions,
    how: MergeOptions,
    json: opt.Json = False,
) -> None:
    """Show what a merge would do and need. Reads only configs and file headers, and changes nothing."""
    from merge_adapter.pipeline import plan_merge
    from merge_adapter.report.terminal import plan_document, show_plan

    request = _request([adapter, *(adapters or ())], base, combine, how, None, "cpu")
    sources, planned = plan_merge(request, hub=_hub())
    if json:
        _print_json(plan_document(sources, planned))
    else:
        show_plan(_console(), sources, planned)


@app.command(name="run")
@grouped
def run_(
    adapter: opt.AdapterArgument,
    publishing: PublishOptions,
    output: opt.KeepFolder = None,
    *,
    base: BaseOptions,
    adapters: opt.MoreAdapters = None,
    combine: CombineOptions,
    how: MergeOptions,
    device: opt.DeviceOption = "auto",
    disk_budget: opt.DiskBudget = None,
    no_verify: opt.NoVerify = False,
    gate: GateOptions,
    show: OutputOptions,
) -> None:
    """Merge, verify, and publish to the Hub. Running it again on the same sources changes nothing."""
    from merge_adapter import pipeline
    from merge_adapter.sizes import parse_bytes

    outcome = pipeline.run(
        _request([adapter, *(adapters or ())], base, combine, how, None if no_verify else gate, device),
        publishing.settings(),
        hub=_hub(),
        progress=_progress(show),
        output=output,
        disk_budget=parse_bytes(disk_budget, what="--disk-budget") if disk_budget is not None else None,
    )
    _show_outcome(outcome, show)


@app.command()
@grouped
def publish(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that `merge-adapter merge` made.")],
    publishing: PublishOptions,
    show: OutputOptions,
) -> None:
    """Publish a folder that was merged earlier, under the same rules as run."""
    from merge_adapter import pipeline

    outcome = pipeline.publish_folder(folder, publishing.settings(), hub=_hub(), progress=_progress(show))
    _show_outcome(outcome, show)


@app.command()
def action() -> None:
    """Run as the GitHub Action: inputs and event come from the environment."""
    from merge_adapter.action import main as run_action

    raise typer.Exit(run_action())


@app.command()
def demo(
    keep: Annotated[
        bool,
        typer.Option("--keep", help="Keep the embedded Hub running, to look at in a browser, until Ctrl-C."),
    ] = False,
) -> None:
    """Watch the whole job on an embedded Hub: push, webhook, merge, verification, pull request."""
    from merge_adapter.demo import run_demo

    run_demo(keep=keep, console=_console())


add_commands(app)


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", help="Show the version.", is_eager=True)] = False,
) -> None:
    if version:
        typer.echo(f"merge-adapter {__version__}")
        raise typer.Exit


def _request(
    adapters: list[str],
    base: BaseOptions,
    combine: CombineOptions,
    how: MergeOptions,
    gate: GateOptions | None,
    device: str,
) -> MergeRequest:
    from merge_adapter.pipeline import MergeRequest

    settings = how.settings()
    looked = (
        None
        if gate is None
        else gate.settings(settings.dtype, device, trust_remote_code=settings.trust_remote_code)
    )
    return MergeRequest(combine.source_request(adapters, base, how.soft_prompt), settings, looked, device)


def _show_outcome(outcome: RunOutcome, show: OutputOptions) -> None:
    from merge_adapter.report.terminal import show_run

    if show.json:
        _print_json(outcome.report)
    else:
        show_run(_console(), outcome)
    if outcome.verdict is not Verdict.PASS:
        raise _not_equivalent(outcome.verdict, "nothing was offered as ready")


class _HubWhenAsked:
    """A Hub that is made when it is first asked for something: a merge of local folders never loads the client."""

    _made: Hub | None = None

    def __getattr__(self, name: str) -> Any:
        if self._made is None:
            from merge_adapter.hub import Hub

            self._made = Hub()
        return getattr(self._made, name)


def _hub() -> Hub:
    return cast("Hub", _HubWhenAsked())


def _progress(show: OutputOptions) -> Progress:
    from merge_adapter.report.lines import VARIABLE, LineProgress
    from merge_adapter.report.progress import progress_for

    if os.environ.get(VARIABLE) == "lines":
        return LineProgress(sys.stderr)
    return progress_for(_console(stderr=True), quiet=show.quiet or show.json)


def _console(*, stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=stderr, highlight=False)


def _not_equivalent(verdict: Verdict, consequence: str) -> NotEquivalentError:
    what = {
        Verdict.FAIL: "the merged model is not equivalent to base + adapter",
        Verdict.INCONCLUSIVE: "equivalence could not be shown",
    }[verdict]
    return NotEquivalentError(f"{what}; {consequence}", hint="The reasons stand above and in the report.")


def _error_entry(error: MergeAdapterError) -> dict[str, Any]:
    return {
        "type": type(error).__name__,
        "message": error.message,
        "hint": error.hint,
        "exit_code": int(error.exit_code),
    }


def _print_json(document: Mapping[str, Any]) -> None:
    from merge_adapter.report.document import dump

    sys.stdout.write(dump(document))


def _say(message: str, hint: str = "") -> None:
    """A message on stderr; control characters in names that strangers chose cannot steer the terminal."""
    from merge_adapter.report.printable import printable

    for line in (message, *([f"  {hint}"] if hint else [])):
        sys.stderr.write(printable(line) + "\n")
