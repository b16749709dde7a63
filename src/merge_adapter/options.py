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
        help="The merged checkpoint, whoever made it: a folder or a Hub id (refs/pr/N works).",
    ),
]
MergedSubfolder = Annotated[
    str,
    typer.Option(
        "--merged-subfolder", metavar="PATH", help="Where in MERGED the model lies.", rich_help_panel=_SOURCES
    ),
]
BaseModelOption = Annotated[
    str | None,
    typer.Option(
        "--base-model",
        metavar="ID|DIR",
        help="The base model, when it is not the one that adapter_config.json names.",
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
        help="Where in the adapter's repository it lies.",
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
        help="What the update is multiplied with; once per adapter, in their order.",
        rich_help_panel=_SEVERAL,
        show_default="1 each",
    ),
]
CombinationOption = Annotated[
    CombinationType,
    typer.Option(
        "--combination",
        help="sequential adds the weighted updates up; the others are PEFT's add_weighted_adapter.",
        rich_help_panel=_SEVERAL,
    ),
]
Density = Annotated[
    float | None,
    typer.Option(
        "--density",
        metavar="PART",
        help="ties, dare, magnitude_prune: the part of the values that is kept.",
        rich_help_panel=_SEVERAL,
        show_default=False,
    ),
]
MajoritySignOption = Annotated[
    MajoritySign,
    typer.Option("--majority-sign", help="ties, dare_ties: how signs are elected.", rich_help_panel=_SEVERAL),
]
SvdRank = Annotated[
    int | None,
    typer.Option(
        "--svd-rank",
        metavar="R",
        min=1,
        help="svd: the rank that is kept.",
        rich_help_panel=_SEVERAL,
        show_default="the largest of the adapters'",
    ),
]
CombinationSeed = Annotated[
    int, typer.Option("--seed", help="Of dare's random pruning.", rich_help_panel=_SEVERAL)
]
OutputFolder = Annotated[
    Path,
    typer.Option(
        "--output",
        "-o",
        metavar="DIR",
        help="The folder to make. Nothing is overwritten.",
        show_default=False,
    ),
]
KeepFolder = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o", metavar="DIR", help="Keep the merged folder here.", rich_help_panel=_OUTPUT
    ),
]
DTypeOption = Annotated[
    DType,
    typer.Option(help="Of the merged weights; auto keeps each tensor's own.", rich_help_panel=_MERGE),
]
DeviceOption = Annotated[
    str,
    typer.Option(metavar="auto|cpu|cuda[:N]", help="Where to compute.", rich_help_panel=_MERGE),
]
StrategyOption = Annotated[
    Strategy,
    typer.Option(
        help="stream: row blocks of the files, little memory. memory: PEFT's merge on the loaded model.",
        rich_help_panel=_MERGE,
    ),
]
QuantizedBaseOption = Annotated[
    QuantizedBase,
    typer.Option(
        help="What to merge into when the base is stored quantised: its dequantised weights, or the 16-bit "
        "original that its card names.",
        rich_help_panel=_MERGE,
    ),
]
SoftPromptOption = Annotated[
    SoftPrompt,
    typer.Option(
        "--soft-prompt",
        help="tokens: prompt tuning and P-tuning become new tokens that the tokenizer puts in front.",
        rich_help_panel=_MERGE,
    ),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run and publish the Python files of the base's repository.",
        rich_help_panel=_MERGE,
    ),
]
NoVerify = Annotated[
    bool,
    typer.Option("--no-verify", help="Skip the equivalence gate; the report says so.", rich_help_panel=_GATE),
]
ProbeTokens = Annotated[
    int | None,
    typer.Option(
        "--probe-tokens",
        min=16,
        metavar="N",
        help="Tokens for the output test: its cost.",
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
        help="Own probe texts beside the built-in ones: a text per line, or JSON lines.",
        rich_help_panel=_GATE,
    ),
]
DatasetProbes = Annotated[
    bool,
    typer.Option(
        "--dataset-probes/--no-dataset-probes",
        help="Ask about a few documents of the public data sets that the adapter's card names.",
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
    PublishTo, typer.Option("--publish", help="Where the merged model goes.", rich_help_panel=_PUBLISH)
]
TargetRepo = Annotated[
    str | None,
    typer.Option(
        "--target-repo",
        metavar="ID",
        help="The repository.",
        rich_help_panel=_PUBLISH,
        show_default="ADAPTER-merged",
    ),
]
Private = Annotated[
    bool | None,
    typer.Option(
        "--private/--public",
        help="Of a repository that has to be made; private sources always give a private one.",
        rich_help_panel=_PUBLISH,
        show_default=False,
    ),
]
PathInRepo = Annotated[
    str | None,
    typer.Option(
        "--path-in-repo",
        metavar="PATH",
        help="Folder inside the target repository; a pull request to the adapter's own needs one.",
        rich_help_panel=_PUBLISH,
    ),
]
OnFailOption = Annotated[
    OnFail,
    typer.Option(
        "--on-fail",
        help="A merge that did not pass: leave a draft with the evidence, or publish nothing.",
        rich_help_panel=_PUBLISH,
    ),
]
LicenseOption = Annotated[
    str | None,
    typer.Option(
        "--license",
        metavar="ID",
        help="The merged model's licence, where base and adapter disagree.",
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
        help="Use no more disk than this, such as 6GB: shards pass through one after another.",
        rich_help_panel=_MERGE,
        show_default=False,
    ),
]
Json = Annotated[
    bool,
    typer.Option("--json", help="One JSON document on stdout, the rest on stderr.", rich_help_panel=_OUTPUT),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.", rich_help_panel=_OUTPUT)]
