"""The built wheel holds what the code reads beside itself, not only Python."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "src"
PACKAGES = ("merge_adapter", "localhub")


def test_the_wheel_holds_every_file_of_the_packages(tmp_path: Path) -> None:
    """Templates, style sheets, htmx, the report's schema, probes, the demo's models."""
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", str(tmp_path), str(ROOT)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    wanted = {
        path.relative_to(SOURCES).as_posix()
        for package in PACKAGES
        for path in (SOURCES / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert wanted - held == set()
    kinds = {Path(name).suffix for name in wanted}
    assert {".html", ".css", ".js", ".json", ".safetensors", ".typed"} <= kinds
