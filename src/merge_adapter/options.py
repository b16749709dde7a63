"""The command line's options, one alias each, so that every command says and means the same by one name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from merge_adapter.types import (
    CombinationType,
    DType,
    MajoritySign,
    OnFail,
    PublishTo,
    QuantizedBase,
    SoftPrompt,
    Strategy,
)

_SOURCES = "Sources"
_SEVERAL = "Several adapters"
_MERGE = "Merge"
_GATE = "Equivalence gate"
_PUBLISH = "Publishing"
_OUTPUT = "Output"

AdapterArgument = Annotated[
    str, typer.Argument(metavar="ADAPTER", help="A folder, or a Hub id: owner/name or owner/name@revision.")
]
AdapterOption = Annotated[
    list[str],
    typer.Option(
        "--adapter",
        metavar="ADAPTER",
        help="The adapter it was merged from: a folder or a Hub id. Repeat it for several.",
        show_default=False,
    ),
]
MergedArgument = Annotated[
    str,
    typer.Argument(
        metavar="MERGED",
        help="The merged model, whoever made it: a folder, or a Hub id such as owner/name@refs/pr/1.",
    ),
]
MergedSubfolder = Annotated[
    str,
    typer.Option(
        "--merged-subfolder",
        metavar="PATH",
        help="Folder of the model inside MERGED.",
        rich_help_panel=_SOURCES,
    ),
]
BaseModelOption = Annotated[
    str | None,
    typer.Option(
        "--base-model",
        metavar="ID|DIR",
        help="The base model, if not the one named in adapter_config.json.",
        rich_help_panel=_SOURCES,
    ),
]
BaseRevision = Annotated[
    str | None,
    typer.Option(
        "--base-revision", metavar="REV", help="Branch, tag or commit of the base.", rich_help_panel=_SOURCES
    ),
]
Subfolder = Annotated[
    str,
    typer.Option(
        "--subfolder",
        metavar="PATH",
        help="Folder of the adapter inside its repository.",
        rich_help_panel=_SOURCES,
    ),
]
MoreAdapters = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        metavar="ADAPTER",
        help="One more adapter to merge together with ADAPTER (repeatable).",
        rich_help_panel=_SEVERAL,
        show_default=False,
    ),
]
Weights = Annotated[
    list[float] | None,
    typer.Option(
        "--weight",
        metavar="W",
        help="Factor for an adapter's update. Repeat it, once per adapter, in the same order.",
        rich_help_panel=_SEVERAL,
        show_default="1 each",
    ),
]
CombinationOption = Annotated[
    CombinationType,
    typer.Option(
        "--combination",
        help="How several adapters become one: sequential adds the weighted updates; the others are those of "
        "PEFT's add_weighted_adapter.",
        rich_help_panel=_SEVERAL,
    ),
]
Density = Annotated[
    float | None,
    typer.Option(
        "--density",
        metavar="PART",
        help="For ties, dare and magnitude_prune: the share of values to keep, above 0 and up to 1.",
        rich_help_panel=_SEVERAL,
        show_default=False,
    ),
]
MajoritySignOption = Annotated[
    MajoritySign,
    typer.Option(
        "--majority-sign",
        help="For ties and dare_ties: how the sign of each value is chosen.",
        rich_help_panel=_SEVERAL,
    ),
]
SvdRank = Annotated[
    int | None,
    typer.Option(
        "--svd-rank",
        metavar="R",
        min=1,
        help="For svd: the rank to keep.",
        rich_help_panel=_SEVERAL,
        show_default="the largest of the adapters'",
    ),
]
CombinationSeed = Annotated[
    int, typer.Option("--seed", help="Seed for the random pruning of dare.", rich_help_panel=_SEVERAL)
]
OutputFolder = Annotated[
    Path,
    typer.Option(
        "--output",
        "-o",
        metavar="DIR",
        help="Folder to create. It must not exist, or be empty: nothing is overwritten.",
        show_default=False,
    ),
]
KeepFolder = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        metavar="DIR",
        help="Also keep the merged model in this folder.",
        rich_help_panel=_OUTPUT,
    ),
]
DTypeOption = Annotated[
    DType,
    typer.Option(
        help="Type of the merged weights; auto keeps that of each tensor in the base.", rich_help_panel=_MERGE
    ),
]
DeviceOption = Annotated[
    str,
    typer.Option(metavar="auto|cpu|cuda[:N]", help="Device to compute on.", rich_help_panel=_MERGE),
]
StrategyOption = Annotated[
    Strategy,
    typer.Option(
        help="stream works on the files, piece by piece, in little memory; memory loads the model and lets PEFT merge "
        "it; auto streams wherever it can.",
        rich_help_panel=_MERGE,
    ),
]
QuantizedBaseOption = Annotated[
    QuantizedBase,
    typer.Option(
        help="For a base stored quantised: refuse it, merge into its dequantised weights, or into the 16-bit original "
        "that its card names.",
        rich_help_panel=_MERGE,
    ),
]
SoftPromptOption = Annotated[
    SoftPrompt,
    typer.Option(
        "--soft-prompt",
        help="For prompt tuning and P-tuning: refuse them, or turn the prompt into new tokens that the tokenizer puts "
        "in front of every text.",
        rich_help_panel=_MERGE,
    ),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Allow the Python files in the base's repository to be run and published.",
        rich_help_panel=_MERGE,
    ),
]
NoVerify = Annotated[
    bool,
    typer.Option(
        "--no-verify", help="Skip the equivalence check. The report will say so.", rich_help_panel=_GATE
    ),
]
ProbeTokens = Annotated[
    int | None,
    typer.Option(
        "--probe-tokens",
        min=16,
        metavar="N",
        help="Number of tokens for the output test. More take longer; the default is as many as the verdict needs.",
        rich_help_panel=_GATE,
    ),
]
Probes = Annotated[
    Path | None,
    typer.Option(
        "--probes",
        metavar="FILE",
        exists=True,
        dir_okay=False,
        help="File with texts of your own to test on, beside the built-in ones: one per line, or JSON lines.",
        rich_help_panel=_GATE,
    ),
]
DatasetProbes = Annotated[
    bool,
    typer.Option(
        "--dataset-probes/--no-dataset-probes",
        help="Also test on a few documents from the public data sets that the adapter's card names.",
        rich_help_panel=_GATE,
    ),
]
Mutants = Annotated[
    bool,
    typer.Option(
        "--mutants", help="Show which part of the gate caught which injected fault.", rich_help_panel=_GATE
    ),
]
PublishOption = Annotated[
    PublishTo,
    typer.Option(
        "--publish",
        help="Open a pull request, commit to the target's main branch, or publish nothing.",
        rich_help_panel=_PUBLISH,
    ),
]
TargetRepo = Annotated[
    str | None,
    typer.Option(
        "--target-repo",
        metavar="ID",
        help="Repository to publish to, OWNER/NAME.",
        rich_help_panel=_PUBLISH,
        show_default="ADAPTER-merged",
    ),
]
Private = Annotated[
    bool | None,
    typer.Option(
        "--private/--public",
        help="Whether a repository that has to be created is private. With private or gated sources it always is.",
        rich_help_panel=_PUBLISH,
        show_default=False,
    ),
]
PathInRepo = Annotated[
    str | None,
    typer.Option(
        "--path-in-repo",
        metavar="PATH",
        help="Folder inside the target repository. The default is its root, or merged in the adapter's own repository.",
        rich_help_panel=_PUBLISH,
    ),
]
OnFailOption = Annotated[
    OnFail,
    typer.Option(
        "--on-fail",
        help="If the merge does not pass: leave a draft with the evidence, or publish nothing.",
        rich_help_panel=_PUBLISH,
    ),
]
LicenseOption = Annotated[
    str | None,
    typer.Option(
        "--license",
        metavar="ID",
        help="Licence of the merged model, if those of base and adapter conflict.",
        rich_help_panel=_PUBLISH,
    ),
]
AllowBase = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-base",
        metavar="OWNER/*",
        help="Accept only these base models (repeatable).",
        rich_help_panel=_PUBLISH,
    ),
]
DiskBudget = Annotated[
    str | None,
    typer.Option(
        "--disk-budget",
        metavar="SIZE",
        help="Disk space to stay within, such as 6GB. A model that needs more is merged and uploaded shard by shard.",
        rich_help_panel=_MERGE,
        show_default=False,
    ),
]
Json = Annotated[
    bool,
    typer.Option(
        "--json",
        help="Print one JSON document on stdout, everything else on stderr.",
        rich_help_panel=_OUTPUT,
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.", rich_help_panel=_OUTPUT)]
