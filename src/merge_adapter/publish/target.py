"""Prepare a publication: where it goes, whether policy allows it, whether it is there already.

All of it is decided before anything is merged, so that hours of work are not refused at the end.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from merge_adapter.errors import InputError, NotFoundError
from merge_adapter.licences import Licence
from merge_adapter.packaging.metadata import front_matter
from merge_adapter.publish import policy
from merge_adapter.publish.settings import Openness, PublishSettings, Source, Target
from merge_adapter.resolve import ADAPTER_CONFIG
from merge_adapter.types import MergeSettings, Resolved

if TYPE_CHECKING:
    from merge_adapter.hub import Hub, HubRepository

OWN_REPOSITORY_FOLDER = "merged"
"""Where the merged model goes when it is offered to the adapter's own repository."""
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?")
_UNFIT = re.compile(r"[^A-Za-z0-9._-]+")
_REPEATED = re.compile(r"-{2,}")
_LONGEST_STEM = 89
"""Characters before `-merged`: the Hub takes 96."""


def prepare(
    sources: Resolved,
    settings: MergeSettings,  # noqa: ARG001 -- part of the stage's interface
    publishing: PublishSettings,
    *,
    hub: Hub,
) -> PublishSettings:
    """`publishing` with its target and licence decided, from the sources of a merge that is still to be made.

    Raises PolicyError for what may not be published there, InputError for a place that cannot hold a model.
    """
    adapters = [policy.inspect("adapter", one.repository) for one in sources.adapters]
    base = policy.inspect("base", sources.base.repository)
    origin = sources.adapter.repository.origin
    name = origin.repo_id or (origin.folder.name if origin.folder else "")
    subfolder = origin.subfolder if origin.repo_id else ""
    return _decide(adapters, base, (name, subfolder), publishing, hub=hub)


def prepare_folder(report: Mapping[str, Any], publishing: PublishSettings, *, hub: Hub) -> PublishSettings:
    """The same for a folder merged earlier: its sources are those that its report names, as they are today."""
    entries = report.get("adapters") or [report["adapter"]]
    adapters = [policy.inspect_reported("adapter", entry, hub=hub) for entry in entries]
    base = policy.inspect_reported("base", report["base"], hub=hub)
    repo_id = adapters[0][0].repo_id
    name = repo_id or str(entries[0].get("id") or "")
    subfolder = str(entries[0].get("subfolder") or "") if repo_id else ""
    return _decide(adapters, base, (name, subfolder), publishing, hub=hub)


def find_target(target: Target, *, hub: Hub) -> HubRepository | None:
    """The repository at main, or None where it does not exist. PolicyError when it is too open by now."""
    try:
        found = hub.open(target.repo_id)
    except NotFoundError:
        return None
    policy.check_openness(
        found.repo_id, policy.openness_of(private=found.private, gated=found.gated), target.least
    )
    _refuse_beside_adapter(found, target.path_in_repo)
    return found


def clean_folder(path: str) -> str:
    """`path` inside a repository, "" for its root; InputError for one that could leave it.

    As for `hf upload`, "." is the root.
    """
    clean = path.removeprefix("./").strip("/")
    parts = clean.split("/") if clean not in ("", ".") else []
    if any(
        part in ("", ".", "..", ".git", ".cache") or "\\" in part or not part.isprintable() for part in parts
    ):
        raise InputError(
            f"{path!r} is not a folder inside a repository", hint="Write it as: --path-in-repo merged"
        )
    return "/".join(parts)


