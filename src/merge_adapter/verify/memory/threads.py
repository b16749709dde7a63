"""Worker threads for work that comes in pieces too small for torch to split."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch


@contextmanager
def workers() -> Iterator[ThreadPoolExecutor]:
    """As many threads as torch would use, each with one torch thread: blocks are too small to be split further."""
    count = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        # the setting is partly the process's, not the thread's
        torch.set_num_threads(count)
