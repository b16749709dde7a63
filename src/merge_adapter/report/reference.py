"""The fields of merge_report.json as Markdown, from its JSON schema, for docs/report.md.

    python -m merge_adapter.report.reference [--check] [docs/report.md]

Without a file the text goes to stdout. In a file the text between `<!-- fields -->` and `<!-- /fields -->` is replaced;
with `--check` nothing is written, and a file that differs is named.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from merge_adapter.report.document import schema

_PLACE = re.compile(r"(?<=<!-- fields -->\n).*?(?=<!-- /fields -->)", re.DOTALL)
_REFERENCE = "#/$defs/"


def reference() -> str:
    """One table for the document, and one for each kind of object in it, in the order in which they come up."""
    whole = schema()
    pages = [*_table("The report", whole)]
    told: set[str] = set()
    waiting = [*_named(whole), "judgement"]
    while waiting:
        name = waiting.pop(0)
        if name in told:
            continue
        told.add(name)
        definition = whole["$defs"][name]
        if definition.get("properties") or definition.get("items", {}).get("properties"):
            pages += _table(f"`{name}`", definition)
        waiting = [*_named(definition), *waiting]
    return "\n".join(pages).rstrip() + "\n"


def _table(title: str, definition: Mapping[str, Any]) -> Iterator[str]:
    yield f"### {title}"
    yield ""
    if "description" in definition:
        yield str(definition["description"])
        yield ""
    yield "| field | type | meaning |"
    yield "|---|---|---|"
    yield from _rows(definition.get("items", definition), "")
    yield ""


def _rows(place: Mapping[str, Any], path: str) -> Iterator[str]:
    """Fields of an object, those of objects inside it by their path. One that may be absent is in italics."""
    needed = place.get("required", ())
    for name, field in place["properties"].items():
        shown = f"`{path}{name}`" if name in needed else f"*`{path}{name}`*"
        yield f"| {shown} | {_type(field)} | {_meaning(field)} |"
        inner = field.get("items", field)
        if "properties" in inner:
            yield from _rows(inner, f"{path}{name}{'[]' if 'items' in field else ''}.")


def _meaning(field: Mapping[str, Any]) -> str:
    told = field.get("description") or _definition(field).get("description", "")
    return str(told).replace("|", "\\|")


def _type(field: Mapping[str, Any]) -> str:
    definition = _definition(field)
    if "properties" in definition or definition.get("items", {}).get("properties"):
        kind = field["$ref"].removeprefix(_REFERENCE)
        return f"[`{kind}`](#{kind})"
    field = definition or field
    if "const" in field:
        return f"`{field['const']}`"
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if "items" in field:
        return f"list of {_type(field['items'])}"
    kinds = field.get("type", "object")
    kinds = [kinds] if isinstance(kinds, str) else kinds
    return " or ".join(kinds) + _range(field)


def _range(field: Mapping[str, Any]) -> str:
    words = (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<"))
    bounds = [f"{sign} {field[word]:g}" for word, sign in words if word in field]
    return f", {', '.join(bounds)}" if bounds else ""


def _definition(field: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Mapping[str, Any] = schema()["$defs"].get(field.get("$ref", "").removeprefix(_REFERENCE), {})
    return found


def _named(place: Any) -> Iterator[str]:
    """Definitions that are referred to inside `place`, in order; not those of its own `$defs`."""
    if isinstance(place, Mapping):
        if "$ref" in place:
            yield place["$ref"].removeprefix(_REFERENCE)
        for key, value in place.items():
            if key != "$defs":
                yield from _named(value)
    elif isinstance(place, list):
        for value in place:
            yield from _named(value)


def filled(text: str) -> str:
    """`text` with its marked part replaced."""
    return _PLACE.sub(lambda _: "\n" + reference() + "\n", text)


def main(arguments: Sequence[str]) -> int:
    """The exit status: 1 when `--check` finds a file out of date."""
    files = [Path(argument) for argument in arguments if argument != "--check"]
    if not files:
        sys.stdout.write(reference())
    stale = [file for file in files if filled(text := file.read_text(encoding="utf-8")) != text]
    if "--check" in arguments:
        sys.stderr.writelines(f"out of date: {file}\n" for file in stale)
        return 1 if stale else 0
    for file in stale:
        file.write_text(filled(file.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
