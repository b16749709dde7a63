"""The only part that talks to the Hugging Face Hub.

client.py       Hub: one endpoint, one identity
repository.py   HubRepository: one repository at one commit, read in ranges
pulls.py        pull requests of our own
commits.py      one commit, never twice
access.py       which credentials are used, and keeping them out of texts
session.py      deadlines, and what may be repeated
errors.py       the client's errors turned into ours
"""

from merge_adapter.hub.client import Hub
from merge_adapter.hub.commits import Commit, Handed, Upload, commit, hand_over
from merge_adapter.hub.errors import ConflictError
from merge_adapter.hub.pulls import PullRequest, PullRequests
from merge_adapter.hub.repository import HubRepository

__all__ = [
    "Commit",
    "ConflictError",
    "Handed",
    "Hub",
    "HubRepository",
    "PullRequest",
    "PullRequests",
    "Upload",
    "commit",
    "hand_over",
]
