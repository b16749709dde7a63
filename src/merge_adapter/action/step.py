"""What the parts of one run of the action share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from merge_adapter.action.commands import Log
from merge_adapter.action.events import Trigger
from merge_adapter.action.inputs import Inputs
from merge_adapter.action.runner import Runner

if TYPE_CHECKING:
    from merge_adapter.github import GitHub
    from merge_adapter.hub import Hub


@dataclass(frozen=True)
class Step:
    """One run of the action, everything checked that can be checked before any work."""

    log: Log
    runner: Runner
    trigger: Trigger
    inputs: Inputs
    hub: Hub
    github: GitHub | None
    """None without a token, and on pull requests from forks."""
