"""What may be published where: the most closed of adapter and base decides."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from merge_adapter.errors import InputError, PolicyError
from merge_adapter.licences import Licence, LicenceDecision, decide_licence, read_licence
from merge_adapter.publish.contents import read_card
from merge_adapter.publish.settings import Openness, PublishSettings, Source
from merge_adapter.types import Repository

if TYPE_CHECKING:
    from merge_adapter.hub import Hub


def openness_of(*, private: bool, gated: str | None) -> Openness:
    """Who may read a repository, from its fields on the Hub."""
    if private:
        return Openness.PRIVATE
    if gated:
        return Openness.GATED_AUTO if gated == "auto" else Openness.GATED_MANUAL
    return Openness.PUBLIC


def inspect(role: str, repository: Repository) -> tuple[Source, Licence]:
    """A source with its licence: from the Hub's record of it, or from the README.md of a local folder."""
    from merge_adapter.hub import HubRepository

    if isinstance(repository, HubRepository):
        openness = openness_of(private=repository.private, gated=repository.gated)
        return Source(role, repository.repo_id, openness), read_licence(repository.card)
    return Source(role, None), read_licence(_local_card(repository))


def inspect_reported(role: str, entry: Mapping[str, Any], *, hub: Hub) -> tuple[Source, Licence]:
    """The same for a source as merge_report.json names it. What cannot be seen any more is an error, not public."""
    repo_id, revision = entry.get("id"), entry.get("revision")
    if not isinstance(repo_id, str) or revision is None:
        return Source(role, None), Licence("")  # a local folder, of which the report keeps the name alone
    return inspect(role, hub.open(repo_id, revision=revision))


def check_base(source: Source, allowed: Iterable[str]) -> None:
    """Raise PolicyError when there is a list of allowed bases and this one is not in it."""
    patterns = tuple(allowed)
    if not patterns or allows(patterns, source.repo_id):
        return
    raise PolicyError(
        f"{source} is not among the allowed bases ({', '.join(patterns)})",
        hint=f"To allow it: --allow-base {source.repo_id or 'OWNER/NAME'}",
    )


def allows(patterns: Iterable[str], repo_id: str | None) -> bool:
    """Whether `OWNER/NAME` or `OWNER/*` in `patterns` names `repo_id`; case does not matter, as on the Hub.

    A star never crosses the slash, and the owner is never a pattern: `*` alone allows nothing.
    """
    if repo_id is None:
        return False
    owner, _, name = repo_id.lower().rpartition("/")
    for pattern in patterns:
        wanted_owner, slash, wanted_name = pattern.lower().rpartition("/")
        if not slash or not wanted_owner or "*" in wanted_owner:
            raise InputError(
                f"{pattern!r} does not name a base", hint="Write OWNER/NAME or OWNER/* for --allow-base."
            )
        if owner == wanted_owner and fnmatchcase(name, wanted_name):
            return True
    return False


def check_audience(
    sources: Iterable[Source], *, owner: str, user: str, named_by_user: bool, allow_base: tuple[str, ...]
) -> None:
    """Raise PolicyError when a closed source would reach people its owner did not let in.

    A private repository is seen by its owner's members. So a private or gated source may go to its own owner's
    namespace, or to that of the very account whose token reads it. Anywhere else (the default for a bot: the
    adapter's owner, who chose the base by naming it in a config) somebody has to say so.
    """
    for source in sources:
        if source.openness is Openness.PUBLIC or named_by_user:
            continue
        if owner.lower() in (source.owner.lower(), user.lower()) or allows(allow_base, source.repo_id):
            continue
        raise PolicyError(
            f"{source} is {source.openness}: the members of {owner} may not have access to it, and would have it "
            "through the merged model",
            hint=(
                f"If they may, say so: --allow-base {source.repo_id}, or name the repository yourself: "
                f"--target-repo {owner}/NAME. Otherwise publish in your own namespace: --target-repo {user}/NAME"
            ),
        )


def required_openness(sources: Iterable[Source]) -> Openness:
    """The most closed of the sources."""
    return max((source.openness for source in sources), default=Openness.PUBLIC)


def check_openness(repo_id: str, found: Openness, least: Openness) -> None:
    """Raise PolicyError when an existing repository is more open than the sources allow."""
    if found < least:
        raise PolicyError(
            f"{repo_id} is {found}, but a source of the merge is {least}: it would be published in the open",
            hint="Make the repository private in its settings, or name another with --target-repo.",
        )


def check_wish(settings: PublishSettings, least: Openness) -> None:
    """Raise PolicyError when the user asks for a public repository that may not be one."""
    if settings.private is False and least > Openness.PUBLIC:
        raise PolicyError(
            f"a public repository was asked for (--public), but a source of the merge is {least}",
            hint="Leave the option out: the repository is then made private.",
        )


def licence_for(adapter: Licence, base: Licence, settings: PublishSettings) -> LicenceDecision:
    """The licence of the merged model, or PolicyError."""
    return decide_licence(adapter, base, given=settings.license)


def _local_card(repository: Repository) -> Mapping[str, Any]:
    return read_card(repository.local("README.md")) if "README.md" in repository.files else {}
