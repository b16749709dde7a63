"""Adapters in the workspace: which there are, which a commit changed, and whether their files are really there.

The commit is read from the workspace's own git; where its history is too shallow, GitHub is asked. Text that git
reads from a pull request is untrusted: ids are checked before, nothing of it reaches a shell.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from merge_adapter.action.events import Changed
from merge_adapter.errors import GitHubError, InputError, PolicyError
from merge_adapter.github import GitHub
from merge_adapter.resolve import ADAPTER_CONFIG

_POINTER = b"version https://git-lfs.github.com/spec/v1\n"
_POINTER_LIMIT = 1024
"""Bytes; the specification keeps pointers below this."""
_GIT_TIMEOUT = 120
_LFS_TIMEOUT = 1800
"""Seconds for downloading an adapter's files."""
_PATTERN = frozenset("*?[]{}!#,\\")
"""What means something in the patterns of git-lfs, and cannot be written there: files of every folder are fetched."""
_SECRET_PARTS = ("TOKEN", "SECRET", "PASSWORD", "INPUT_", "ACTIONS_")
_IGNORED = frozenset({"README.md", "LICENSE", ".gitattributes"})
"""Files beside an adapter that change nothing about its merge."""
FETCH_DEPTH = (
    "Let the checkout bring the history: `actions/checkout` with `fetch-depth: 0`; or name the adapter in the input "
    "adapter."
)


def adapter_folders(workspace: Path, below: str = ".") -> tuple[PurePosixPath, ...]:
    """Every folder at or below `below` that holds an adapter, relative to the workspace, sorted.

    Links are not followed and hidden folders not entered. Raises PolicyError when `below` leads out of the workspace.
    """
    root = inside(workspace, below, what="the input path")
    found = []
    for folder, names, files in os.walk(root, followlinks=False):
        names[:] = sorted(name for name in names if not name.startswith("."))
        if ADAPTER_CONFIG in files:
            found.append(PurePosixPath(Path(folder).relative_to(workspace).as_posix()))
    return tuple(sorted(found))


def changed_adapters(
    workspace: Path,
    folders: Iterable[PurePosixPath],
    changed: Changed,
    *,
    github: GitHub | None,
) -> tuple[PurePosixPath, ...]:
    """Those of `folders` in which a file that matters changed.

    Where nothing came before, as with a tag or the first push of a repository, those are all. Raises InputError when
    neither git nor GitHub can tell.
    """
    folders = frozenset(folders)
    if not folders:
        return ()
    if _has_no_past(changed):
        return tuple(sorted(folders))
    touched = {
        _adapter_of(PurePosixPath(path), folders) for path in changed_files(workspace, changed, github)
    }
    return tuple(sorted(folder for folder in touched if folder is not None))


def took_all_away(workspace: Path, below: str, changed: Changed, github: GitHub | None) -> bool:
    """Whether the commit removed the adapters of a checkout that has none at or below `below`.

    Raises InputError when neither git nor GitHub can tell.
    """
    if not (workspace / ".git").exists() or _has_no_past(changed):
        return False
    root = inside(workspace, below, what="the input path").relative_to(workspace).as_posix()
    changed_paths = map(PurePosixPath, changed_files(workspace, changed, github))
    return any(path.name == ADAPTER_CONFIG and path.is_relative_to(root) for path in changed_paths)


def changed_files(workspace: Path, changed: Changed, github: GitHub | None) -> tuple[str, ...]:
    """Paths that differ, by git where it knows both commits, else by GitHub."""
    paths = _changed_by_git(workspace, changed)
    if paths is not None:
        return paths
    base = changed.base or changed.trunk
    if github is None or (base is None and changed.pull_request is None):
        raise InputError(
            f"which files changed up to {changed.head[:12]} cannot be told: the checkout does not have the commit "
            "before it",
            hint=FETCH_DEPTH,
        )
    try:
        if changed.pull_request is not None:
            return github.changed_in_pull_request(changed.pull_request)
        return github.changed_between(base or "", changed.head)
    except GitHubError as error:
        raise InputError(
            f"which files changed up to {changed.head[:12]} cannot be told: the checkout does not have the commit "
            f"before it, and {error.message}",
            hint=FETCH_DEPTH,
        ) from error


def resolve_pointers(workspace: Path, folder: PurePosixPath) -> None:
    """See that the files of `folder` are there and not Git LFS pointers; fetch them with `git lfs` where it can be.

    Raises InputError naming a pointer that is left, PolicyError for a link that leads out of the workspace.
    """
    place = workspace / folder
    _refuse_links_out(workspace, place)
    if not _pointers(place):
        return
    said = _pull_pointers(workspace, folder)
    left = _pointers(place)
    if left:
        raise InputError(
            f"{left[0].relative_to(workspace)} is a Git LFS pointer, not the file itself{said}",
            hint="Check out with the files: actions/checkout with `lfs: true`.",
        )


