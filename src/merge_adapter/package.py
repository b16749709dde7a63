"""Package: everything of the merged folder but weights, card and report.

Files are chosen from lists of what a model needs, never by copying a folder and taking things away: so no
`adapter_config.json` (beside full weights it makes transformers load the adapter again), optimizer state,
pickle, checkpoint or second adapter can slip through.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from merge_adapter.methods.refuse import SOFT_PROMPTS
from merge_adapter.packaging.code import AUTO_MAP, copy_code, without_code
from merge_adapter.packaging.configs import merged_config, repaired_generation_config, without_places
from merge_adapter.packaging.reading import read_limited, read_object
from merge_adapter.packaging.sentence import write_sentence_transformer
from merge_adapter.packaging.soft_prompt import write_soft_prompt
from merge_adapter.packaging.tokenizer import source_of, write_processors, write_tokenizer
from merge_adapter.packaging.writing import Writer
from merge_adapter.types import MergeSettings, OutputFile, Resolved

if TYPE_CHECKING:
    from merge_adapter.plan import MergePlan

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
_LEGAL = re.compile(
    r"(licen[cs]e|notice|copying|use[_-]policy|acceptable[_-]use[_-]policy)[\w.-]*", re.IGNORECASE
)
_LEGAL_SUFFIXES = ("", ".md", ".pdf", ".rst", ".txt")


@dataclass(frozen=True)
class Packaged:
    """What packaging did."""

    files: tuple[OutputFile, ...]
    """Every file it put into the folder, sorted by path."""
    notes: tuple[str, ...]
    """What a person should know about them, one sentence each."""


def package(sources: Resolved, plan: MergePlan, destination: Path, *, settings: MergeSettings) -> Packaged:
    """Put configs, tokenizer, processors, sentence-transformers modules and legal texts into `destination`.

    A file that needs no edit is copied byte for byte. Files of the plan's outputs are left alone.

    Raises MalformedError for configs and paths that cannot be read or trusted, PolicyError for a model that
    runs code of its repository when `settings.trust_remote_code` is off, OSError of the disk.
    """
    writer = Writer(
        destination, taken=frozenset((*(shard.path for shard in plan.outputs), *filter(None, (plan.index,))))
    )
    _write_config(sources, plan, writer, settings)
    if sources.adapter.method in SOFT_PROMPTS:
        write_soft_prompt(sources, writer)  # first: what is written already is not copied
    _write_generation_config(sources, writer)
    write_tokenizer(sources, writer, settings)
    write_processors(sources, writer, settings)
    write_sentence_transformer(sources, writer, settings)
    if settings.trust_remote_code:
        copy_code(sources.base.repository, writer, source="base")
        if sources.tokenizer is not None and source_of(sources.tokenizer, sources) == "adapter":
            copy_code(sources.tokenizer, writer, source="adapter")
    _write_legal(sources, writer)
    return Packaged(files=writer.files, notes=tuple(writer.notes))


def _write_config(sources: Resolved, plan: MergePlan, writer: Writer, settings: MergeSettings) -> None:
    base = sources.base
    config = merged_config(base, plan.config_changes, settings)
    if not settings.trust_remote_code and AUTO_MAP in config:
        config = without_code(config, file=CONFIG, repository=base.repository)
        writer.note(f"{CONFIG} no longer points at Python code of the base's repository.")
    if config == base.config:
        writer.copy(base.repository, CONFIG, source="base")
    else:
        writer.write_json(CONFIG, config)


def _write_generation_config(sources: Resolved, writer: Writer) -> None:
    """The adapter's generation config where it carries one, else the base's; repaired where invalid."""
    for repository in (sources.adapter.repository, sources.base.repository):
        if GENERATION_CONFIG not in repository.files:
            continue
        config = read_object(repository, GENERATION_CONFIG)
        repaired, dropped = repaired_generation_config(without_places(config))
        if dropped:
            writer.note(
                f"{GENERATION_CONFIG} was refused by transformers and repaired: "
                f"without effect and so dropped: {', '.join(dropped)}."
            )
        if repaired == config:
            writer.copy(repository, GENERATION_CONFIG, source=source_of(repository, sources))
        else:
            writer.write_json(GENERATION_CONFIG, repaired)
        return


def _write_legal(sources: Resolved, writer: Writer) -> None:
    """Licence, notice and policy texts: the base's under their names, the adapter's own beside them."""
    for path in _legal_files(sources.base.repository.files):
        writer.copy(sources.base.repository, path, source="base")
    adapter = sources.adapter.repository
    for path in _legal_files(adapter.files):
        if not writer.has(path):
            writer.copy(adapter, path, source="adapter")
        elif read_limited(adapter, path) != read_limited(sources.base.repository, path):
            writer.copy(adapter, path, source="adapter", target=f"adapter-{path}")


def _legal_files(paths: Iterable[str]) -> list[str]:
    return [
        path
        for path in sorted(paths)
        if _LEGAL.fullmatch(path) and Path(path).suffix.lower() in _LEGAL_SUFFIXES
    ]
