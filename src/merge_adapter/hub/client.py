"""`Hub`: one endpoint and one identity. Everything that talks to the Hub goes through here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from itertools import islice
from typing import Any, Literal

from huggingface_hub import HfApi, get_session, hf_raise_for_status
from huggingface_hub import constants as client_constants
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # exported lazily

from merge_adapter import __version__
from merge_adapter.errors import InputError
from merge_adapter.hub.access import oidc_resource
from merge_adapter.hub.errors import Call, RefusedError, translated
from merge_adapter.hub.repository import HubRepository
from merge_adapter.hub.session import Patience, prepare_client, repeat

_LONGEST_COMPLAINT = 1200
"""Characters: the Hub lists every licence it knows."""


class Hub:
    """One Hub as one user.

    `endpoint` and `token` default to what huggingface_hub would use: `HF_ENDPOINT`; a Trusted Publisher exchange,
    `HF_TOKEN` or the stored login. `token` False is nobody.Errors leave as NotFoundError,
    PolicyError (a gate), StorageError (the cache) or HubError, with a hint and without a token.
    """

    def __init__(
        self,
        endpoint: str | None = None,
        token: str | Literal[False] | None = None,
        *,
        patience: Patience | None = None,
    ) -> None:
        prepare_client()
        self.endpoint = (endpoint or client_constants.ENDPOINT).rstrip("/")
        self.patience = patience or Patience()
        self._token = token
        self.api = HfApi(
            endpoint=self.endpoint, token=token, library_name="merge-adapter", library_version=__version__
        )

    def __repr__(self) -> str:
        return f"Hub({self.endpoint!r})"  # never the token

    def open(self, repo_id: str, *, revision: str | None = None, subfolder: str = "") -> HubRepository:
        """A model repository, pinned to the commit that `revision` (main when None) names now."""
        with self.calling(f"open {repo_id}", repo_id=repo_id, revision=revision or "main"):
            info = repeat(lambda: self.api.model_info(repo_id, revision=revision), self.patience)
        return HubRepository(self, info, subfolder=subfolder)

    def anonymous(self) -> Hub:
        """The same Hub as nobody, who sees what is public, and with little patience: for what a run can do without."""
        return Hub(self.endpoint, token=False, patience=Patience(attempts=min(2, self.patience.attempts)))

    def open_dataset(self, repo_id: str) -> HubRepository:
        """A data set, pinned to the commit that main names now; of its files the first few thousand are listed."""
        with self.calling(f"open the data set {repo_id}", repo_id=repo_id, revision="main"):
            info = repeat(lambda: self.api.dataset_info(repo_id), self.patience)
        return HubRepository(self, info, repo_type="dataset")

    def exists(self, repo_id: str) -> bool:
        """Whether `repo_id` is there and this identity may see it."""
        with self.calling(f"look for {repo_id}", repo_id=repo_id):
            return repeat(lambda: self.api.repo_exists(repo_id), self.patience)

    def create(self, repo_id: str, *, private: bool | None) -> None:
        """Make a model repository; one that is there already stays as it is. None: as its owner has it by default."""
        with self.calling(f"create the repository {repo_id}", repo_id=repo_id):
            repeat(lambda: self.api.create_repo(repo_id, private=private, exist_ok=True), self.patience)

    def check_card(self, text: str) -> None:
        """Raise InputError, in the Hub's own words, when it would refuse a README.md for its metadata."""
        with self.calling("have the metadata of the model card checked"):
            answer = repeat(lambda: self._validated(text), self.patience)
        problems = "; ".join(str(one.get("message")) for one in answer.get("errors", ()))
        if problems:
            said = " ".join(problems.split())
            raise InputError(
                f"the Hub refuses the metadata of the model card: {said[:_LONGEST_COMPLAINT]}",
                hint="A licence is set with --license ID, the rest in the cards of adapter and base. Then merge again.",
            )

    def _validated(self, text: str) -> Any:
        """The Hub's answer on a card; it refuses one with status 400."""
        response = get_session().post(
            f"{self.endpoint}/api/validate-yaml",
            json={"content": text, "repoType": "model"},
            headers=self.headers(),
        )
        if response.status_code != 400:
            hf_raise_for_status(response)
        return response.json()

    def check_may_create(self, repo_id: str) -> None:
        """Raise RefusedError when this identity is known to have no right to make `repo_id`.

        Asked before hours of work. A fine-grained or exchanged token tells too little: there the Hub's own answer
        to `create` decides.
        """
        if self._token is None and oidc_resource():
            return
        with self.calling(f"create the repository {repo_id}", repo_id=repo_id):
            who = repeat(lambda: self.api.whoami(cache=True), self.patience)
        role = who.get("auth", {}).get("accessToken", {}).get("role")
        owner = repo_id.split("/")[0]
        member_of = {str(who["name"]).lower(), *(str(one["name"]).lower() for one in who.get("orgs", ()))}
        if role == "read":
            reason = f"the token of {who['name']} may only read"
        elif role == "write" and owner.lower() not in member_of:
            reason = f"{who['name']} is neither {owner} nor a member of it"
        else:
            return
        raise RefusedError(
            f"cannot create the repository {repo_id}: {reason}",
            hint=f"Use a token that may write for {owner}, or publish elsewhere: --target-repo {who['name']}/NAME",
        )

    def tree(
        self, repo_id: str, revision: str, *, repo_type: str = "model", most: int | None = None
    ) -> Mapping[str, RepoFile]:
        """Every file of a commit or ref, by path; with `most`, no more than so many entries are looked at."""

        def listed() -> list[object]:
            entries = self.api.list_repo_tree(repo_id, recursive=True, revision=revision, repo_type=repo_type)
            return list(islice(entries, most))

        with self.calling(f"list the files of {repo_id}", repo_id=repo_id, revision=revision):
            entries = repeat(listed, self.patience)
        return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}

    @cached_property
    def user(self) -> str:
        """Name of the account behind the token. Raises HubError where there is none."""
        with self.calling("ask the Hub who this is"):
            return str(repeat(lambda: self.api.whoami(cache=True), self.patience)["name"])

    def headers(self) -> dict[str, str]:
        """Headers of a request of our own: identity and user agent."""
        headers: dict[str, str] = build_hf_headers(
            token=self._token, library_name="merge-adapter", library_version=__version__
        )
        return headers

    @contextmanager
    def calling(
        self, doing: str, *, repo_id: str | None = None, revision: str | None = None, path: str | None = None
    ) -> Iterator[None]:
        """Around each use of the client: `doing` is a verb phrase, the rest names what it is done to."""
        with translated(Call(doing, self.endpoint, self._token, repo_id, revision, path)):
            yield
