"""The first records of a file of a data set: JSON lines, JSON, CSV, TSV, text and Parquet, plain or gzipped.

The files are untrusted. A bounded piece of each is fetched; nothing in it is run, and no library's own loader of data
sets takes part, which may run code. Whatever cannot be read raises MalformedError, with the reason.
"""

from __future__ import annotations

import csv
import io
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from merge_adapter.errors import MalformedError
from merge_adapter.types import Repository

HEAD = 256 << 10
"""Bytes of a file fetched first."""

LIMIT = 4 << 20
"""Bytes of a file fetched at most, and bytes of text made of them."""

PARQUET_LIMIT = 32 << 20
"""Bytes of a Parquet file fetched at most: its last pages describe it, and its columns lie apart."""

RECORDS = 64
"""Records looked at."""

FORMATS = {
    ".jsonl": "json lines", ".ndjson": "json lines", ".parquet": "parquet", ".json": "json", ".csv": "csv",
    ".tsv": "tsv", ".txt": "text",
}  # fmt: skip
"""Endings that can be read, the easiest first; `.gz` may follow all but Parquet."""


@dataclass(frozen=True)
class Records:
    """The first records of a file, in its order."""

    rows: tuple[Mapping[str, Any], ...]
    bytes_read: int


def format_of(path: str) -> str | None:
    """The format by the file's name; None for one that is not read."""
    name = path.lower()
    packed = name.endswith(".gz")
    name = name.removesuffix(".gz")
    found = next((format_ for ending, format_ in FORMATS.items() if name.endswith(ending)), None)
    return None if packed and found == "parquet" else found


def read_records(repository: Repository, path: str) -> Records:
    """Up to `RECORDS` records of `path`. Raises MalformedError, or whatever `repository` raises."""
    kind = format_of(path)
    if kind == "parquet":
        from merge_adapter.domain.parquet import read_parquet

        return read_parquet(repository, path)
    size, spent = repository.files[path], 0
    for length in dict.fromkeys((min(HEAD, size), min(LIMIT, size))):
        raw = repository.read(path, offset=0, length=length)
        spent += len(raw)
        text, whole = _decoded(raw, packed=path.lower().endswith(".gz"), whole=length == size)
        try:
            rows = tuple(_rows(text, kind or "", whole=whole))
        except RecursionError as error:
            raise MalformedError(f"{path} is nested too deeply") from error
        if rows or length == size:
            break
    if not rows:
        raise MalformedError(f"the first {length:,} bytes of {path} hold no whole record")
    return Records(rows, spent)


def _decoded(raw: bytes, *, packed: bool, whole: bool) -> tuple[str, bool]:
    """The text, and whether it is all of the file's. A piece of a file may end inside a character."""
    if packed:
        unpacker = zlib.decompressobj(wbits=31)  # gzip
        try:
            raw = unpacker.decompress(raw, LIMIT)
        except zlib.error as error:
            raise MalformedError(f"it is not gzip: {error}") from error
        whole = whole and unpacker.eof
    try:
        return raw.decode("utf-8-sig"), whole
    except UnicodeDecodeError as error:
        if whole or error.start < len(raw) - 4:
            raise MalformedError("it is not UTF-8 text") from error
        return raw[: error.start].decode("utf-8-sig"), False


def _rows(text: str, kind: str, *, whole: bool) -> Iterator[Mapping[str, Any]]:
    if kind == "json":
        yield from _of_json(text, whole=whole)
        return
    if kind in ("csv", "tsv"):
        yield from _of_table(text, "," if kind == "csv" else "\t", whole=whole)
        return
    lines = text.split("\n")
    if not whole:
        lines.pop()  # cut off in the middle
    count = 0
    for line in lines:
        if not line.strip():
            continue
        row = _parsed(line) if kind == "json lines" else {"text": line.strip()}
        if isinstance(row, dict):
            yield row
            count += 1
        if count == RECORDS:
            return


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise MalformedError(f"a line of it is not JSON: {error}") from error


def _of_json(text: str, *, whole: bool) -> Iterator[Mapping[str, Any]]:
    """The objects of the first list in it, one by one, so that the rest need not be there."""
    start = text.find("[")
    lead = text[:start].strip() if start >= 0 else ""
    if start < 0 or (lead and not lead.startswith("{")):
        raise MalformedError(
            "it holds no list of records" if whole else "its list of records begins too late"
        )
    decoder, at, count = json.JSONDecoder(), start + 1, 0
    while count < RECORDS:
        while at < len(text) and text[at] in " \t\r\n,":
            at += 1
        if at >= len(text) or text[at] == "]":
            return
        try:
            row, at = decoder.raw_decode(text, at)
        except ValueError as error:
            if whole:
                raise MalformedError(f"it is not JSON: {error}") from error
            return  # cut off in the middle
        if isinstance(row, dict):
            yield row
            count += 1


def _of_table(text: str, delimiter: str, *, whole: bool) -> Iterator[Mapping[str, Any]]:
    """Rows by the names in the first line. Of a piece, the last row is left out: it may be cut off."""
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    held: Mapping[str, Any] | None = None
    try:
        for count, row in enumerate(reader):
            if held is not None:
                yield held
            if count == RECORDS:
                return
            held = {name: value for name, value in row.items() if isinstance(name, str)}
    except csv.Error as error:
        if held is None:
            raise MalformedError(f"it is not {delimiter!r}-separated text: {error}") from error
        return
    if held is not None and whole:
        yield held
