"""Collections: named lists of repositories."""

from __future__ import annotations

import re
import secrets
import sqlite3
from dataclasses import dataclass

from localhub.database import Database, new_id, now
from localhub.errors import BadRequestError, ConflictError, NotFoundError


@dataclass(frozen=True)
class Item:
    """One entry of a collection."""

    id: str
    type: str
    item: str
    note: str | None
    position: int


@dataclass(frozen=True)
class Collection:
    slug: str
    id: str
    owner: str
    title: str
    description: str | None
    private: bool
    theme: str
    position: int
    updated_at: str
    items: tuple[Item, ...]


class Collections:
    """The tables of collections and their items."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def _collection(self, row: sqlite3.Row) -> Collection:
        rows = self._database.all(
            "SELECT * FROM collection_items WHERE slug = ? ORDER BY position, rowid", row["slug"]
        )
        items = tuple(Item(r["id"], r["type"], r["item"], r["note"], at) for at, r in enumerate(rows))
        return Collection(
            slug=row["slug"],
            id=row["id"],
            owner=row["owner"],
            title=row["title"],
            description=row["description"],
            private=bool(row["private"]),
            theme=row["theme"],
            position=row["position"],
            updated_at=row["updated_at"],
            items=items,
        )

    def all(self) -> list[Collection]:
        rows = self._database.all("SELECT * FROM collections ORDER BY updated_at DESC, rowid DESC")
        return [self._collection(row) for row in rows]

    def get(self, slug: str) -> Collection:
        row = self._database.one("SELECT * FROM collections WHERE slug = ?", slug)
        if row is None:
            raise NotFoundError("Collection not found")
        return self._collection(row)

    def create(self, owner: str, title: str, description: str | None, *, private: bool) -> Collection:
        """Raises ConflictError, with the slug in its body, when the owner has one of that title."""
        if not title.strip() or len(title) > 60:
            raise BadRequestError("title must have between 1 and 60 characters")
        readable = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "collection"
        slug = f"{owner}/{readable}-{secrets.token_hex(12)}"
        with self._database.writing() as connection:
            for other in self.all():
                if other.owner == owner and other.title == title:
                    raise ConflictError(
                        "Collection already exists",
                        body={"error": "Collection already exists", "slug": other.slug},
                    )
            connection.execute(
                "INSERT INTO collections VALUES (?, ?, ?, ?, ?, ?, 'orange', 0, ?)",
                (slug, new_id(), owner, title, description, private, now()),
            )
        return self.get(slug)

    def update(self, slug: str, **changes: str | int | bool) -> Collection:
        """Change title, description, private, theme or position."""
        with self._database.writing() as connection:
            for column in ("title", "description", "private", "theme", "position"):
                if column in changes:
                    connection.execute(
                        f"UPDATE collections SET {column} = ? WHERE slug = ?",  # noqa: S608 - names above
                        (changes[column], slug),
                    )
            connection.execute("UPDATE collections SET updated_at = ? WHERE slug = ?", (now(), slug))
        return self.get(slug)

    def delete(self, slug: str) -> None:
        with self._database.writing() as connection:
            connection.execute("DELETE FROM collection_items WHERE slug = ?", (slug,))
            connection.execute("DELETE FROM collections WHERE slug = ?", (slug,))

    def add(self, slug: str, type: str, item: str, note: str | None) -> Collection:
        """Raises ConflictError when the item is in the collection already."""
        try:
            self._database.write(
                "INSERT INTO collection_items VALUES (?, ?, ?, ?, ?, "
                "(SELECT COUNT(*) FROM collection_items WHERE slug = ?))",
                *(new_id(), slug, type, item, note, slug),
            )
        except sqlite3.IntegrityError as error:
            raise ConflictError("Item already in collection") from error
        return self.update(slug)

    def change_item(self, slug: str, id: str, note: str | None, position: int | None) -> None:
        with self._database.writing() as connection:
            for column, value in (("note", note), ("position", position)):
                if value is not None:
                    connection.execute(
                        f"UPDATE collection_items SET {column} = ? WHERE slug = ? AND id = ?",  # noqa: S608
                        (value, slug, id),
                    )

    def remove(self, slug: str, id: str) -> None:
        if not self._database.write("DELETE FROM collection_items WHERE slug = ? AND id = ?", slug, id):
            raise NotFoundError("Item not found in collection")
