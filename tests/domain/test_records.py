"""The first records of a data set's files, and the documents that become of them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from merge_adapter.checkpoint.folder import Folder
from merge_adapter.domain import candidates
from merge_adapter.domain.documents import LONGEST, columns_of, documents
from merge_adapter.domain.records import HEAD, LIMIT, PARQUET_LIMIT, RECORDS, read_records
from merge_adapter.errors import MalformedError

TURNS = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
ROWS = [{"text": f"Record {number} is here."} for number in range(200)]


def lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def table(delimiter: str) -> bytes:
    return "\n".join(
        ["id" + delimiter + "text", *(f'{n}{delimiter}"Row {n},\nwith a line"' for n in range(9))]
    ).encode()


CONTENTS = {
    "train.jsonl": (lines(ROWS), RECORDS),
    "train.jsonl.gz": (gzip.compress(lines(ROWS)), RECORDS),
    "train.json": (json.dumps(ROWS).encode(), RECORDS),
    "wrapped.json": (json.dumps({"version": 1, "data": ROWS[:5]}).encode(), 5),
    "train.csv": (table(","), 9),
    "train.tsv": (table("\t"), 9),
    "train.txt": (b"One line.\n\nAnother one.\n", 2),
    "mark.jsonl": (b"\xef\xbb\xbf" + lines(ROWS[:2]), 2),
}


@pytest.mark.parametrize("name", list(CONTENTS))
def test_each_format_gives_its_first_records(name: str, tmp_path: Path) -> None:
    content, count = CONTENTS[name]
    (tmp_path / name).write_bytes(content)
    found = read_records(Folder(tmp_path), name)
    assert len(found.rows) == count
    assert found.bytes_read == len(content)
    if "text" in found.rows[0] and name.startswith("train.j"):
        assert found.rows == tuple(ROWS[:count])


@pytest.mark.parametrize("name", ["train.jsonl", "train.json", "train.csv", "train.txt"])
def test_of_a_large_file_a_piece_is_read_and_no_half_record_taken(name: str, tmp_path: Path) -> None:
    """Of a file of six megabytes and more: those that lie whole in the piece, and no character cut in two."""
    rows = [{"text": f"{number} " + "é" * 50_000} for number in range(60)]
    content = {
        "train.jsonl": lines(rows),
        "train.json": json.dumps(rows, ensure_ascii=False).encode(),
        "train.csv": ("text\n" + "\n".join(row["text"] for row in rows)).encode(),
        "train.txt": "\n".join(row["text"] for row in rows).encode(),
    }[name]
    (tmp_path / name).write_bytes(content)
    found = read_records(Folder(tmp_path), name)
    assert found.bytes_read < LIMIT + HEAD < len(content)
    assert found.rows
    assert all(row in rows for row in found.rows)


def test_a_record_longer_than_the_first_piece_is_fetched_whole(tmp_path: Path) -> None:
    long = {"text": "x" * 1_000_000}
    (tmp_path / "a.jsonl").write_bytes(lines([long] * 8))
    assert read_records(Folder(tmp_path), "a.jsonl").rows[0] == long


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", b"{not json}\n", "a line of it is not JSON"),
        ("a.json", b"[" * 100_000, "nested too deeply|not JSON"),
        ("a.json", b'"text"', "holds no list"),
        ("a.json", b"[]", "hold no whole record"),
        ("a.txt", b"\xff\xfe\x00a\x00", "not UTF-8"),
        ("a.jsonl.gz", b"plain", "not gzip"),
        ("a.parquet", b"PAR1 but no more", "cannot be read as Parquet"),
        ("a.csv", b"", "hold no whole record"),
    ],
)
def test_what_cannot_be_read_says_why(name: str, content: bytes, says: str, tmp_path: Path) -> None:
    """Files of strangers: whatever is in them ends as an error of ours."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(MalformedError, match=says):
        read_records(Folder(tmp_path), name)


def test_a_packed_file_is_unpacked_no_further_than_the_limit(tmp_path: Path) -> None:
    """A few kilobytes that would become a hundred megabytes."""
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b" " * (100 << 20)))
    with pytest.raises(MalformedError, match="hold no whole record"):
        read_records(Folder(tmp_path), "a.jsonl.gz")


def write_parquet(path: Path, columns: dict[str, list[Any]], **options: Any) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path, **options)


