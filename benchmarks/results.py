"""What was measured, kept as JSON beside the page, so that one row can be measured again by itself."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.measure import Samples
from benchmarks.rows import ROWS

Row = dict[str, Samples]
"""Way -> what its rounds took."""


@dataclass
class Results:
    """Rows of one machine and one set of packages."""

    machine: str
    rows: dict[str, Row] = field(default_factory=dict)
    measured: dict[str, str] = field(default_factory=dict)
    """Row -> date."""

    @classmethod
    def load(cls, path: Path) -> Results:
        """What `path` holds, if it is of this machine; nothing otherwise."""
        fresh = cls(machine())
        if not path.exists():
            return fresh
        stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if stored["machine"] != fresh.machine:
            return fresh
        for name, row in stored["rows"].items():
            fresh.rows[name] = {way: Samples(**samples) for way, samples in row["ways"].items()}
            fresh.measured[name] = row["measured"]
        return fresh

    def put(self, name: str, row: Row) -> None:
        self.rows[name] = row
        self.measured[name] = f"{datetime.now(UTC):%Y-%m-%d}"

    def save(self, path: Path) -> None:
        rows = {
            name: {
                "measured": self.measured[name],
                "ways": {way: asdict(samples) for way, samples in row.items()},
            }
            for name, row in self.rows.items()
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            json.dumps({"machine": self.machine, "rows": rows}, indent=1) + "\n", encoding="utf-8"
        )

    def models(self) -> dict[str, Row]:
        """The rows that are models, in the order of the table."""
        return {name: self.rows[name] for name in ROWS if name in self.rows}


def machine() -> str:
    """What the figures depend on."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))
    return (
        f"{os.cpu_count()} cores of {_processor()}, Linux {platform.release().split('-')[0]}, "
        f"Python {platform.python_version()}, {packages}"
    )


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()
