"""One repository of the Hub at one commit: its files, read in ranges or downloaded whole into the cache."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import get_session, hf_hub_url, hf_raise_for_status, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.hf_api import DatasetInfo, ModelInfo, RepoFile

from merge_adapter.errors import HubError, NotFoundError
from merge_adapter.hub.session import LOST_CONNECTION, RETRIED_STATUSES, retry_after
from merge_adapter.types import Origin

if TYPE_CHECKING:
    from merge_adapter.hub.client import Hub


_MOST_DATA = 3000
"""Entries of a data set's file list that are looked at: some hold a hundred thousand."""


_LENGTH_FIELD = 8
"""Bytes before the JSON of a safetensors header."""
_LONGEST_KEPT = 4 << 20
"""Bytes of a file's beginning that are remembered: the header of a shard with ten thousand tensors."""


class HubRepository:
    """Implements `types.Repository` for one commit; made by `Hub.open` and `Hub.open_dataset`.

    Configs and headers are read over HTTP ranges; `local` and `folder` use the normal cache of huggingface_hub, so
    nothing is downloaded twice. Every path is relative to `origin.subfolder`.
    """

    def __init__(
        self, hub: Hub, info: ModelInfo | DatasetInfo, *, subfolder: str = "", repo_type: str = "model"
    ) -> None:
        if info.sha is None:
            raise HubError(f"the Hub names no commit for {info.id}", hint="The repository may be empty.")
        self._hub = hub
        self._info = info
        self._type = repo_type
        self._prefix = f"{subfolder}/" if subfolder else ""
        self._beginnings: dict[tuple[str, int, int], bytes] = {}
        """Headers and configs, which several stages ask for. A commit does not change."""
        self.origin = Origin(repo_id=info.id, revision=info.sha, subfolder=subfolder)

    def __repr__(self) -> str:
        return f"HubRepository({str(self.origin)!r})"

    @property
    def repo_id(self) -> str:
        """`owner/name`, in the Hub's own spelling."""
        return self._info.id

    @property
    def revision(self) -> str:
        """The commit sha."""
        return str(self.origin.revision)

    @property
    def private(self) -> bool:
        return bool(self._info.private)

    @property
    def gated(self) -> str | None:
        """`auto` or `manual` where readers must ask for access, None where not."""
        return self._info.gated or None

    @property
    def card(self) -> Mapping[str, Any]:
        """Metadata of the model card (license, language, tags, …); empty without one. Untrusted."""
        if self._info.card_data is None:
            return {}
        data: dict[str, Any] = self._info.card_data.to_dict()  # type: ignore[no-untyped-call]
        return data

    @property
    def tags(self) -> tuple[str, ...]:
        """Tags as the Hub shows them, those it adds itself among them. Untrusted."""
        return tuple(self._info.tags or ())

    @cached_property
    def entries(self) -> Mapping[str, RepoFile]:
        """Every file below the subfolder with what the Hub knows of it: size, git blob id, LFS sha256."""
        most = _MOST_DATA if self._type == "dataset" else None
        tree = self._hub.tree(self.repo_id, self.revision, repo_type=self._type, most=most)
        cut = len(self._prefix)
        return {path[cut:]: entry for path, entry in tree.items() if path.startswith(self._prefix)}

    @cached_property
    def files(self) -> Mapping[str, int]:
        """Every file: path -> bytes."""
        return {path: entry.size for path, entry in self.entries.items()}

    def read(self, path: str, *, offset: int = 0, length: int | None = None) -> bytes:
        """`length` bytes from `offset` (to the end when None), fewer where the file ends.

        A file that is in the cache already is read there; otherwise one HTTP range is fetched, and continued
        where a cut connection left it. Raises NotFoundError, PolicyError for a gate, HubError.
        """
        size = self._size(path)
        end = size if length is None else min(size, offset + length)
        if offset < 0 or end <= offset:
            return b""
        cached = try_to_load_from_cache(
            self.repo_id, self._prefix + path, revision=self.revision, repo_type=self._type
        )
        if isinstance(cached, str):
            with Path(cached).open("rb") as file:
                file.seek(offset)
                return file.read(end - offset)
        beginning = offset <= _LENGTH_FIELD and end - offset <= _LONGEST_KEPT
        if beginning and (path, offset, end) in self._beginnings:
            return self._beginnings[path, offset, end]
        with self._hub.calling(
            f"read {path} of {self.repo_id}", repo_id=self.repo_id, revision=self.revision, path=path
        ):
            content = self._fetch(path, offset, end)
        if beginning:
            self._beginnings[path, offset, end] = content
        return content

    def local(self, path: str) -> Path:
        """The whole file on this machine, downloaded when it must be."""
        self._size(path)
        with self._hub.calling(
            f"download {path} of {self.repo_id}", repo_id=self.repo_id, revision=self.revision, path=path
        ):
            return Path(
                self._hub.api.hf_hub_download(
                    self.repo_id, self._prefix + path, revision=self.revision, repo_type=self._type
                )
            )

    def folder(self, paths: Iterable[str]) -> Path:
        """A folder that holds at least `paths` under their own names: the cache's snapshot of this commit."""
        place: Path | None = None
        for path in paths:
            depth = len(Path(path).parts)
            place = self.local(path).parents[depth - 1]
        if place is None:
            raise NotFoundError(f"no file of {self.origin} was asked for")
        return place

    def _size(self, path: str) -> int:
        try:
            return self.files[path]
        except KeyError:
            raise NotFoundError(
                f"{self.origin} has no file {path!r}",
                hint=f"Its files are listed at {self._hub.endpoint}/{self.repo_id}/tree/{self.revision}.",
            ) from None

    def _fetch(self, path: str, offset: int, end: int) -> bytes:
        """Bytes `offset` to `end`, in as many requests as the network makes necessary."""
        patience = self._hub.patience
        received = bytearray()
        for attempt in range(patience.attempts):
            wait = patience.wait(attempt, None)
            try:
                self._fetch_into(received, path, offset, end)
                if len(received) == end - offset:
                    return bytes(received)
            except HfHubHTTPError as error:
                if error.response.status_code not in RETRIED_STATUSES or attempt == patience.attempts - 1:
                    raise
                wait = patience.wait(attempt, retry_after(error.response))
                if wait > patience.retry_after_limit:
                    raise
            except LOST_CONNECTION:
                if attempt == patience.attempts - 1:
                    raise
            time.sleep(wait)
        raise HubError(
            f"{path} of {self.origin} ended after {len(received)} of {end - offset} bytes",
            hint="Run the same command again; if it happens again, download the file by hand to see what is wrong.",
        )

    def _fetch_into(self, received: bytearray, path: str, offset: int, end: int) -> None:
        """One request for what is still missing. A server that ignores the range is cut off, not read whole."""
        start = offset + len(received)
        url = hf_hub_url(
            self.repo_id,
            self._prefix + path,
            revision=self.revision,
            repo_type=self._type,
            endpoint=self._hub.endpoint,
        )
        headers = {
            **self._hub.headers(),
            "Range": f"bytes={start}-{end - 1}",
            "Accept-Encoding": "identity",  # a range counts stored bytes
        }
        with get_session().stream("GET", url, headers=headers) as response:
            if response.status_code >= 400:
                response.read()
            hf_raise_for_status(response)
            skip = start if response.status_code != 206 else 0
            for chunk in response.iter_bytes():
                take = chunk[skip:]
                skip = max(0, skip - len(chunk))
                received += take[: end - offset - len(received)]
                if len(received) >= end - offset:
                    return