def test_parquet_is_read_by_pages_of_its_text_columns(tmp_path: Path) -> None:
    """A megabyte of pictures beside each text is not fetched."""
    noise = [bytes(range(256)) * 4096] * 100
    texts = [f"Document {number} " + "word " * 50 for number in range(100)]
    turns = [[{"role": "user", "content": text}] for text in texts]
    columns = {"image": noise, "text": texts, "messages": turns, "label": list(range(100))}
    write_parquet(tmp_path / "a.parquet", columns, use_dictionary=False, compression="none")
    assert (tmp_path / "a.parquet").stat().st_size > 3 * PARQUET_LIMIT
    found = read_records(Folder(tmp_path), "a.parquet")
    assert len(found.rows) == RECORDS
    assert set(found.rows[0]) == {"text", "messages"}
    assert found.rows[1]["messages"] == turns[1]
    assert found.bytes_read < 1 << 20


def test_parquet_without_text_says_so(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", {"label": [1, 2], "image": [b"x", b"y"]})
    with pytest.raises(MalformedError, match="none of its columns holds text"):
        read_records(Folder(tmp_path), "a.parquet")


@pytest.mark.parametrize(
    ("record", "rule", "plain"),
    [
        ({"messages": TURNS, "text": "no"}, "conversation: messages", "user: Why?\nassistant: So."),
        (
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}]},
            "conversation: conversations",
            "user: Hi\nassistant: Yes",
        ),
        ({"id": "7", "text": "  A text. "}, "text: text", "A text."),
        (
            {"instruction": "Add", "input": "1, 2", "output": "3"},
            "task: instruction, input, output",
            "user: Add\n\n1, 2\nassistant: 3",
        ),
        ({"prompt": "Once", "completion": " upon"}, "task: prompt, completion", "user: Once\nassistant: upon"),
        (
            {"prompt": "Why?", "chosen": TURNS, "rejected": TURNS},
            "task: prompt, chosen",
            "user: Why?\nassistant: So.",
        ),
        ({"prompt": TURNS[:1], "chosen": TURNS[1:]}, "task: prompt, chosen", "user: Why?\nassistant: So."),
        (
            {"question": "Who?", "context": "Ada.", "answers": {"text": ["Ada"], "answer_start": [0]}},
            "task: question, context, answers",
            "user: Who?\n\nAda.\nassistant: Ada",
        ),
        ({"premise": "It rains.", "hypothesis": "Wet.", "label": 1}, "pair: premise, hypothesis", "It rains.\nWet."),
        ({"a": "short", "review": "A film of some length."}, "longest text", "A film of some length."),
    ],
)  # fmt: skip
def test_columns_become_documents_by_the_rule(record: dict[str, Any], rule: str, plain: str) -> None:
    columns = columns_of(record)
    assert str(columns) == rule
    assert columns is not None
    [probe] = documents([record, record], columns, name="o/d", count=4)
    assert probe.plain() == plain
    assert probe.name == "o/d 1"


@pytest.mark.parametrize(
    "record", [{}, {"label": 3}, {"a": "short"}, {"text": None}, {"messages": [{"role": 1}]}]
)
def test_records_without_text_give_no_columns(record: dict[str, Any]) -> None:
    assert columns_of(record) is None


def test_a_table_without_a_head_leaks_no_text_into_the_rule() -> None:
    """Its first row stands where names would: the rule, which reports show, leaves them out."""
    columns = columns_of({"The first text of all.": "The second text of all."})
    assert columns is not None
    assert str(columns) == "longest text"


def test_documents_are_bounded_and_records_of_another_shape_passed_over() -> None:
    rows = [{"text": "a" * 100_000}, {"text": 7}, {}, {"text": "b"}]
    columns = columns_of(rows[0])
    assert columns is not None
    assert [len(probe.text) for probe in documents(rows, columns, name="d", count=9)] == [LONGEST, 1]


def test_files_of_a_training_split_come_first_and_code_never(tmp_path: Path) -> None:
    for name in (
        "README.md", "d.py", "data/test.jsonl", "data/train-00000.parquet", "train.csv", "other.json", "LICENSE.txt",
        "dataset_infos.json", ".hidden.json", "empty.jsonl", "audio/0.wav",
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"" if name.startswith("empty") else b"x")
    assert list(candidates(Folder(tmp_path))) == ["data/train-00000.parquet", "train.csv", "other.json"]
