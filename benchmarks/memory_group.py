"""A limit of memory for the commands of a row: a control group of the kernel, which counts the page cache too."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")


@contextmanager
def memory_group(limit: int) -> Iterator[Path]:
    """A new control group of `limit` bytes: a process joins by writing its id into the file that is given.

    Raises PermissionError or FileNotFoundError where this user or this kernel may not make one.
    """
    folder = _parent() / f"merge-adapter-bench-{os.getpid()}"
    folder.mkdir()
    try:
        ceiling = "memory.limit_in_bytes" if (folder / "memory.limit_in_bytes").exists() else "memory.max"
        (folder / ceiling).write_text(str(limit))
        yield folder / "cgroup.procs"
    finally:
        _remove(folder)


def _parent() -> Path:
    """The group of this process, in either version of control groups."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "memory":
            return _ROOT / "memory" / path.lstrip("/")
        if not controllers and (_ROOT / "cgroup.controllers").exists():
            return _ROOT / path.lstrip("/")
    raise FileNotFoundError("no memory controller")


def _remove(folder: Path) -> None:
    for _ in range(100):  # a group is busy until the kernel has forgotten its last process
        try:
            folder.rmdir()
        except OSError:
            time.sleep(0.1)
        else:
            return
