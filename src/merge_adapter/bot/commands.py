"""Commands in comments: `@bot merge --dtype bfloat16`, `@bot verify owner/merged`."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, replace

from markdown_it import MarkdownIt

from merge_adapter.bot import choices
from merge_adapter.bot.jobs import JobKind, JobOptions
from merge_adapter.errors import InputError

USAGE = (
    "merge [--base-model ID] [--base-revision REV] [--dtype DTYPE] [--strategy STRATEGY] [--target-repo ID] "
    "[--license ID] [--private true] [--subfolder PATH] [--quantized-base KIND] [--soft-prompt tokens] "
    "[--adapter ID]… [--weight W]… [--combination KIND] [--density PART] [--svd-rank R] "
    "or verify OWNER/MERGED[@REVISION]"
)
_LONGEST_LINE = 1000
_LONGEST_COMMENT = 20_000
"""Characters of a comment that are looked at."""
_REPEATED = {"adapter": "adapters", "weight": "weights"}
"""Options that may stand there several times, as on the command line, and their names in `JobOptions`."""
_OPTIONS = {
    "subfolder": "subfolder",
    **{name.replace("_", "-"): name for name in choices.NAMES if name not in _REPEATED.values()},
    **_REPEATED,
}
"""Every option as it is written, and its name in `JobOptions`."""


@dataclass(frozen=True)
class Command:
    """What a comment asks for."""

    kind: JobKind
    options: JobOptions
    subfolder: str = ""


def find_command(text: str, name: str) -> Command | None:
    """The first command to `@name` in a comment, outside of quotes and code; None when it is not addressed.

    A mention without `merge` or `verify` behind it is talk about the bot. Raises InputError for a command that cannot
    be understood.
    """
    mention = re.compile(rf"(?:^|\s)@{re.escape(name)}[:,]?\s+(merge|verify)\b(.*)$", re.IGNORECASE)
    for line in _said(text):
        if found := mention.search(line[:_LONGEST_LINE]):
            return _parse(JobKind(found[1].lower()), found[2])
    return None


def _said(text: str) -> list[str]:
    """The lines of a comment that are its author's own words: neither quoted, nor in a block of code, nor hidden."""
    text = re.sub(r"\r\n?", "\n", text[:_LONGEST_COMMENT])  # as the parser counts lines
    lines = text.split("\n")
    for token in MarkdownIt().parse(text):
        hidden = token.type == "html_block" and token.content.lstrip().startswith("<!--")
        if token.map and (hidden or token.type in ("fence", "code_block")):
            begin, end = token.map
            lines[begin:end] = [""] * (end - begin)
    return [line for line in lines if not line.lstrip().startswith(">")]


def _parse(kind: JobKind, arguments: str) -> Command:
    try:
        words = shlex.split(arguments)
    except ValueError as error:
        raise InputError(f"the command cannot be read: {error}", hint=f"Write {USAGE}.") from error
    chosen, positional = _sort(words)
    subfolder = choices.subfolder(chosen.pop("subfolder", ""))
    if kind is JobKind.MERGE:
        if positional:
            raise InputError(f"merge takes no {positional[0][:60]!r}", hint=f"Write {USAGE}.")
        return Command(kind, choices.options_from(chosen), subfolder)
    if len(positional) != 1:
        raise InputError("verify takes the merged checkpoint to judge", hint=f"Write {USAGE}.")
    merged, revision = choices.reference(positional[0], what="merged checkpoint")
    for name in ("target_repo", "license", "private", "strategy", "soft_prompt"):
        if name in chosen:
            raise InputError(f"verify has no option {name.replace('_', '-')}", hint=f"Write {USAGE}.")
    options = choices.options_from(chosen)
    return Command(kind, replace(options, merged=f"{merged}@{revision}" if revision else merged), subfolder)


def _sort(words: list[str]) -> tuple[dict[str, str], list[str]]:
    """`--name value` and `--name=value` pairs, and the rest."""
    chosen: dict[str, str] = {}
    positional: list[str] = []
    waiting = iter(words)
    for word in waiting:
        if not word.startswith("--"):
            positional.append(word)
            continue
        name, equals, value = word[2:].partition("=")
        value = value if equals else next(waiting, "")
        if not value or value.startswith("--"):
            raise InputError(f"--{name[:40]} has no value", hint=f"Write {USAGE}.")
        if name not in _OPTIONS:
            raise InputError(f"there is no option --{name[:40]}", hint=f"Write {USAGE}.")
        repeated = name in _REPEATED and _OPTIONS[name] in chosen
        chosen[_OPTIONS[name]] = f"{chosen[_OPTIONS[name]]},{value}" if repeated else value
    return chosen, positional
