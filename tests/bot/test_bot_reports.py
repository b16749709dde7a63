"""A job's page against the schema of the report: whatever the schema lets through is shown, each field there or not.

The reports are made from the schema itself, so that a field that becomes optional, or is renamed, is met here.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest

from merge_adapter.bot.app import Parts
from merge_adapter.bot.inbox import Inbox
from merge_adapter.bot.jobs import JobKind, JobOptions, JobRequest, JobState, Outcome, Source
from merge_adapter.bot.pages import views
from merge_adapter.bot.pages.login import NOBODY
from merge_adapter.bot.queue import Queue
from merge_adapter.bot.runners.base import REPORT_FILE
from merge_adapter.bot.store import Store
from merge_adapter.bot.submission import Submitted
from merge_adapter.bot.vault import open_vault
from merge_adapter.errors import MalformedError
from merge_adapter.report import document

DEFINITIONS = document.schema()["$defs"]


def example(schema: Mapping[str, Any]) -> Any:
    """A value with every field that `schema` describes."""
    if "$ref" in schema:
        return example(DEFINITIONS[schema["$ref"].removeprefix("#/$defs/")])
    for key in ("const", "enum"):
        if key in schema:
            return schema[key] if key == "const" else schema[key][0]
    kind = schema["type"] if isinstance(schema["type"], str) else schema["type"][0]
    if kind == "object":
        found = {name: example(field) for name, field in schema.get("properties", {}).items()}
        values = schema.get("additionalProperties")
        if isinstance(values, dict):
            name = example(schema["propertyNames"]) if "propertyNames" in schema else "named"
            found[name] = example(values)
        return found
    if kind == "array":
        if schema.get("uniqueItems"):
            return [example(schema["items"])]
        return [example(schema["items"]) for _ in range(max(2, schema.get("minItems", 0)))]
    if kind == "string":
        return "0" * int(schema["pattern"][-4:-2]) if "pattern" in schema else "<b>text</b>"
    if kind == "boolean":
        return True
    most = schema.get("maximum", schema.get("exclusiveMaximum"))
    least = schema.get("minimum", schema.get("exclusiveMinimum", 0))
    return least + 1 if most is None else (least + most) / 2


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where each field of `value` is; of a list, those of its first entry alone."""
    if isinstance(value, dict):
        for key, field in value.items():
            yield (*path, key)
            yield from places(field, (*path, key))
    elif isinstance(value, list) and value:
        yield from places(value[0], (*path, 0))


def partners(schema: Any) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Fields that go only together with others, from every `dependentRequired` inside."""
    if isinstance(schema, dict):
        yield from ((name, tuple(others)) for name, others in schema.get("dependentRequired", {}).items())
        for inner in schema.values():
            yield from partners(inner)


TOGETHER = dict(partners(document.schema()))


def without(whole: dict[str, Any], path: tuple[Any, ...]) -> dict[str, Any]:
    """A copy that lacks one field, and those that go with it."""
    lacking = copy.deepcopy(whole)
    inner: Any = lacking
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    for name in TOGETHER.get(path[-1], ()):
        inner.pop(name, None)
    return lacking


def variants(schema: Mapping[str, Any], check: Callable[..., None]) -> Iterator[dict[str, Any]]:
    """The fullest document, and each that lacks one more field and still keeps to the schema; last the barest."""
    whole = example(schema)
    check(whole, place="the fullest")
    yield whole
    barest = whole
    for path in [path for path in places(whole) if path[0] == "verification" or len(path) < 3]:
        try:
            one = without(whole, path)
            check(one, place="one less")
        except MalformedError:
            continue
        yield one
        try:
            one = without(barest, path)
            check(one, place="the barest")
        except (KeyError, IndexError, MalformedError):
            continue
        barest = one
    yield barest


@pytest.fixture
def parts(settings: Any) -> Iterator[Parts]:
    with Store(settings.database) as store:
        yield Parts(settings, Queue(store), Inbox(store), open_vault(settings))


@pytest.mark.parametrize("kind", list(JobKind))
def test_a_page_shows_every_report_that_the_schema_lets_through(parts: Parts, kind: JobKind) -> None:
    """Merges and verifications, and each kind of model in them; nothing of it becomes markup."""
    options = JobOptions(merged="ada/m" if kind is JobKind.VERIFY else None)
    request = JobRequest("ada/x", "a" * 40, Source.COMMENT, kind, private=False, options=options)
    submission = parts.queue.submit(request)
    assert isinstance(submission, Submitted)
    lease = parts.queue.claim("w")
    assert lease is not None
    parts.queue.finish(lease, Outcome(JobState.DONE, 0, verdict="pass"))
    place = parts.settings.job_folder(submission.job_id) / REPORT_FILE
    place.parent.mkdir(parents=True)
    judged = kind is JobKind.VERIFY
    schema = DEFINITIONS["judgement"] if judged else document.schema()
    check = document.validate_judgement if judged else document.validate
    shown = 0
    for report in variants(schema, check):
        outputs = report["verification"].get("outputs", {})
        kinds = DEFINITIONS["outputs"]["properties"]["kind"]["enum"] if "kind" in outputs else [None]
        # each kind of model in the fullest, and where no labels are told
        for model in kinds if not shown or "label_flips" not in outputs else kinds[:1]:
            if model is not None:
                outputs["kind"] = model
            place.write_text(json.dumps(report))
            for page in (views.live, views.report_page):
                text = bytes(page(submission.job_id, NOBODY, parts).body).decode()
                assert "<b>text" not in text
                assert "Verdict: <span" in text or page is not views.live, "the report was not shown"
            shown += 1
    assert shown > 40
