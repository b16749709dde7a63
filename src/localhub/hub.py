"""All parts of one Hub, put together on one data folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localhub.accounts import Accounts
from localhub.community import Community
from localhub.database import Database
from localhub.delivery import Courier
from localhub.gitstore import GitStore
from localhub.jobs import Jobs
from localhub.large import LargeFiles
from localhub.oidc import Client, Provider, Publishers, TrustedPublisher
from localhub.repositories import Repositories
from localhub.shelves import Collections
from localhub.signing import Signer
from localhub.webhooks import Webhooks
from localhub.xet.store import XetStore


@dataclass(frozen=True)
class Options:
    """What can be chosen when a Hub starts."""

    run_jobs: bool = False
    """Run jobs as processes on this machine; else they are only recorded."""
    publishers: Sequence[TrustedPublisher] = ()
    clients: Sequence[Client] = ()


@dataclass(frozen=True)
class Hub:
    """What the API works on."""

    data: Path
    database: Database
    accounts: Accounts
    repositories: Repositories
    git: GitStore
    xet: XetStore
    large: LargeFiles
    community: Community
    webhooks: Webhooks
    jobs: Jobs
    shelves: Collections
    publishers: Publishers
    provider: Provider
    signer: Signer

    def courier(self) -> Courier:
        """The thread that delivers webhooks; not started."""

        def start_job(user: str, spec: dict[str, Any], environment: dict[str, str]) -> None:
            account = self.accounts.get(user)
            merged = {**spec, "environment": {**(spec.get("environment") or {}), **environment}}
            self.jobs.create(user, {"type": "webhook", "id": account.id, "name": user}, merged)

        return Courier(self.webhooks, start_job)


def open_hub(data: Path, options: Options | None = None) -> Hub:
    """Open the Hub kept in a folder, or make an empty one there."""
    options = options or Options()
    data.mkdir(parents=True, exist_ok=True)
    database = Database(data / "hub.sqlite")
    accounts = Accounts(database)
    repositories = Repositories(database, accounts)
    git = GitStore(data / "repos")
    xet = XetStore(data / "xet")
    return Hub(
        data=data,
        database=database,
        accounts=accounts,
        repositories=repositories,
        git=git,
        xet=xet,
        large=LargeFiles(data / "lfs", database, xet),
        community=Community(database),
        webhooks=Webhooks(database, accounts, repositories, git),
        jobs=Jobs(database, data / "jobs", run=options.run_jobs),
        shelves=Collections(database),
        publishers=Publishers(tuple(options.publishers)),
        provider=Provider(database, tuple(options.clients)),
        signer=Signer(database),
    )
