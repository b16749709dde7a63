"""From a record of a data set to a document: which columns are text, by one stated rule.

The first of these that fits decides, and it decides for the whole file:

1. a conversation: `messages`, `conversations`, `conversation`, `chat` or `dialog`; turns are `role` and `content`,
   or `from` and `value`
2. a text: `text`, `content`, `document`, `article`
3. a task and its answer: `instruction` (with `input` or `context`), `prompt`, `question`, `query` or `problem`, and
   `output`, `response`, `completion`, `chosen`, `answer` or `solution`
4. a pair: `sentence1`, `premise`, `anchor` or `sentence`, and `sentence2`, `hypothesis` or `positive`
5. the column with the longest text, when that is at least 20 characters
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merge_adapter.verify.probes import Probe

LONGEST = 8_000
"""Characters of one document; the rest is cut off."""

_TURNS = 32
"""Turns of a conversation that are taken."""
_CONVERSATIONS = ("messages", "conversations", "conversation", "chat", "dialog")
_TEXTS = ("text", "content", "document", "article")
_TASKS = ("instruction", "prompt", "question", "query", "problem")
_INPUTS = ("input", "context")
_ANSWERS = ("output", "response", "completion", "chosen", "answer", "answers", "solution", "positive")
_FIRST = ("sentence1", "premise", "anchor", "sentence", "text1")
_SECOND = ("sentence2", "hypothesis", "positive", "text2")
_ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
_SHORTEST_GUESS = 20
_GUESSED = "longest text"


@dataclass(frozen=True)
class Columns:
    """How the records of one file become documents."""

    names: tuple[str, ...]
    rule: str
    """`conversation`, `text`, `task`, `pair` or `longest text`."""

    def __str__(self) -> str:
        """For reports. Names that are not of the rule itself are left out: of a table without a head they are text."""
        return self.rule if self.rule == _GUESSED else f"{self.rule}: {', '.join(self.names)}"


def columns_of(record: Mapping[str, Any]) -> Columns | None:
    """The columns of a file whose records look like `record`; None when none holds text."""
    for name in _CONVERSATIONS:
        if _turns(record.get(name)):
            return Columns((name,), "conversation")
    for name in _TEXTS:
        if _text(record.get(name)):
            return Columns((name,), "text")
    task = next((name for name in _TASKS if _said(record.get(name))), None)
    answer = next((name for name in _ANSWERS if _said(record.get(name))), None)
    if task and answer:
        extra = [name for name in _INPUTS if isinstance(record.get(name), str)]
        return Columns((task, *extra[:1], answer), "task")
    first = next((name for name in _FIRST if _text(record.get(name))), None)
    if first:
        second = next((name for name in _SECOND if _text(record.get(name))), None)
        return Columns((first, second) if second else (first,), "pair")
    lengths = {name: len(_text(value)) for name, value in record.items()}
    longest = min(lengths, key=lambda name: (-lengths[name], name), default="")
    if lengths.get(longest, 0) >= _SHORTEST_GUESS:
        return Columns((longest,), _GUESSED)
    return None


def documents(
    records: Sequence[Mapping[str, Any]], columns: Columns, *, name: str, count: int
) -> Iterator[Probe]:
    """Up to `count` documents of the first records that give one, no two alike. `name` names them in reports."""
    seen: set[str] = set()
    for number, record in enumerate(records, 1):
        probe = _document(record, columns, f"{name} {number}")
        if probe is None or probe.plain() in seen:
            continue
        seen.add(probe.plain())
        yield probe
        if len(seen) == count:
            return


def _document(record: Mapping[str, Any], columns: Columns, name: str) -> Probe | None:
    if columns.rule == "conversation":
        turns = _turns(record.get(columns.names[0]))
        return Probe(name, messages=turns) if turns else None
    if columns.rule == "task":
        task, *between, answer = columns.names
        turns = (*_said(record.get(task)), *_answered(record.get(answer)))
        extra = _text(record.get(between[0])) if between else ""
        if not turns or turns[0]["role"] != "user":
            return None
        asked = turns[0]["content"] + (f"\n\n{extra}" if extra else "")
        return Probe(name, messages=({"role": "user", "content": asked[:LONGEST]}, *turns[1:]))
    text = "\n".join(filter(None, (_text(record.get(column)) for column in columns.names)))
    return Probe(name, text[:LONGEST]) if text else None


def _text(value: Any) -> str:
    """The text of a cell; "" for anything that is not text."""
    return value.strip()[:LONGEST] if isinstance(value, str) else ""


def _said(value: Any) -> tuple[Mapping[str, str], ...]:
    """What a task's cell says: a text, or a conversation of its own."""
    if text := _text(value):
        return ({"role": "user", "content": text},)
    if isinstance(value, Mapping):  # SQuAD's answers
        value = value.get("text")
    if isinstance(value, list) and value and (text := _text(value[0])):
        return ({"role": "user", "content": text},)
    return _turns(value)


def _answered(value: Any) -> tuple[Mapping[str, str], ...]:
    """The answer's turns; of a conversation that repeats the question, the assistant's."""
    turns = _said(value)
    if len(turns) == 1 and not isinstance(value, list):
        return ({"role": "assistant", "content": turns[0]["content"]},)
    own = tuple(turn for turn in turns if turn["role"] == "assistant")
    return own or tuple({"role": "assistant", "content": turn["content"]} for turn in turns[:1])


def _turns(value: Any) -> tuple[Mapping[str, str], ...]:
    """The turns of a conversation; none when a cell is no conversation, or has a turn that cannot be read."""
    if not isinstance(value, list) or not value:
        return ()
    found: list[Mapping[str, str]] = []
    for turn in value[:_TURNS]:
        if not isinstance(turn, Mapping):
            return ()
        role, said = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if not isinstance(role, str) or role not in _ROLES or not isinstance(said, str):
            return ()
        found.append({"role": _ROLES[role], "content": said.strip()[:LONGEST]})
    return tuple(found)
