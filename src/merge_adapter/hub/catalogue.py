"""Lists of adapters on the Hub, and the webhooks that watch for new ones."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from huggingface_hub import WebhookInfo

from merge_adapter.errors import NotFoundError
from merge_adapter.hub.conversations import account_exists, is_organisation
from merge_adapter.hub.session import repeat

if TYPE_CHECKING:
    from merge_adapter.hub.client import Hub

ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class Webhook:
    """A webhook of this account."""

    id: str
    url: str
    watched: tuple[str, ...]
    """`type name`, such as `user ada`."""
    domains: tuple[str, ...]
    disabled: bool


def adapters_of(hub: Hub, author: str) -> tuple[str, ...]:
    """Ids of the author's repositories that hold an adapter, sorted. NotFoundError where nobody has that name."""
    with hub.calling(f"list the models of {author}", repo_id=author):
        listed = repeat(lambda: list(hub.api.list_models(author=author, full=True)), hub.patience)
    if not listed and not account_exists(
        hub, author
    ):  # the Hub lists no models for a mistyped name, and no error
        raise NotFoundError(
            f"{hub.endpoint} has no user or organisation named {author}",
            hint="Check the spelling: it is the part before the slash in the names of the repositories.",
        )
    return tuple(
        sorted(
            info.id
            for info in listed
            if any(file.rfilename.split("/")[-1] == ADAPTER_CONFIG for file in info.siblings or ())
        )
    )


def adapter_folders(files: Iterable[str]) -> tuple[str, ...]:
    """Where in a repository its adapters lie, "" for the root. Beside one at the root others do not count: they are
    what training left on its way there."""
    configs = [path for path in files if path.split("/")[-1] == ADAPTER_CONFIG]
    found = tuple(sorted(path.removesuffix(ADAPTER_CONFIG).removesuffix("/") for path in configs))
    return ("",) if "" in found else found


def models_in_collection(hub: Hub, slug: str) -> tuple[str, ...]:
    """Ids of the models in a collection, in its order."""
    with hub.calling(f"read the collection {slug}"):
        found = repeat(lambda: hub.api.get_collection(slug), hub.patience)
    return tuple(item.item_id for item in found.items if item.item_type == "model")


def set_webhook(hub: Hub, url: str, watch: Iterable[str], secret: str) -> Webhook:
    """Make the Hub call `url` for every push and comment in `watch`: owners, or repositories as owner/name.

    A webhook that calls `url` already is changed: with two, the Hub would tell everything twice.
    """
    watched: list[dict[str, str]] = [{"type": _kind(hub, name), "name": name} for name in watch]
    known = next((one.id for one in list_webhooks(hub) if one.url == url), None)
    api = hub.api
    with hub.calling(f"make the Hub call {url}"):
        made = (api.create_webhook if known is None else partial(api.update_webhook, known))(
            url=url,
            watched=watched,  # type: ignore[arg-type]  # the client takes dicts; list is invariant
            domains=["repo", "discussion"],
            secret=secret,
        )
    return _webhook(made)


def list_webhooks(hub: Hub) -> tuple[Webhook, ...]:
    """The webhooks of this account."""
    with hub.calling("list the webhooks"):
        return tuple(_webhook(one) for one in repeat(hub.api.list_webhooks, hub.patience))


def delete_webhook(hub: Hub, webhook_id: str) -> None:
    """Remove one. Raises NotFoundError for an id that this account has not."""
    with hub.calling(f"delete the webhook {webhook_id}"):
        hub.api.delete_webhook(webhook_id)


def _kind(hub: Hub, name: str) -> str:
    """What the Hub calls a thing to watch: `model`, `org` or `user`."""
    if "/" in name:
        return "model"
    return "org" if is_organisation(hub, name) else "user"


def _webhook(info: WebhookInfo) -> Webhook:
    watched = tuple(f"{item.type} {item.name}" for item in info.watched)
    return Webhook(info.id, info.url or "(a job)", watched, tuple(info.domains), bool(info.disabled))
