"""The README.md of a merged model: what it is, how to use it, where it came from, what was shown about it.

Text of the sources is foreign: in metadata only values of the right form are carried over, names appear as
code, and the adapter's own card stands in a block quote that it cannot leave.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_adapter.checkpoint.quantization import quantization_of
from merge_adapter.packaging.code import AUTO_MAP
from merge_adapter.packaging.markdown import code, quoted, sentence, without_front_matter
from merge_adapter.packaging.metadata import (
    README,
    Card,
    front_matter,
    merged_licence,
    metadata,
    read_card,
)
from merge_adapter.packaging.usage import snippet
from merge_adapter.types import (
    FileOrigin,
    Origin,
    OutputFile,
    Resolved,
    Verdict,
)

if TYPE_CHECKING:
    from merge_adapter.plan import MergePlan

HUB = "https://huggingface.co"
PROJECT = "https://github.com/merge-adapter/merge-adapter"
REPORT = "merge_report.json"
_EXAMPLE = re.compile(r"^## How to use\n\n```python\n.*?^```", re.DOTALL | re.MULTILINE)
_UNFILLED = "[More Information Needed]"
_UNFILLED_COUNT = 12
"""PEFT's template has about thirty of these; a card that kept so many says nothing."""
_VERDICTS = {
    Verdict.PASS: "The merged model was compared with base + adapter and found equivalent.",
    Verdict.FAIL: "**The merged model does not answer as base + adapter does. Do not use it.**",
    Verdict.INCONCLUSIVE: "**Equivalence with base + adapter was not shown. Check it before you use it.**",
}


def write_card(
    destination: Path,
    *,
    sources: Resolved,
    plan: MergePlan,
    report: Mapping[str, Any],
    table: str = "",
    license: str | None = None,
    place: str | None = None,
    subfolder: str = "",
) -> OutputFile:
    """Write `destination`/README.md and return it.

    `report` is merge_report.json as far as it exists. `table` is evidence and reasons as Markdown,
    written by us; without it the card gives the reasons alone.
    `license` overrides what the sources state. `place` is the Hub id under which the model will be found,
    in its folder `subfolder`.
    """
    base, adapter = read_card(sources.base.repository), read_card(sources.adapter.repository)
    config = json.loads((destination / "config.json").read_text(encoding="utf-8"))
    decision = merged_licence(base, adapter, license)
    sections = [
        front_matter(metadata(sources, config, base, adapter, decision.licence)),
        _introduction(sources),
        _usage(destination, config, place or _default_place(sources), subfolder),
        _provenance(sources, plan, report),
        _equivalence(report, table),
        _limits(sources, report),
    ]
    if decision.note:
        sections.append(f"## Licence\n\n{sentence(decision.note)}")
    own = _own_card(adapter)
    if own:
        sections.append(f"## The adapter's own card\n\n{own}")
    content = ("\n\n".join(section.strip() for section in sections) + "\n").encode()
    (destination / README).write_bytes(content)
    return OutputFile(README, len(content), hashlib.sha256(content).hexdigest(), FileOrigin.WRITTEN)


def readdressed(card: str, folder: Path, place: str, subfolder: str) -> str:
    """A card that `write_card` wrote, its example for the model at `place`; one without an example as it is."""

    def usage(_: re.Match[str]) -> str:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return _usage(folder, config, place, subfolder)

    return _EXAMPLE.sub(usage, card, count=1)


def _introduction(sources: Resolved) -> str:
    names = " and ".join(_linked(adapter.repository.origin) for adapter in sources.adapters)
    title = _short_name(sources.adapter.repository.origin)
    kind = "adapter" if len(sources.adapters) == 1 else "adapters"
    return (
        f"# {sentence(title)}, merged\n\n"
        f"The {kind} {names}, folded into the weights of {_linked(sources.base.repository.origin)} by "
        f"[merge-adapter]({PROJECT}). It loads like any model, without PEFT."
    )


def _usage(folder: Path, config: Mapping[str, Any], place: str, subfolder: str) -> str:
    shown = snippet(folder, config, place=place, subfolder=subfolder, code_needed=AUTO_MAP in config)
    return f"## How to use\n\n```python\n{shown}```"


def _default_place(sources: Resolved) -> str:
    repo_id = sources.adapter.repository.origin.repo_id
    return f"{repo_id}-merged" if repo_id else "path/to/this/folder"


