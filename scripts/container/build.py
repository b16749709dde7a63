"""Build the image without a Docker daemon and merge a model inside it: `make container`.

buildah builds over a Debian that debootstrap unpacks; both come from Debian's own packages and are installed when
they are missing. The wheels are fetched on this machine, with its pip settings, so the build itself needs no index.
Then the action's entry point runs in the image as a runner would run it, on the models of the demo.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "build" / "container"
WHEELS = WORK / "wheels"
STORE = WORK / "store"
RUNROOT = WORK / "run"
DEBIAN = WORK / "debian"
SUITE = "bookworm"
PACKAGES = "python3,python3-venv,ca-certificates"
BASE = "localhost/debian-python"
IMAGE = "localhost/merge-adapter"
EXTRAS = ("bot", "demo", "parquet", "quantized", "sentence-transformers", "vision")
NEEDED = {"buildah": "buildah", "debootstrap": "debootstrap"}
"""Program -> Debian package."""


class CannotBuild(Exception):
    """Why this machine cannot build the image; one sentence and the way out."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", action="store_true", help="keep the image store for another run")
    options = parser.parse_args()
    try:
        check_machine()
        install_programs()
        seconds: dict[str, float] = {}
        with timed(seconds, "wheels"):
            fetch_wheels()
        with timed(seconds, "base"):
            make_base()
        with timed(seconds, "build"):
            build_image()
        with timed(seconds, "merge inside"):
            merge_inside()
        report(seconds)
    except CannotBuild as problem:
        sys.stderr.write(f"make container: {problem}\n")
        return 2
    except subprocess.CalledProcessError as error:
        sys.stderr.write(
            f"make container: {' '.join(map(str, error.cmd))[:300]} ended with {error.returncode}\n"
        )
        return 1
    finally:
        if not options.keep:
            remove_store()
    return 0


def check_machine() -> None:
    if os.geteuid() != 0:
        raise CannotBuild("debootstrap and buildah's chroot isolation need root: sudo make container")
    if shutil.which("apt-get") is None:
        raise CannotBuild("this needs Debian or Ubuntu; elsewhere use: docker build -t merge-adapter .")
    if sys.version_info[:2] != (3, 11):
        raise CannotBuild(
            f"the wheels are fetched for this Python, {sys.version_info.major}.{sys.version_info.minor}, but Debian "
            f"{SUITE} has 3.11; run it with that: make container PYTHON=python3.11"
        )


def install_programs() -> None:
    missing = [package for program, package in NEEDED.items() if shutil.which(program) is None]
    if missing:
        say(f"installing {', '.join(missing)}")
        run("apt-get", "update", "--quiet", "--quiet")
        run("apt-get", "install", "--yes", "--quiet", "--quiet", "--no-install-recommends", *missing)


