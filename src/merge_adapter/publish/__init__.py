"""Publish: offer a merged folder on the Hub once, whole, and never more openly than its sources.

settings.py     what a user chooses, and what `prepare` decides
target.py       where it goes: prepare, prepare_folder
policy.py       who may see it
contents.py     the folder against its report
identity.py     how the same publication is recognised
repinned.py     an adapter that did not change while its repository did
standing.py     what earlier runs have left on the Hub: find_published
flow.py         publish
outbox.py       files handed over one by one, ahead of the commit
whole.py        what the Hub holds against what was sent
description.py  the words
"""

from merge_adapter.publish.flow import publish
from merge_adapter.publish.outbox import Outbox, discard
from merge_adapter.publish.repinned import repinned
from merge_adapter.publish.settings import Openness, PublishSettings, Source, Target
from merge_adapter.publish.standing import Published, find_published
from merge_adapter.publish.target import prepare, prepare_folder

__all__ = [
    "Openness",
    "Outbox",
    "PublishSettings",
    "Published",
    "Source",
    "Target",
    "discard",
    "find_published",
    "prepare",
    "prepare_folder",
    "publish",
    "repinned",
]
