"""The command line. Every command reads its options, calls one function of the pipeline, and shows the result.

Stdout carries results (with --json, one JSON document), stderr everything else. Imports that cost more
than a few milliseconds stand inside the functions that need them.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from merge_adapter import __version__
from merge_adapter import options as opt
from merge_adapter.bot.cli import add_commands
from merge_adapter.errors import ExitCode, MergeAdapterError, NotEquivalentError
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
    Verdict,
)

if TYPE_CHECKING:
    from rich.console import Console

    from merge_adapter.hub import Hub
    from merge_adapter.pipeline import MergeRequest
    from merge_adapter.resolve import SourceRequest
    from merge_adapter.types import Progress
    from merge_adapter.verify.settings import VerifySettings

app = typer.Typer(
    name="merge-adapter",
    help="Merge a PEFT adapter into its base model, prove that the result answers as base + adapter does, "
    "and offer it on the Hugging Face Hub.",
    epilog="Start with: merge-adapter plan OWNER/ADAPTER",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """The console script: run the command line and leave with its exit code."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command and return its exit code. The one place where errors become messages."""
    as_json = "--json" in arguments
    signal.signal(signal.SIGTERM, _stop)
    # It warns of an optional kernel of its own whenever PEFT is imported beside it.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
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
def merge(
    adapter: opt.AdapterArgument,
    output: opt.OutputFolder,
    base_model: opt.BaseModelOption = None,
    base_revision: opt.BaseRevision = None,
    subfolder: opt.Subfolder = "",
    adapters: opt.MoreAdapters = None,
    weights: opt.Weights = None,
    combination: opt.CombinationOption = CombinationType.SEQUENTIAL,
    density: opt.Density = None,
    majority_sign: opt.MajoritySignOption = MajoritySign.TOTAL,
    svd_rank: opt.SvdRank = None,
    seed: opt.CombinationSeed = 0,
    dtype: opt.DTypeOption = DType.AUTO,
    device: opt.DeviceOption = "auto",
    strategy: opt.StrategyOption = Strategy.AUTO,
    quantized_base: opt.QuantizedBaseOption = QuantizedBase.REFUSE,
    soft_prompt: opt.SoftPromptOption = SoftPrompt.REFUSE,
    trust_remote_code: opt.TrustRemoteCode = False,
    no_verify: opt.NoVerify = False,
    probe_tokens: opt.ProbeTokens = None,
    probes: opt.Probes = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Merge into a folder: weights, tokenizer, card, merge_report.json. Verified unless told otherwise."""
    from merge_adapter.pipeline import merge_to_folder
    from merge_adapter.report.terminal import show_merged

    settings = MergeSettings(dtype, strategy, quantized_base, trust_remote_code, soft_prompt)
    gate = None if no_verify else _gate(settings, device, probe_tokens, probes)
    combined = Combination(combination, density, majority_sign, svd_rank, seed)
    named = (adapter, *(adapters or ()))
    source = _source(named, weights, combined, base_model, base_revision, subfolder, soft_prompt)
    merged = merge_to_folder(
        _request(source, settings, gate, device),
        output,
        hub=_hub(),
        progress=_progress(json=json, quiet=quiet),
    )
    if json:
        _print_json(merged.report)
    else:
        show_merged(_console(), merged)
    if not merged.accepted:
        raise _not_equivalent(
            merged.verification.verdict, f"the merge is left for inspection in {merged.folder}"
        )
    if not json:
        _say(f"merged into {output}")


@app.command()
def verify(
    merged: opt.MergedArgument,
    adapter: opt.AdapterOption,
    base_model: opt.BaseModelOption = None,
    base_revision: opt.BaseRevision = None,
    subfolder: opt.Subfolder = "",
    weights: opt.Weights = None,
    combination: opt.CombinationOption = CombinationType.SEQUENTIAL,
    density: opt.Density = None,
    majority_sign: opt.MajoritySignOption = MajoritySign.TOTAL,
    svd_rank: opt.SvdRank = None,
    seed: opt.CombinationSeed = 0,
    merged_subfolder: opt.MergedSubfolder = "",
    dtype: opt.DTypeOption = DType.AUTO,
    quantized_base: opt.QuantizedBaseOption = QuantizedBase.REFUSE,
    device: opt.DeviceOption = "auto",
    trust_remote_code: opt.TrustRemoteCode = False,
    probe_tokens: opt.ProbeTokens = None,
    probes: opt.Probes = None,
    mutants: opt.Mutants = False,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Judge any merged checkpoint against base + adapter, whoever made it. Changes nothing."""
    from merge_adapter.pipeline import verify_merged
    from merge_adapter.report import document
    from merge_adapter.report.terminal import show_mutants, show_verdict

    settings = MergeSettings(dtype=dtype, trust_remote_code=trust_remote_code)
    combined = Combination(combination, density, majority_sign, svd_rank, seed)
    sources, verification = verify_merged(
        merged,
        _source(tuple(adapter), weights, combined, base_model, base_revision, subfolder, SoftPrompt.TOKENS),
        replace(_gate(settings, device, probe_tokens, probes), full_mutants=mutants),
        hub=_hub(),
        progress=_progress(json=json, quiet=quiet),
        subfolder=merged_subfolder,
        quantized_base=quantized_base,
    )
    report = document.verdict_only(sources, verification)
    if json:
        _print_json(report)
    else:
        show_verdict(_console(), report["verification"])
        if mutants:
            show_mutants(_console(), report["verification"])
    if verification.verdict is not Verdict.PASS:
        raise _not_equivalent(verification.verdict, f"{merged} was judged and left as it is")


@app.command()
def plan(
    adapter: opt.AdapterArgument,
    base_model: opt.BaseModelOption = None,
    base_revision: opt.BaseRevision = None,
    subfolder: opt.Subfolder = "",
    adapters: opt.MoreAdapters = None,
    weights: opt.Weights = None,
    combination: opt.CombinationOption = CombinationType.SEQUENTIAL,
    density: opt.Density = None,
    majority_sign: opt.MajoritySignOption = MajoritySign.TOTAL,
    svd_rank: opt.SvdRank = None,
    seed: opt.CombinationSeed = 0,
    dtype: opt.DTypeOption = DType.AUTO,
    strategy: opt.StrategyOption = Strategy.AUTO,
    quantized_base: opt.QuantizedBaseOption = QuantizedBase.REFUSE,
    soft_prompt: opt.SoftPromptOption = SoftPrompt.REFUSE,
    trust_remote_code: opt.TrustRemoteCode = False,
    json: opt.Json = False,
) -> None:
    """Tell what a merge would do: base, method, changes, bytes, memory, disk. Reads configs and headers alone."""
    from merge_adapter.pipeline import plan_merge
    from merge_adapter.report.terminal import plan_document, show_plan

    settings = MergeSettings(dtype, strategy, quantized_base, trust_remote_code, soft_prompt)
    combined = Combination(combination, density, majority_sign, svd_rank, seed)
    named = (adapter, *(adapters or ()))
    source = _source(named, weights, combined, base_model, base_revision, subfolder, soft_prompt)
    sources, planned = plan_merge(_request(source, settings, None, "cpu"), hub=_hub())
    if json:
        _print_json(plan_document(sources, planned))
    else:
        show_plan(_console(), sources, planned)


@app.command(name="run")
def run_(
    adapter: opt.AdapterArgument,
    publish: opt.PublishOption = PublishTo.PULL_REQUEST,
    target_repo: opt.TargetRepo = None,
    private: opt.Private = None,
    path_in_repo: opt.PathInRepo = None,
    on_fail: opt.OnFailOption = OnFail.DRAFT,
    license: opt.LicenseOption = None,
    allow_base: opt.AllowBase = None,
    output: opt.KeepFolder = None,
    base_model: opt.BaseModelOption = None,
    base_revision: opt.BaseRevision = None,
    subfolder: opt.Subfolder = "",
    adapters: opt.MoreAdapters = None,
    weights: opt.Weights = None,
    combination: opt.CombinationOption = CombinationType.SEQUENTIAL,
    density: opt.Density = None,
    majority_sign: opt.MajoritySignOption = MajoritySign.TOTAL,
    svd_rank: opt.SvdRank = None,
    seed: opt.CombinationSeed = 0,
    dtype: opt.DTypeOption = DType.AUTO,
    device: opt.DeviceOption = "auto",
    strategy: opt.StrategyOption = Strategy.AUTO,
    quantized_base: opt.QuantizedBaseOption = QuantizedBase.REFUSE,
    soft_prompt: opt.SoftPromptOption = SoftPrompt.REFUSE,
    trust_remote_code: opt.TrustRemoteCode = False,
    no_verify: opt.NoVerify = False,
    probe_tokens: opt.ProbeTokens = None,
    probes: opt.Probes = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Resolve, merge, verify and publish. The same sources and settings are published once."""
    from merge_adapter import pipeline
    from merge_adapter.publish import PublishSettings
    from merge_adapter.report.terminal import show_run

    settings = MergeSettings(dtype, strategy, quantized_base, trust_remote_code, soft_prompt)
    gate = None if no_verify else _gate(settings, device, probe_tokens, probes)
    combined = Combination(combination, density, majority_sign, svd_rank, seed)
    named = (adapter, *(adapters or ()))
    source = _source(named, weights, combined, base_model, base_revision, subfolder, soft_prompt)
    publishing = PublishSettings(
        publish_to=publish,
        target_repo=target_repo,
        private=private,
        path_in_repo=path_in_repo,
        on_fail=on_fail,
        license=license,
        allow_base=tuple(allow_base or ()),
    )
    outcome = pipeline.run(
        _request(source, settings, gate, device),
        publishing,
        hub=_hub(),
        progress=_progress(json=json, quiet=quiet),
        output=output,
    )
    if json:
        _print_json(outcome.report)
    else:
        show_run(_console(), outcome)
    if outcome.verdict is not Verdict.PASS:
        raise _not_equivalent(outcome.verdict, "nothing was offered as ready")


@app.command()
def publish(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that `merge-adapter merge` made.")],
    publish: opt.PublishOption = PublishTo.PULL_REQUEST,
    target_repo: opt.TargetRepo = None,
    private: opt.Private = None,
    path_in_repo: opt.PathInRepo = None,
    on_fail: opt.OnFailOption = OnFail.DRAFT,
    license: opt.LicenseOption = None,
    allow_base: opt.AllowBase = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Publish a folder merged earlier, by its report and under the same rules."""
    from merge_adapter import pipeline
    from merge_adapter.publish import PublishSettings
    from merge_adapter.report.terminal import show_run

    publishing = PublishSettings(
        publish_to=publish,
        target_repo=target_repo,
        private=private,
        path_in_repo=path_in_repo,
        on_fail=on_fail,
        license=license,
        allow_base=tuple(allow_base or ()),
    )
    outcome = pipeline.publish_folder(
        folder, publishing, hub=_hub(), progress=_progress(json=json, quiet=quiet)
    )
    if json:
        _print_json(outcome.report)
    else:
        show_run(_console(), outcome)
    if outcome.verdict is not Verdict.PASS:
        raise _not_equivalent(outcome.verdict, "nothing was offered as ready")


@app.command()
def action() -> None:
    """The GitHub Action's entry point: reads its inputs and the event from the environment."""
    from merge_adapter.action import main as run_action

    raise typer.Exit(run_action())


@app.command()
def demo(
    keep: Annotated[
        bool, typer.Option("--keep", help="Leave the embedded Hub up, for a browser, until Ctrl-C.")
    ] = False,
) -> None:
    """The whole job on an embedded Hub: an adapter is pushed, merged, verified, and offered as a pull request."""
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


def _source(
    adapters: tuple[str, ...],
    weights: list[float] | None,
    combination: Combination,
    base_model: str | None,
    base_revision: str | None,
    subfolder: str,
    soft_prompt: SoftPrompt,
) -> SourceRequest:
    from merge_adapter.resolve import SourceRequest

    return SourceRequest(
        adapters,
        tuple(weights or ()),
        base_model,
        base_revision,
        subfolder,
        combination=combination,
        soft_prompt=soft_prompt,
    )


def _gate(
    settings: MergeSettings, device: str, probe_tokens: int | None, probes: Path | None
) -> VerifySettings:
    from merge_adapter.verify.settings import VerifySettings

    return VerifySettings(
        dtype=settings.dtype,
        device=device,
        probe_tokens=probe_tokens,
        probes=probes,
        trust_remote_code=settings.trust_remote_code,
    )


def _request(
    source: SourceRequest, settings: MergeSettings, gate: VerifySettings | None, device: str
) -> MergeRequest:
    from merge_adapter.pipeline import MergeRequest

    return MergeRequest(source, settings, gate, device)


def _hub() -> Hub:
    from merge_adapter.hub import Hub

    return Hub()


def _progress(*, json: bool, quiet: bool) -> Progress:
    from merge_adapter.report.lines import VARIABLE, LineProgress
    from merge_adapter.report.progress import progress_for

    if os.environ.get(VARIABLE) == "lines":
        return LineProgress(sys.stderr)
    return progress_for(_console(stderr=True), quiet=quiet or json)


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
    for line in (message, *([f"  {hint}"] if hint else [])):
        clean = "".join(c if c.isprintable() or c == "\n" else "�" for c in line)
        sys.stderr.write(clean + "\n")


def _stop(signum: int, frame: object) -> None:  # noqa: ARG001
    """SIGTERM ends a run as Ctrl-C does, so that everything half-done is cleared."""
    raise KeyboardInterrupt
