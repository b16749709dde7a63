"""All parts of one Hub, put together on one data folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from localhub.accounts import Accounts
from localhub.community import Community
from localhub.database import Database
from localhub.git import GitStore
from localhub.large import LargeFiles
from localhub.repositories import Repositories
from localhub.signing import Signer
from localhub.webhooks import Webhooks
from localhub.xet.store import XetStore


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
    signer: Signer


def open_hub(data: Path) -> Hub:
    """Open the Hub kept in a folder, or make an empty one there."""
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
        signer=Signer(database),
    )
