"""The plan before a job: made by `merge-adapter plan` in a process of its own, with the user's own token."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from merge_adapter.bot.pages.forms import Wish
from merge_adapter.bot.runners.base import combined, merge_options
from merge_adapter.bot.runners.local import withheld
from merge_adapter.bot.settings import BotSettings
from merge_adapter.errors import HubError, InputError

_SECONDS = 90.0
_AT_ONCE = 2
"""Plans read headers only, but each costs a Python process."""


class Turns:
    """Whose plan is made now: one at a time of each user, and few in all. Waiting for it costs no thread, or those who
    wait would leave none for the other pages."""

    def __init__(self) -> None:
        self._all = asyncio.Semaphore(_AT_ONCE)
        self._own: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    @asynccontextmanager
    async def take(self, user: str) -> AsyncIterator[None]:
        """Raises HubError when it takes too long to come to it."""
        async with AsyncExitStack() as held:
            try:
                async with asyncio.timeout(_SECONDS):
                    await held.enter_async_context(self._own[user])
                    await held.enter_async_context(self._all)
            except TimeoutError:
                raise HubError("too many plans are being made", hint="Try again in a minute.") from None
            yield


def plan_of(wish: Wish, token: str, settings: BotSettings) -> Mapping[str, Any]:
    """What `merge-adapter plan --json` prints: the plan, or `error`. Raises HubError when it takes too long."""
    reference = f"{wish.adapter}@{wish.revision}" if wish.revision else wish.adapter
    chosen = {"--subfolder": wish.subfolder, **merge_options(wish.options)}
    arguments = [text for name, value in chosen.items() if value for text in (name, value)]
    arguments += combined(wish.options)
    environment = {
        **{name: value for name, value in os.environ.items() if not withheld(name)},
        "HF_TOKEN": token,
        **({"HF_ENDPOINT": settings.endpoint} if settings.endpoint else {}),
    }
    try:
        with tempfile.TemporaryDirectory(prefix="merge-adapter-plan-") as empty:
            done = subprocess.run(
                [sys.executable, "-m", "merge_adapter", "plan", reference, *arguments, "--json"],
                cwd=empty,  # no folder of this machine can be meant
                env=environment,
                capture_output=True,
                timeout=_SECONDS,
                stdin=subprocess.DEVNULL,
                check=False,
            )
    except subprocess.TimeoutExpired:
        raise HubError(f"the plan took more than {_SECONDS:.0f} seconds", hint="Try again later.") from None
    try:
        parsed = json.loads(done.stdout)
    except ValueError:
        raise InputError("the plan could not be made", hint="Check the names in the form.") from None
    return parsed if isinstance(parsed, dict) else {}
