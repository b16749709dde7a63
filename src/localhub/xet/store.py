"""Xorbs and file recipes on disk, content-addressed.

    xet/xorbs/ab/<hash>        a xorb as it was uploaded
    xet/files/ab/<hash>.json   the terms of a file, its size and SHA-256
    xet/indexes/ab/<hash>      the chunks of a xorb, as a shard that clients read

Any number of processes may read and write: every file appears by a rename and never changes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from localhub.errors import BadRequestError, NotFoundError
from localhub.files import atomic_file
from localhub.xet import shard as shards
from localhub.xet import xorb as xorbs
from localhub.xet.shard import Shard, ShardFile, Term

_HASH = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Recipe:
    """How a file is put together."""

    hash: str
    sha256: str
    size: int
    terms: tuple[Term, ...]


@dataclass(frozen=True)
class Reconstruction:
    """The terms that cover a range of a file."""

    skip: int
    """Bytes of the first term before the range."""
    terms: tuple[Term, ...]


def check_hash(text: str) -> str:
    """A hash that may become part of a path."""
    if not _HASH.fullmatch(text):
        raise BadRequestError("Malformed hash: expected 64 lower-case hex digits")
    return text


class XetStore:
    """The chunks of all repositories."""

    def __init__(self, root: Path) -> None:
        self._xorbs = root / "xorbs"
        self._files = root / "files"
        self._indexes = root / "indexes"
        self._chunks = lru_cache(maxsize=256)(self._read_chunks)

    def _xorb_path(self, hash: str) -> Path:
        return self._xorbs / hash[:2] / check_hash(hash)

    def _index_path(self, hash: str) -> Path:
        return self._indexes / hash[:2] / check_hash(hash)

    def _file_path(self, hash: str) -> Path:
        return self._files / hash[:2] / f"{check_hash(hash)}.json"

    # ------------------------------------------------------------------------------------------ xorbs

    def add_xorb(self, hash: str, data: bytes) -> bool:
        """Keep a xorb; whether it was new.

        Raises:
            BadRequestError: not a xorb.
        """
        path = self._xorb_path(hash)
        if path.exists():
            return False
        try:
            xorbs.parse(data)
        except xorbs.MalformedXorbError as error:
            raise BadRequestError(f"Malformed xorb {hash}: {error}") from error
        with atomic_file(path) as file:
            file.write(data)
        return True

    def xorb_path(self, hash: str) -> Path:
        """Raises NotFoundError when the store has no such xorb."""
        path = self._xorb_path(hash)
        if not path.exists():
            raise NotFoundError(f"xorb {hash} not found")
        return path

    def chunks(self, hash: str) -> tuple[xorbs.Chunk, ...]:
        """The chunks of a xorb, from a cache."""
        return self._chunks(hash)

    def _read_chunks(self, hash: str) -> tuple[xorbs.Chunk, ...]:
        return xorbs.parse(self.xorb_path(hash).read_bytes())

    # ----------------------------------------------------------------------------------------- shards

    def add_shard(self, data: bytes) -> tuple[Shard, list[Recipe]]:
        """Register the files of a shard, each checked by putting it together once.

        Raises:
            BadRequestError: a xorb is missing, a range does not exist, or the content is not what the
                shard's SHA-256 says.
        """
        try:
            shard = shards.parse(data)
        except shards.MalformedShardError as error:
            raise BadRequestError(f"Malformed shard: {error}") from error
        self._check(shard)
        recipes = [self._add_file(file) for file in shard.files]
        for xorb in shard.xorbs:
            path = self._index_path(xorb.hash)
            if not path.exists() and self._xorb_path(xorb.hash).exists():
                with atomic_file(path) as file:
                    file.write(shards.chunk_index(shard.tag, xorb.records))
        return shard, recipes

    def index(self, xorb: str) -> bytes:
        """A shard that names the chunks of a xorb.

        Raises:
            NotFoundError: no client has told.
        """
        try:
            return self._index_path(xorb).read_bytes()
        except FileNotFoundError as error:
            raise NotFoundError(f"No index of xorb {xorb}") from error

    def _check(self, shard: Shard) -> None:
        for file in shard.files:
            for term in file.terms:
                try:
                    chunks = self.chunks(term.xorb)
                except NotFoundError as error:
                    raise BadRequestError(
                        f"Shard refers to xorb {term.xorb}, which was never uploaded here"
                    ) from error
                length = sum(chunk.length for chunk in chunks[term.start : term.end])
                if not 0 <= term.start < term.end <= len(chunks) or length != term.length:
                    raise BadRequestError(
                        f"Chunks {term.start} to {term.end} of xorb {term.xorb} hold {length} bytes, "
                        f"the shard says {term.length}"
                    )

    def _add_file(self, file: ShardFile) -> Recipe:
        known = self.recipe(file.hash)
        if known is not None and known.sha256 == (file.sha256 or known.sha256):
            return known
        digest = hashlib.sha256()
        size = 0
        for piece in self._read_terms(file.terms):
            digest.update(piece)
            size += len(piece)
        sha256 = digest.hexdigest()
        if file.sha256 not in (None, sha256):
            raise BadRequestError(f"File {file.hash} has SHA-256 {sha256}, the shard says {file.sha256}")
        recipe = Recipe(file.hash, sha256, size, file.terms)
        document = {
            "sha256": sha256,
            "size": size,
            "terms": [[term.xorb, term.length, term.start, term.end] for term in file.terms],
        }
        with atomic_file(self._file_path(file.hash)) as out:
            out.write(json.dumps(document).encode())
        return recipe

    # ------------------------------------------------------------------------------------------ files

    def recipe(self, hash: str) -> Recipe | None:
        """How a file is put together, None when no shard told."""
        try:
            document = json.loads(self._file_path(hash).read_bytes())
        except FileNotFoundError:
            return None
        terms = tuple(Term(*term) for term in document["terms"])
        return Recipe(hash, document["sha256"], document["size"], terms)

    def reconstruct(self, recipe: Recipe, start: int, end: int) -> Reconstruction:
        """The terms that hold bytes `start` to `end` (exclusive) of a file."""
        covering: list[Term] = []
        skip = 0
        offset = 0
        for term in recipe.terms:
            if offset < end and offset + term.length > start:
                if not covering:
                    skip = start - offset
                covering.append(term)
            offset += term.length
        return Reconstruction(skip, tuple(covering))

    def read(self, recipe: Recipe, start: int, end: int) -> Iterator[bytes]:
        """The bytes `start` to `end` (exclusive) of a file, chunk by chunk."""
        part = self.reconstruct(recipe, start, end)
        skip, left = part.skip, end - start
        for piece in self._read_terms(part.terms):
            if skip >= len(piece):
                skip -= len(piece)
                continue
            piece = piece[skip : skip + left]
            skip = 0
            left -= len(piece)
            yield piece
            if left <= 0:
                return

    def _read_terms(self, terms: tuple[Term, ...]) -> Iterator[bytes]:
        for term in terms:
            chunks = self.chunks(term.xorb)[term.start : term.end]
            with self.xorb_path(term.xorb).open("rb") as file:
                for chunk in chunks:
                    file.seek(chunk.offset + xorbs.HEADER_BYTES)
                    yield xorbs.unpack(file.read(chunk.stored), chunk.scheme, chunk.length)
