"""Large files by SHA-256, whichever way they came: whole through LFS, or as chunks through xet."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterator
from pathlib import Path

from localhub.database import Database
from localhub.errors import NotFoundError
from localhub.repositories import Repository
from localhub.xet.shard import Shard
from localhub.xet.store import Recipe, XetStore, check_hash

_BLOCK = 1024 * 1024


class LargeFiles:
    """The content behind LFS pointers. Safe for any number of threads and processes."""

    def __init__(self, root: Path, database: Database, xet: XetStore) -> None:
        self._root = root
        self._database = database
        self._xet = xet

    def path(self, sha256: str) -> Path:
        """Where a whole file lies, if it came through LFS."""
        check_hash(sha256)
        return self._root / sha256[:2] / sha256[2:4] / sha256

    def size(self, sha256: str) -> int | None:
        """Bytes of a file, None when the store does not have it."""
        path = self.path(sha256)
        if path.exists():
            return path.stat().st_size
        row = self._database.one("SELECT size FROM xet_files WHERE sha256 = ?", sha256)
        return int(row["size"]) if row else None

    def xet_hash(self, sha256: str) -> str | None:
        """The xet hash of a file that came as chunks."""
        row = self._database.one("SELECT hash FROM xet_files WHERE sha256 = ?", sha256)
        return str(row["hash"]) if row else None

    def register(self, recipes: list[Recipe]) -> None:
        """Make files of a shard known by their SHA-256."""
        with self._database.writing() as connection:
            connection.executemany(
                "INSERT INTO xet_files VALUES (?, ?, ?) ON CONFLICT (sha256) DO UPDATE SET hash = excluded.hash",
                [(recipe.sha256, recipe.hash, recipe.size) for recipe in recipes],
            )

    def index_chunks(self, repository: Repository, shard: Shard) -> None:
        """Note where the chunks of a shard lie, so that other clients need not upload them again."""
        rows = [(chunk, xorb.hash, repository.id) for xorb in shard.xorbs for chunk in xorb.chunks]
        with self._database.writing() as connection:
            connection.executemany("INSERT INTO xet_chunks VALUES (?, ?, ?) ON CONFLICT DO NOTHING", rows)

    def xorb_of_chunk(self, chunk: str) -> str | None:
        """A xorb that holds a chunk, if one belongs to a repository whose files all may read.

        An index names all chunks of its xorb, and whoever can name a chunk can read it: so nothing is told
        of private and gated ones.
        """
        row = self._database.one(
            "SELECT c.xorb FROM xet_chunks c JOIN repositories r ON r.id = c.repository "
            "WHERE c.hash = ? AND r.private = 0 AND r.gated = '' AND r.disabled = 0",
            chunk,
        )
        return str(row["xorb"]) if row else None

    def read(self, sha256: str, start: int, end: int) -> Iterator[bytes]:
        """Bytes `start` to `end` (exclusive).

        Raises:
            NotFoundError: the store does not have the file.
        """
        path = self.path(sha256)
        if path.exists():
            return _read_file(path, start, end)
        hash = self.xet_hash(sha256)
        recipe = self._xet.recipe(hash) if hash else None
        if recipe is None:
            raise NotFoundError(f"Large file {sha256} is not in the store")
        return self._xet.read(recipe, start, end)

    def part_path(self, repository_id: str, sha256: str, number: int, part_sha256: str) -> Path:
        """Where a part of a multipart upload waits for the others; each repository has its own."""
        return self._root / f".part-{repository_id}-{check_hash(sha256)}-{number}-{check_hash(part_sha256)}"

    def receive(self) -> Receiver:
        """Somewhere to write a file of which only the SHA-256 is known."""
        return Receiver(self._root / f".incoming-{secrets.token_hex(8)}")

    def accept(self, received: Receiver, sha256: str) -> bool:
        """Keep what was received under its hash; False, and nothing kept, when the hash is another."""
        received.finish()
        if received.sha256 != sha256:
            received.discard()
            return False
        path = self.path(sha256)
        path.parent.mkdir(parents=True, exist_ok=True)
        received.path.rename(path)
        return True


class Receiver:
    """A temporary file that hashes what it takes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("wb")
        self._digest = hashlib.sha256()
        self.size = 0

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self.size += len(data)

    def finish(self) -> None:
        self._file.close()

    def discard(self) -> None:
        self._file.close()
        self.path.unlink(missing_ok=True)


def _read_file(path: Path, start: int, end: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(start)
        left = end - start
        while left > 0 and (block := file.read(min(_BLOCK, left))):
            left -= len(block)
            yield block
