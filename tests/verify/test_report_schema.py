"""The published schema of the report against what the gate really writes.

Every judgement of the other modules here is checked too (`judged` in conftest.py): passes, failures and open answers of
every kind of model. This module shows that the schema is closed: what it does not name is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from merge_adapter.errors import MalformedError
from merge_adapter.report import document

OPEN = ("agreement", "seconds")
"""Maps from names to figures: their keys are no fields."""

LEFT_OUT = {
    "alpha", "retained", "effect", "worst_error", "residual", "oracle", "diagnosis", "per_tensor", "missed",
    "modules", "weights", "outputs", "greedy", "tokenizer", "files", "mutants", "seconds", "probes", "nats_per_token",
    "ceiling", "gap", "subfolder",
}  # fmt: skip
"""Fields that a report may lack."""


@pytest.fixture(scope="module")
def report(good: Callable[[str], Any]) -> dict[str, Any]:
    """What `verify --json --mutants` prints for the trained decoder."""
    right = good("lm-bf16")
    verification = right.judge(
        outputs=True, isolated=False, full_mutants=True, probe_tokens=128, greedy_tokens=4, greedy_prompts=2
    )
    return document.verdict_only(right.sources, verification)


def objects(place: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Every object inside `place`, of a list the first alone."""
    if isinstance(place, dict):
        yield path, place
        for key, value in place.items():
            yield from objects(value, (*path, key))
    elif isinstance(place, list) and place:
        yield from objects(place[0], (*path, 0))


def at(place: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        place = place[key]
    return place


def test_every_part_of_a_full_report_is_described(report: dict[str, Any]) -> None:
    """It keeps to the schema, and holds each section that a decoder's can."""
    document.validate_judgement(report, place="the report")
    wanted = set(document.schema()["$defs"]["verification"]["properties"])
    assert set(report["verification"]) == wanted


def test_a_field_that_the_schema_does_not_name_is_refused(report: dict[str, Any]) -> None:
    """In every object of the report, at every depth."""
    seen = 0
    for path, place in list(objects(report)):
        if path and path[-1] in OPEN:
            continue
        spoiled = copy.deepcopy(report)
        at(spoiled, path)["surprise"] = place and 1
        with pytest.raises(MalformedError, match="surprise"):
            document.validate_judgement(spoiled, place="the report")
        seen += 1
    assert seen > 20


@pytest.mark.parametrize("section", ["files", "seconds"])
def test_what_every_judgement_leaves_is_never_missing_beside_other_evidence(
    report: dict[str, Any], section: str
) -> None:
    """A verdict alone is that of a merge that nobody judged."""
    spoiled = copy.deepcopy(report)
    del spoiled["verification"][section]
    with pytest.raises(MalformedError, match=f"'{section}' is a"):
        document.validate_judgement(spoiled, place="the report")
    spoiled["verification"] = {"verdict": "inconclusive", "reasons": []}
    document.validate_judgement(spoiled, place="the report")


def test_a_field_that_is_gone_is_named(report: dict[str, Any]) -> None:
    """All but those that may be absent, in every object."""
    seen = 0
    for path, place in list(objects(report)):
        if path and path[-1] in OPEN:
            continue
        for key in sorted(set(place) - LEFT_OUT):
            spoiled = copy.deepcopy(report)
            del at(spoiled, path)[key]
            with pytest.raises(MalformedError, match=f"'{key}' is a"):
                document.validate_judgement(spoiled, place="the report")
            seen += 1
    assert seen > 60


PLAIN = {"schema", "notes", "findings", "min", "median", "max", "noise", "error", "effect"}
"""Fields whose name says it, beside the description of what holds them; versions of tools are others."""


def test_every_field_of_the_schema_says_what_it_is() -> None:
    """A description of its own, or of the definition it refers to."""
    whole = document.schema()
    nameless = []

    def walk(place: Any, path: str) -> None:
        for key, field in place.get("properties", {}).items():
            definition = whole["$defs"].get(field.get("$ref", "").removeprefix("#/$defs/"), {})
            told = field.get("description") or definition.get("description")
            if not told and key not in PLAIN and path != "tool":
                nameless.append(f"{path}/{key}")
            walk(field, f"{path}/{key}")
            walk(field.get("items", {}), f"{path}/{key}")

    walk(whole, "")
    for name, definition in whole["$defs"].items():
        walk(definition, name)
    assert not nameless


def test_objects_of_the_schema_are_closed() -> None:
    """None takes fields that nobody described, but for the maps that say what their values are."""
    open_ones = []

    def walk(place: Any, path: str) -> None:
        if isinstance(place, dict):
            kinds = place.get("type", ())
            if "properties" in place or kinds == "object" or "object" in kinds:
                extra = place.get("additionalProperties")
                if extra is not False and not isinstance(extra, dict):
                    open_ones.append(path)
            for key, value in place.items():
                walk(value, f"{path}/{key}")
        elif isinstance(place, list):
            for value in place:
                walk(value, path)

    walk({key: value for key, value in document.schema().items() if key != "$schema"}, "")
    assert open_ones == []
