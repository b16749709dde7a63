"""The first records of a Parquet file, by ranges: its footer, and of the columns with text the first pages."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from merge_adapter.domain.records import PARQUET_LIMIT, RECORDS, Records
from merge_adapter.errors import MalformedError
from merge_adapter.types import Repository

_PAGE = 64 << 10
"""Bytes fetched at least at a time."""
_COLUMNS = 64
"""Columns looked at."""
_ROWS = 16
"""Rows decoded at a time."""


class _Ranges(io.RawIOBase):
    """A file of a repository, read where it is asked for; ends with MalformedError beyond `PARQUET_LIMIT` bytes."""

    def __init__(self, repository: Repository, path: str) -> None:
        super().__init__()
        self._repository, self._path = repository, path
        self._size = repository.files[path]
        self._at = 0
        self._held: tuple[int, bytes] = (0, b"")
        self.fetched = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def read(self, size: int = -1) -> bytes:
        stop = self._size if size is None or size < 0 else min(self._size, self._at + size)
        start, held = self._held
        if not start <= self._at <= stop <= start + len(held):
            start, wanted = self._at, max(stop - self._at, _PAGE)
            if self.fetched + wanted > PARQUET_LIMIT:
                raise OSError(f"more than {PARQUET_LIMIT:,} bytes of it would be needed")
            held = self._repository.read(self._path, offset=start, length=wanted)
            self.fetched += len(held)
            self._held = (start, held)
        found = held[self._at - start : stop - start]
        self._at = stop
        return found


def available() -> bool:
    """Whether the library that reads Parquet is installed."""
    from importlib.util import find_spec

    return find_spec("pyarrow") is not None


def read_parquet(repository: Repository, path: str) -> Records:
    """Up to `RECORDS` records, of the columns that hold text or lists. Raises MalformedError with the reason."""
    if not available():
        raise MalformedError(
            "Parquet files are read with pyarrow, which is not installed (merge-adapter[parquet])"
        )
    import pyarrow as pa
    import pyarrow.parquet as pq

    source = _Ranges(repository, path)
    rows: list[Mapping[str, Any]] = []
    try:
        file = pq.ParquetFile(source, buffer_size=_PAGE, pre_buffer=False)
        names = [field.name for field in file.schema_arrow if _holds_text(field.type, pa)][:_COLUMNS]
        if not names:
            raise MalformedError("none of its columns holds text")
        for batch in file.iter_batches(batch_size=_ROWS, columns=names, use_threads=False):
            rows += batch.to_pylist()
            if len(rows) >= RECORDS:
                break
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, MalformedError):
            raise
        if not rows:
            raise MalformedError(
                f"it cannot be read as Parquet: {' '.join(str(error).split())[:200]}"
            ) from error
    return Records(tuple(rows[:RECORDS]), source.fetched)


def _holds_text(kind: Any, pa: Any) -> bool:
    """Strings, and lists and structures of them, numbers among them; never bytes, as pictures and sounds are."""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _holds_text(kind.value_type, pa)
    if pa.types.is_struct(kind):
        inner = [kind.field(at).type for at in range(kind.num_fields)]
        text = [_holds_text(one, pa) for one in inner]
        return any(text) and all(
            is_text or pa.types.is_primitive(one) or pa.types.is_null(one)
            for is_text, one in zip(text, inner, strict=True)
        )
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))
