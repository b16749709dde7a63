"""Whole processes, timed from outside: wall and processor seconds and peak memory, several rounds in turn."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from benchmarks.memory_group import memory_group


@dataclass(frozen=True)
class Command:
    """One way to do the job. `{out}` in an argument is a folder that does not exist yet."""

    name: str
    arguments: tuple[str, ...]


@dataclass
class Samples:
    """What the rounds of one command measured."""

    wall: list[float] = field(default_factory=list)
    """Seconds."""
    cpu: list[float] = field(default_factory=list)
    """Seconds, user and system."""
    peak: list[int] = field(default_factory=list)
    """Bytes resident at most, of the largest process."""

    @property
    def seconds(self) -> float:
        return median(self.wall)

    @property
    def cpu_seconds(self) -> float:
        return median(self.cpu)

    @property
    def bytes(self) -> float:
        return median(self.peak)


def interleaved(
    commands: list[Command], scratch: Path, *, rounds: int, memory: int | None = None
) -> dict[str, Samples]:
    """Each command once per round, in turn, so that a drift of the machine's speed meets all alike.

    `memory`: bytes that a command may hold, the kernel's copies of files included.

    Raises RuntimeError with the command's own output when it fails.
    """
    samples = {command.name: Samples() for command in commands}
    for _ in range(rounds):
        for command in commands:
            with nullcontext() if memory is None else memory_group(memory) as group:
                wall, cpu, peak = _once(command, scratch, group)
            samples[command.name].wall.append(wall)
            samples[command.name].cpu.append(cpu)
            samples[command.name].peak.append(peak)
    return samples


def _once(command: Command, scratch: Path, group: Path | None) -> tuple[float, float, int]:
    out = scratch / "out"
    shutil.rmtree(out, ignore_errors=True)
    arguments = ["/bin/sh", "-c", f'echo $$ > {group} && exec "$@"', "sh"] if group else []
    arguments += [argument.replace("{out}", str(out)) for argument in command.arguments]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    log = scratch / "log"
    with log.open("wb") as stream:
        start = time.perf_counter()
        process = subprocess.Popen(arguments, stdout=stream, stderr=subprocess.STDOUT, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise RuntimeError(
            f"{command.name} left with {process.returncode}:\n{log.read_text(errors='replace')[-2000:]}"
        )
    shutil.rmtree(out, ignore_errors=True)
    return wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024
