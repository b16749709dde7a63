"""The adapters to merge: named by the inputs or the event, found in the workspace, or found on the Hub."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from merge_adapter.action.changes import adapter_folders, changed_adapters, took_all_away
from merge_adapter.action.events import Changed, Everything, Named, Nothing, Trigger
from merge_adapter.action.inputs import Inputs
from merge_adapter.action.runner import Runner
from merge_adapter.checkpoint.folder import folder_at
from merge_adapter.errors import InputError, MalformedError, MergeAdapterError, PolicyError
from merge_adapter.resolve import ADAPTER_CONFIG, split_subfolder

if TYPE_CHECKING:
    from merge_adapter.github import GitHub
    from merge_adapter.hub import Hub

_CONFIG_LIMIT = 4 << 20
"""Bytes."""
_AUTHOR_OR_COLLECTION = re.compile(r"[\w.-]+(/[\w.-]+)?")
_UNFIT = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass(frozen=True)
class Candidate:
    """One adapter to merge."""

    reference: str
    """What the pipeline takes: a Hub reference, or a path from the workspace."""
    folder: PurePosixPath | None = None
    """Where it lies in the workspace; None for one on the Hub."""
    hub_only: bool = False
    """A folder of that name must not be taken for it."""
    named: bool = False
    """The inputs name it; otherwise it was found."""
    subfolder: str = ""
    """Where it was found in its repository on the Hub; else the input subfolder counts."""

    @property
    def label(self) -> str:
        """What it is called in the log, in summaries and in outputs."""
        return f"{self.reference}/{self.subfolder}" if self.subfolder else self.reference

    @property
    def name(self) -> str:
        """Its own name without owner, path and revision; "" at the root of the repository."""
        if self.folder is not None:
            return self.folder.name
        reference, subfolder = split_subfolder(self.reference)
        own = reference.partition("@")[0].rstrip("/").rpartition("/")[2]
        return "-".join(part for part in (own, *(subfolder or self.subfolder).split("/")) if part)

    def named_in(self, text: str | None) -> str | None:
        """`text` with the name in place of `{name}`."""
        return text.replace("{name}", self.name) if text else None

    @property
    def slug(self) -> str:
        """A name for files, different for different references."""
        plain = self.label.removeprefix("./").replace("/", "--")
        clean = _UNFIT.sub("-", plain).strip("-.") or "adapter"
        if clean == plain and "--" not in self.label and len(clean) <= 80:
            return clean
        return f"{clean[:80]}-{sha256(self.label.encode()).hexdigest()[:8]}"


def find_candidates(
    inputs: Inputs, trigger: Trigger, runner: Runner, *, hub: Hub, github: GitHub | None
) -> tuple[Candidate, ...] | Nothing:
    """What is to be merged, in a stable order, or why nothing is.

    The inputs come before the event, the event before the workspace. Raises InputError when none of them names
    or shows an adapter.
    """
    wanted = trigger.wanted
    if isinstance(wanted, Nothing):
        return wanted
    if inputs.adapters:
        return _unique(_of_input(reference, runner.workspace) for reference in inputs.adapters)
    if isinstance(wanted, Named) and wanted.adapters:
        return _unique(
            Candidate(reference, hub_only=True) if wanted.hub_only else _of_input(reference, runner.workspace)
            for reference in wanted.adapters
        )
    if inputs.watch:
        return _watched(inputs.watch, hub)
    if isinstance(wanted, (Changed, Everything)):
        return _of_workspace(inputs, wanted, runner, github)
    raise InputError(
        f"the event {trigger.event} names no adapter, and neither do the inputs",
        hint="Give the input adapter (owner/name, or a folder), or for a schedule the input watch.",
    )


def folders_read(candidate: Candidate, inputs: Inputs, workspace: Path) -> tuple[PurePosixPath, ...]:
    """The folders of the workspace that merging `candidate` reads: of each adapter, and of a base that lies there.

    Raises PolicyError for a base outside the workspace that an adapter of the workspace names. Such a config comes with
    a commit; the paths of the machine are not its business. A base given by the input base-model may lie anywhere.
    """
    named = () if candidate.hub_only else (candidate.reference, *inputs.combine_with)
    subfolders = (inputs.subfolder, *("" for _ in inputs.combine_with))
    adapters = [
        place
        for text, subfolder in zip(named, subfolders, strict=False)
        for place in _adapter_places(text, subfolder, workspace)
    ]
    if inputs.base_model is None:
        bases = [base for place in adapters if (base := _named_base(place, workspace)) is not None]
    else:
        given = folder_at(inputs.base_model, start=workspace)
        bases = [given] if given is not None and given.is_relative_to(workspace) else []
    relative = (PurePosixPath(place.relative_to(workspace).as_posix()) for place in (*adapters, *bases))
    return tuple(dict.fromkeys(relative))


def _adapter_places(text: str, subfolder: str, workspace: Path) -> list[Path]:
    """The adapter's folder, where that is in the workspace; without one of that name those below, as resolve looks."""
    place = _local_place(text, subfolder, workspace)
    if place is None or not place.is_relative_to(workspace):
        return []
    if (place / ADAPTER_CONFIG).is_file():
        return [place]
    return sorted(config.parent for config in place.rglob(ADAPTER_CONFIG))


