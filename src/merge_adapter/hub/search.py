"""Finding adapters on the Hub: those of an author, and those of a collection."""

from __future__ import annotations

from merge_adapter.errors import InputError
from merge_adapter.hub.client import Hub
from merge_adapter.hub.session import repeat
from merge_adapter.resolve import ADAPTER_CONFIG


def find_adapters(watch: str, *, hub: Hub) -> tuple[str, ...]:
    """Ids of the repositories of `watch` that hold an adapter at their root, sorted.

    `watch` is an author (a user or an organisation), or the slug of a collection, `owner/title-hash`. Raises
    NotFoundError when there is no such author or collection, HubError when the Hub fails.
    """
    text = watch.strip()
    if not text or text.count("/") > 1 or any(part in ("", ".", "..") for part in text.split("/")):
        raise InputError(
            f"{watch!r} is neither an author nor a collection",
            hint="Write an author as `owner`, a collection as its address has it: `owner/title-hash`.",
        )
    found = _of_collection(text, hub) if "/" in text else _of_author(text, hub)
    return tuple(sorted(found, key=str.lower))


def _of_author(author: str, hub: Hub) -> list[str]:
    with hub.calling(f"list the models of {author}"):
        models = repeat(lambda: list(hub.api.list_models(author=author, full=True)), hub.patience)
    return [
        model.id for model in models if any(file.rfilename == ADAPTER_CONFIG for file in model.siblings or ())
    ]


def _of_collection(slug: str, hub: Hub) -> list[str]:
    with hub.calling(f"read the collection {slug}"):
        collection = repeat(lambda: hub.api.get_collection(slug), hub.patience)
    members = [item.item_id for item in collection.items if item.item_type == "model"]
    return [member for member in members if ADAPTER_CONFIG in hub.open(member).files]
