"""Tables of the action's inputs and outputs, from action.yml, for README and docs.

    python -m merge_adapter.action.table [--check] [README.md docs/github-action.md]

Without arguments both tables go to stdout. With Markdown files as arguments the text between
`<!-- inputs -->` and `<!-- /inputs -->`, and `outputs` likewise, is replaced in them; with `--check` nothing is
written, and files that differ are named.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from merge_adapter.action.markdown import table

DEFINITION = Path("action.yml")
SECTIONS = ("inputs", "outputs")


def tables(definition: Path = DEFINITION) -> dict[str, str]:
    """Section name -> its Markdown table."""
    import yaml  # a dependency of huggingface_hub

    action = yaml.safe_load(definition.read_text(encoding="utf-8"))
    return {
        "inputs": table(
            ("input", "default", "meaning"),
            [(f"`{name}`", _default(entry), _text(entry)) for name, entry in action["inputs"].items()],
        ),
        "outputs": table(
            ("output", "meaning"), [(f"`{name}`", _text(entry)) for name, entry in action["outputs"].items()]
        ),
    }


def filled(text: str, sections: dict[str, str]) -> str:
    """`text` with every marked section replaced."""
    for name in SECTIONS:
        marked = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        text = marked.sub(lambda match, name=name: f"{match[1]}{sections[name]}\n{match[2]}", text)  # type: ignore[misc]
    return text


def main(arguments: Sequence[str]) -> int:
    sections = tables()
    files = [Path(argument) for argument in arguments if argument != "--check"]
    if not files:
        sys.stdout.write("\n\n".join(sections.values()) + "\n")
        return 0
    stale = []
    for file in files:
        text = file.read_text(encoding="utf-8")
        fresh = filled(text, sections)
        if fresh != text:
            stale.append(file)
            if "--check" not in arguments:
                file.write_text(fresh, encoding="utf-8")
    if stale and "--check" in arguments:
        sys.stderr.write(f"out of date: {', '.join(map(str, stale))}\n")
        return 1
    return 0


def _default(entry: dict[str, Any]) -> str:
    value = str(entry.get("default", ""))
    if not value:
        return ""
    return "the workflow's own" if value.startswith("${{") else f"`{value}`"


def _text(entry: dict[str, Any]) -> str:
    return " ".join(str(entry["description"]).split())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