def _decide(
    adapters: list[tuple[Source, Licence]],
    base: tuple[Source, Licence],
    name: tuple[str, str],
    publishing: PublishSettings,
    *,
    hub: Hub,
) -> PublishSettings:
    """`name`: the first adapter's, and its folder in its repository."""
    sources = [source for source, _ in (*adapters, base)]
    policy.check_base(base[0], publishing.allow_base)
    least = policy.required_openness(sources)
    policy.check_wish(publishing, least)
    decision = policy.licence_for(_of_all(adapters, publishing), base[1], publishing)
    if publishing.license is not None:
        hub.check_card(front_matter({"license": decision.licence.id}))
    repo_id = publishing.target_repo or _default_target(adapters[0][0], *name, hub=hub)
    _check_repo_id(repo_id)
    target = Target(
        repo_id=repo_id,
        path_in_repo=_folder(repo_id, [source for source, _ in adapters], publishing),
        private=True if least > Openness.PUBLIC else publishing.private,
        least=least,
    )
    if least > Openness.PUBLIC:
        policy.check_audience(
            sources,
            owner=repo_id.split("/")[0],
            user=hub.user,
            named_by_user=publishing.target_repo is not None,
            allow_base=publishing.allow_base,
        )
    if find_target(target, hub=hub) is None:
        hub.check_may_create(target.repo_id)
    notes = (decision.note,) if decision.note else ()
    chosen = decision.licence.id if publishing.license is not None else None
    return replace(publishing, target=target, license=chosen, licence=decision, notes=notes)


def _of_all(adapters: list[tuple[Source, Licence]], publishing: PublishSettings) -> Licence:
    """One licence for several adapters, found as that of adapter and base is."""
    licence = adapters[0][1]
    for _, other in adapters[1:]:
        licence = policy.licence_for(licence, other, publishing).licence
    return licence


def default_name(name: str, subfolder: str = "") -> str:
    """The name, without owner, of the repository that a merge goes to when none is chosen: `<adapter>-merged`.

    An adapter in a folder of its repository has its folder's name in it, since such a repository holds several as a
    rule: each gets a repository of its own, from which it is loaded like any model, and whose main branch no other
    adapter's pull request would overwrite.
    """
    whole = "-".join(part for part in (name.split("/")[-1], *subfolder.split("/")) if part)
    stem = _REPEATED.sub("-", _UNFIT.sub("-", whole).replace("..", "-")).strip("-.") or "adapter"
    if len(stem) > _LONGEST_STEM:
        stem = f"{stem[: _LONGEST_STEM - 9]}-{sha256(whole.encode()).hexdigest()[:8]}"
    return f"{stem}-merged"


def _default_target(adapter: Source, name: str, subfolder: str, *, hub: Hub) -> str:
    return f"{adapter.owner or hub.user}/{default_name(name, subfolder)}"


def _check_repo_id(repo_id: str) -> None:
    owner, slash, name = repo_id.partition("/")
    valid = slash and _NAME.fullmatch(owner) and _NAME.fullmatch(name)
    if not valid or ".." in repo_id or "--" in repo_id:
        raise InputError(
            f"{repo_id!r} is not a Hub id", hint="Write it as owner/name: --target-repo OWNER/NAME"
        )


def _folder(repo_id: str, adapters: list[Source], publishing: PublishSettings) -> str:
    own = any(source.repo_id and source.repo_id.lower() == repo_id.lower() for source in adapters)
    if publishing.path_in_repo is None:
        return OWN_REPOSITORY_FOLDER if own else ""
    folder = clean_folder(publishing.path_in_repo)
    if own and not folder:
        raise _beside_adapter(repo_id, "")
    return folder


def _refuse_beside_adapter(found: HubRepository, folder: str) -> None:
    beside = f"{folder}/{ADAPTER_CONFIG}" if folder else ADAPTER_CONFIG
    if beside in found.files:
        raise _beside_adapter(found.repo_id, folder)


def _beside_adapter(repo_id: str, folder: str) -> InputError:
    place = f"the folder {folder} of {repo_id}" if folder else f"the root of {repo_id}"
    return InputError(
        f"{place} holds {ADAPTER_CONFIG}: beside it the merged weights would be loaded with the adapter applied "
        "a second time, because transformers loads an adapter wherever it finds that file",
        hint="Choose another folder (--path-in-repo merged) or another repository (--target-repo OWNER/NAME).",
    )