def _provenance(sources: Resolved, plan: MergePlan, report: Mapping[str, Any]) -> str:
    rows: list[tuple[str, str]] = []
    for adapter in sources.adapters:
        weight = f", weight {adapter.weight:g}" if len(sources.adapters) > 1 or adapter.weight != 1 else ""
        rows.append(("Adapter", _pinned(adapter.repository.origin) + weight))
        rows.append(("Method", _method(adapter.method, adapter.config)))
    if len(sources.adapters) > 1:
        stated = {"type": sources.combination.type.value, **report.get("combination", {})}
        settings = "".join(f", {name} {value}" for name, value in stated.items() if name != "type")
        rows.append(("Combination", code(stated["type"]) + settings.replace("_", " ")))
    rows.append(("Base model", _pinned(sources.base.repository.origin)))
    if sources.tokenizer is not None:
        rows.append(("Tokenizer", _pinned(sources.tokenizer.origin)))
    dtype = str(report.get("output", {}).get("dtype", "auto"))
    kept = "of each tensor as in the base model"
    if quantization_of(sources.base.config) is not None:
        kept += ", dequantised"
    rows.append(("Dtype", kept if dtype == "auto" else code(dtype)))
    rows.append(("Strategy", plan.strategy.value))
    rows.append(("Adapter tensors", f"{plan.consumed} of {plan.adapter_tensors} merged"))
    tool = report.get("tool", {})
    if tool:
        others = ", ".join(f"{name} {tool[name]}" for name in tool if name not in ("name", "version"))
        rows.append(("Made by", f"merge-adapter {tool.get('version', '')} with {others}"))
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return f"## Provenance\n\n| | |\n|---|---|\n{table}\n\nEvery file with its hash: [{REPORT}]({REPORT})."


def _method(method: str, config: Mapping[str, Any]) -> str:
    """The method with rank and scale where the config states them as numbers."""
    stated = [code(method)]
    for key, name in (("r", "rank"), ("lora_alpha", "alpha")):
        value = config.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool):
            stated.append(f"{name} {value:g}")
    stated += [
        name for key, name in (("use_rslora", "rsLoRA"), ("use_dora", "DoRA")) if config.get(key) is True
    ]
    return ", ".join(stated)


def _equivalence(report: Mapping[str, Any], table: str) -> str:
    verification = report.get("verification", {})
    verdict = Verdict(verification.get("verdict", Verdict.INCONCLUSIVE))
    reasons = "\n".join(f"- {sentence(str(reason))}" for reason in verification.get("reasons", ()))
    explained = f"[What the checks mean]({PROJECT}/blob/main/docs/equivalence.md)."
    parts = [
        f"## Equivalence: {verdict.value}",
        f"{_VERDICTS[verdict]} {explained}",
        table.strip() or reasons,
    ]
    return "\n\n".join(part for part in parts if part)


def _limits(sources: Resolved, report: Mapping[str, Any]) -> str:
    limits = [
        "Equivalence was judged against base + adapter on a limited set of probe texts; it says nothing about how "
        "good either of them is. What the base model and the adapter cannot do, this model cannot do.",
        "Weights stored in 16 bit round the update once; sampled text can differ where two tokens are almost equally "
        "likely.",
    ]
    if sources.tokenizer is None:
        limits.append("The sources have no tokenizer; the outputs were compared on random token ids.")
    limits += [sentence(str(note)) for note in report.get("notes", ())]
    return "## Limits\n\n" + "\n".join(f"- {limit}" for limit in limits)


def _own_card(card: Card) -> str:
    """The adapter's text as a quote; "" when there is none."""
    if not without_front_matter(card.text).strip():
        return ""
    if card.text.count(_UNFILLED) >= _UNFILLED_COUNT:
        return "It is PEFT's template, not filled in, and is left out."
    return quoted(card.text)


def _short_name(origin: Origin) -> str:
    if origin.repo_id is not None:
        return origin.repo_id.rsplit("/", 1)[-1]
    return origin.folder.name if origin.folder is not None else "adapter"


def _linked(origin: Origin) -> str:
    """A Hub id as a link; a folder by its name alone, since cards are published."""
    if origin.repo_id is not None:
        return f"[{sentence(origin.repo_id)}]({HUB}/{origin.repo_id})"
    return f"{code(_short_name(origin))} (a local folder)"


def _pinned(origin: Origin) -> str:
    if origin.repo_id is None or origin.revision is None:
        text = _linked(origin)
    else:
        tree = f"{HUB}/{origin.repo_id}/tree/{origin.revision}"
        text = f"[{sentence(origin.repo_id)}]({tree}) at {code(origin.revision)}"
    return f"{text}, folder {code(origin.subfolder)}" if origin.subfolder else text