def _local_place(text: str, subfolder: str, workspace: Path) -> Path | None:
    """The folder behind a reference, which may name a subfolder itself; None for one on the Hub."""
    reference, own = split_subfolder(text)
    folder = folder_at(reference, start=workspace)
    return folder_at(own or subfolder or ".", start=folder) if folder is not None else None


def _named_base(adapter: Path, workspace: Path) -> Path | None:
    """The folder that the adapter's config names as its base, if it names one."""
    named = _base_model_name(adapter / ADAPTER_CONFIG, workspace)
    folder = folder_at(named, start=workspace)
    if folder is not None and not folder.is_relative_to(workspace):
        raise PolicyError(
            f"{adapter.relative_to(workspace) / ADAPTER_CONFIG} names {named!r} as its base, a folder outside the "
            "workspace",
            hint="Name the base in the input base-model.",
        )
    return folder


def _base_model_name(config: Path, workspace: Path) -> str:
    """What it says; "" where it says nothing that can be read, which resolve refuses with its reason."""
    size = config.stat().st_size
    if size > _CONFIG_LIMIT:
        raise MalformedError(
            f"{config.relative_to(workspace)} has {size} bytes, at most {_CONFIG_LIMIT} are read"
        )
    try:
        parsed = json.loads(config.read_bytes())
    except (ValueError, RecursionError):
        return ""
    named = parsed.get("base_model_name_or_path") if isinstance(parsed, dict) else None
    return named if isinstance(named, str) else ""


def _of_input(reference: str, workspace: Path) -> Candidate:
    place = _local_place(reference, "", workspace)
    if place is None:
        return Candidate(reference, named=True)
    if not place.is_relative_to(workspace):
        return Candidate(str(place), named=True)
    folder = PurePosixPath(place.relative_to(workspace).as_posix())
    return Candidate(_reference(folder), folder, named=True)


def _of_workspace(
    inputs: Inputs, wanted: Changed | Everything, runner: Runner, github: GitHub | None
) -> tuple[Candidate, ...] | Nothing:
    folders = adapter_folders(runner.workspace, inputs.path)
    if (
        not folders
        and isinstance(wanted, Changed)
        and took_all_away(runner.workspace, inputs.path, wanted, github)
    ):
        return Nothing(f"The last adapter below {inputs.path!r} was removed.")
    if not folders:
        raise InputError(
            f"there is no adapter below {inputs.path!r} in the workspace (no {ADAPTER_CONFIG})",
            hint="Check the repository out first (actions/checkout), set the input path to where adapters lie, "
            "or name one in the input adapter.",
        )
    if isinstance(wanted, Changed):
        folders = changed_adapters(runner.workspace, folders, wanted, github=github)
        if not folders:
            return Nothing(f"No adapter below {inputs.path!r} changed.")
    return _unique(Candidate(_reference(folder), folder) for folder in folders)


def _reference(folder: PurePosixPath) -> str:
    """The folder as a reference that cannot be read as a Hub id, and reads well: `./adapters/one`."""
    return f"./{folder}" if folder.parts else "."


def _watched(watch: str, hub: Hub) -> tuple[Candidate, ...] | Nothing:
    """The adapters of an author, or of a collection (`owner/title-hash`): in each repository every folder with one."""
    from merge_adapter.hub.catalogue import adapters_of, models_in_collection

    if not _AUTHOR_OR_COLLECTION.fullmatch(watch) or ".." in watch:
        raise InputError(
            f"the input watch is {watch!r}, neither an author nor a collection",
            hint="Write an author as `owner`, a collection as its address has it: `owner/title-hash`.",
        )
    models = models_in_collection(hub, watch) if "/" in watch else adapters_of(hub, watch)
    found = tuple(candidate for model in models for candidate in _of_repository(model, hub))
    return found or Nothing(f"{watch} has no adapters on the Hub.")


def _of_repository(model: str, hub: Hub) -> Iterator[Candidate]:
    """Each of its adapters. One that cannot be opened is one, too: its own merge tells why, the others go on."""
    from merge_adapter.hub import catalogue

    try:
        folders = catalogue.adapter_folders(hub.open(model).files)
    except MergeAdapterError:
        folders = ("",)
    for folder in folders:
        yield Candidate(model, hub_only=True, subfolder=folder)


def _unique(candidates: Iterable[Candidate]) -> tuple[Candidate, ...]:
    return tuple(dict.fromkeys(candidates))
