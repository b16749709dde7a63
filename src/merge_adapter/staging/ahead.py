"""Shards fetched while the ones before them merge, where the disk holds them all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Event, Thread

from merge_adapter.plan import MergePlan
from merge_adapter.types import Origin, Repository, Resolved


@contextmanager
def fetched_ahead(sources: Resolved, plan: MergePlan) -> Iterator[Resolved]:
    """`sources` with a base whose weights are fetched in the order of the merge while the context lasts."""
    if sources.base.repository.origin.repo_id is None:
        yield sources
        return
    ahead = Ahead(sources.base.repository, dict.fromkeys(shard.source for shard in plan.outputs))
    try:
        yield replace(sources, base=replace(sources.base, repository=ahead))
    finally:
        ahead.stop()


class Ahead(Repository):
    """A repository, some files of which are on their way already. Implements `types.Repository`."""

    def __init__(self, repository: Repository, paths: Iterable[str]) -> None:
        """Begin to fetch `paths`, one after another in this order."""
        self._repository = repository
        self._coming: dict[str, Future[Path]] = {path: Future() for path in paths if path in repository.files}
        self._stopped = Event()
        # a daemon: the client's download cannot be interrupted, and must not keep a failed run from ending
        Thread(target=self._fetch, name="fetch-ahead", daemon=True).start()

    @property
    def origin(self) -> Origin:
        return self._repository.origin

    @property
    def files(self) -> Mapping[str, int]:
        return self._repository.files

    def read(self, path: str, *, offset: int = 0, length: int | None = None) -> bytes:
        return self._repository.read(path, offset=offset, length=length)

    def local(self, path: str) -> Path:
        """The file, when it has arrived; raises what fetching it raised."""
        if path in self._coming:
            return self._coming[path].result()
        return self._repository.local(path)

    def folder(self, paths: Iterable[str]) -> Path:
        return self._repository.folder(paths)

    def stop(self) -> None:
        """Fetch nothing more. Who still waits for a file is told that it does not come."""
        self._stopped.set()
        for coming in self._coming.values():
            coming.cancel()

    def _fetch(self) -> None:
        for path, coming in self._coming.items():
            if self._stopped.is_set() or not coming.set_running_or_notify_cancel():
                continue
            try:
                coming.set_result(self._repository.local(path))
            except BaseException as error:  # noqa: BLE001 - raised in whoever needs the file
                coming.set_exception(error)