def inside(workspace: Path, text: str, *, what: str) -> Path:
    """`text` as a path of the workspace. Raises PolicyError for one that leads out of it, links followed."""
    path = (workspace / text).resolve()
    if not path.is_relative_to(workspace):
        raise PolicyError(
            f"{what} names {text!r}, which is outside the workspace", hint="Give a path of the repository."
        )
    return path


def _adapter_of(path: PurePosixPath, folders: frozenset[PurePosixPath]) -> PurePosixPath | None:
    """The adapter that a changed file belongs to, None when it belongs to none or does not matter."""
    if path.name in _IGNORED:
        return None
    # At the root of a repository everything lies below; there only the files beside the config count.
    root = PurePosixPath()
    for parent in path.parents:
        if parent in folders and (parent != root or path.parent == root):
            return parent
    return None


def _changed_by_git(workspace: Path, changed: Changed) -> tuple[str, ...] | None:
    """None when git, the repository or one of the commits is missing."""
    if shutil.which("git") is None or not (workspace / ".git").exists():
        return None
    head = _commit(workspace, changed.head) or (
        _commit(workspace, "HEAD") if changed.pull_request is not None else None
    )
    if head is None:
        return None
    base = _base_commit(workspace, changed, head)
    if base is None:
        return None
    between = f"{base}...{head}" if changed.pull_request is not None else f"{base}..{head}"
    answer = _git(
        workspace,
        "diff",
        "--name-only",
        "--no-renames",
        "--no-ext-diff",
        "-z",
        "--end-of-options",
        between,
        "--",
    )
    if answer.returncode != 0:
        return None
    return tuple(path for path in answer.stdout.split("\0") if path)


def _has_no_past(changed: Changed) -> bool:
    return changed.base is None and changed.trunk is None


def _base_commit(workspace: Path, changed: Changed, head: str) -> str | None:
    if changed.base is not None:
        return _commit(workspace, changed.base)
    if changed.trunk is None:
        return None
    answer = _git(workspace, "merge-base", f"refs/remotes/origin/{changed.trunk}", head)
    return answer.stdout.strip() if answer.returncode == 0 else None


def _commit(workspace: Path, name: str) -> str | None:
    """The sha behind `name`, which is checked already, when the repository has that commit."""
    answer = _git(workspace, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}")
    return answer.stdout.strip() if answer.returncode == 0 else None


def _pull_pointers(workspace: Path, folder: PurePosixPath) -> str:
    """Let `git lfs` fetch the files. Returns why that could not help, "" when it ran."""
    if shutil.which("git-lfs") is None:
        return ", and git-lfs is not installed here"
    if not (workspace / ".git").exists():
        return ""
    include = "*" if _PATTERN & set(str(folder)) else str(folder / "*")
    answer = _git(
        workspace, "lfs", "pull", "--include", include, "--exclude", "", timeout=_LFS_TIMEOUT, quiet=False
    )
    return "" if answer.returncode == 0 else ", and `git lfs pull` could not fetch it"


def _pointers(place: Path) -> list[Path]:
    return [
        path
        for path in sorted(place.iterdir())
        if path.is_file() and path.stat().st_size < _POINTER_LIMIT and path.read_bytes().startswith(_POINTER)
    ]


def _refuse_links_out(workspace: Path, place: Path) -> None:
    """A link in a repository may point at any file of the machine, and files beside an adapter are published."""
    for path in sorted(place.rglob("*")):
        if path.is_symlink() and not path.resolve().is_relative_to(workspace):
            raise PolicyError(
                f"{path.relative_to(workspace)} is a link that leads out of the repository",
                hint="Commit the file itself.",
            )


def _git(
    workspace: Path, *arguments: str, timeout: int = _GIT_TIMEOUT, quiet: bool = True
) -> subprocess.CompletedProcess[str]:
    environment = {
        name: value
        for name, value in os.environ.items()
        if not any(part in name for part in _SECRET_PARTS) and not name.startswith(("GIT_", "HF_"))
    }
    environment |= {
        "GIT_TERMINAL_PROMPT": "0",
        "GIT_OPTIONAL_LOCKS": "0",
        # The runner's user owns the workspace, root runs the container: git would refuse to look.
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": "safe.directory",
        "GIT_CONFIG_VALUE_0": str(workspace),
    }
    try:
        return subprocess.run(
            ("git", *arguments),
            cwd=workspace,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if quiet else None,
            text=True,
            errors="surrogateescape",
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(arguments, 124, "", "")