def fetch_wheels() -> None:
    """Everything that the Dockerfile installs, torch for CPUs among it where this machine's pip finds that."""
    WHEELS.mkdir(parents=True, exist_ok=True)
    requirements = WORK / "requirements.txt"
    listed = subprocess.run(
        [
            sys.executable,
            str(ROOT / "scripts/container/requirements.py"),
            str(ROOT / "pyproject.toml"),
            *EXTRAS,
        ],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    requirements.write_text(f"{listed}hatchling\neditables\n", encoding="utf-8")
    pip("--constraint", ROOT / "constraints.txt", "--requirement", requirements)


def make_base() -> None:
    """An image with Debian and its Python, and nothing else."""
    if not (DEBIAN / "usr/bin/python3").exists():
        shutil.rmtree(DEBIAN, ignore_errors=True)
        run("debootstrap", "--variant=minbase", f"--include={PACKAGES}", SUITE, DEBIAN, mirror())
        shutil.rmtree(DEBIAN / "var/cache/apt/archives", ignore_errors=True)
    certificates = Path("/etc/ssl/certs/ca-certificates.crt")
    if certificates.exists():  # a proxy's own authority, where there is one
        shutil.copyfile(certificates, DEBIAN / "etc/ssl/certs/ca-certificates.crt")
    container = buildah("from", "scratch", capture=True).strip()
    buildah("copy", "--quiet", container, str(DEBIAN), "/")
    buildah("commit", "--quiet", "--rm", container, BASE)


def build_image() -> None:
    buildah(
        "build",
        "--isolation=chroot",
        "--network=host",
        "--format=docker",  # the OCI format has no HEALTHCHECK
        f"--build-arg=BASE_IMAGE={BASE}",
        "--build-arg=PIP_NO_INDEX=1",
        "--build-arg=PIP_FIND_LINKS=/wheels",
        f"--volume={WHEELS}:/wheels:ro",
        f"--tag={IMAGE}",
        str(ROOT),
    )  # fmt: skip


def merge_inside() -> None:
    """Merge the demo's adapter in the image, by its own entry point, with inputs as the runner passes them."""
    workspace = WORK / "workspace"
    shutil.rmtree(workspace, ignore_errors=True)
    for name in ("base", "adapter"):
        shutil.copytree(ROOT / "src/merge_adapter/demo/assets" / name, workspace / name)
    for name in ("outputs", "summary"):
        (workspace / name).touch()
    container = buildah("from", "--pull-never", IMAGE, capture=True).strip()
    environment = {
        "INPUT_ADAPTER": "adapter",
        "INPUT_BASE-MODEL": "base",
        "INPUT_PUBLISH": "none",
        "INPUT_PROBE-TOKENS": "64",
        "GITHUB_WORKSPACE": "/github/workspace",
        "GITHUB_OUTPUT": "/github/workspace/outputs",
        "GITHUB_STEP_SUMMARY": "/github/workspace/summary",
        "HOME": "/root",
    }
    try:
        program = json.loads(buildah("inspect", container, capture=True))["OCIv1"]["config"]["Entrypoint"]
        buildah(
            "run",
            "--isolation=chroot",
            f"--volume={workspace}:/github/workspace",
            "--workingdir=/github/workspace",
            *(f"--env={name}={value}" for name, value in environment.items()),
            container,
            "--",
            *program,
            "action",
        )
    finally:
        buildah("rm", container)
    outputs = (workspace / "outputs").read_text(encoding="utf-8")
    if not re.search(r"^verdict<<(\S+)\npass\n\1$", outputs, re.MULTILINE):
        raise CannotBuild(f"the merge inside the image did not pass; its outputs:\n{outputs}")


def report(seconds: dict[str, float]) -> None:
    size = buildah("images", "--format", "{{.Size}}", IMAGE, capture=True).strip()
    for name, taken in seconds.items():
        say(f"{name}: {taken:.0f} s")
    say(f"image: {size}; the merge inside it passed")


def remove_store() -> None:
    if shutil.which("buildah") and STORE.exists():
        buildah("rmi", "--all", "--force", check=False)
        shutil.rmtree(STORE, ignore_errors=True)


def mirror() -> str:
    """Debian's mirror as this machine's apt knows it."""
    places = (Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt/sources.list.d").glob("*")))
    for place in places:
        if place.is_file():
            found = re.search(
                r"https?://\S+/debian(?=/?\s)", place.read_text(encoding="utf-8", errors="replace")
            )
            if found:
                return found[0]
    return "http://deb.debian.org/debian"


def pip(*arguments: object) -> None:
    run(sys.executable, "-m", "pip", "download", "--quiet", "--prefer-binary", "--dest", WHEELS, *arguments)


def buildah(*arguments: str, capture: bool = False, check: bool = True) -> str:
    """Run buildah on a store of its own, with overlay mounts, which take a third of the room of copies."""
    storage = ("--root", str(STORE), "--runroot", str(RUNROOT), "--storage-driver", "overlay")
    done = subprocess.run(
        ("buildah", *storage, *arguments),
        check=check,
        stdout=subprocess.PIPE if capture else None,
        text=True,
    )
    return done.stdout or ""


def run(*command: object) -> None:
    subprocess.run([str(part) for part in command], check=True)


@contextmanager
def timed(
    seconds: dict[str, float], name: str, clock: Callable[[], float] = time.monotonic
) -> Iterator[None]:
    say(name)
    started = clock()
    yield
    seconds[name] = clock() - started


def say(text: str) -> None:
    sys.stdout.write(f"make container: {text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
