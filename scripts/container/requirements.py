"""Print what a pyproject.toml requires, one a line, so that an image can install it before the package itself.

python requirements.py pyproject.toml [EXTRA …]
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path


def main(arguments: list[str]) -> int:
    project = tomllib.loads(Path(arguments[0]).read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    unknown = [extra for extra in arguments[1:] if extra not in extras]
    if unknown:
        sys.stderr.write(f"no such extra: {', '.join(unknown)}; there are {', '.join(extras)}\n")
        return 2
    wanted = [*project["dependencies"], *(line for extra in arguments[1:] for line in extras[extra])]
    sys.stdout.write("\n".join(dict.fromkeys(wanted)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
