"""The only part that talks to the Hugging Face Hub.

client.py       Hub: one endpoint, one identity
repository.py   HubRepository: one repository at one commit, read in ranges
access.py       which credentials are used, and keeping them out of texts
session.py      deadlines, and what may be repeated
errors.py       the client's errors turned into ours
"""

from merge_adapter.hub.client import Hub
from merge_adapter.hub.repository import HubRepository

__all__ = ["Hub", "HubRepository"]
