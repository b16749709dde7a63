"""Whether what lies on the Hub is whole: every file as the report says, and loadable as a user would load it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merge_adapter.errors import HubError, InputError, NotFoundError
from merge_adapter.publish.contents import sha256_of
from merge_adapter.report.document import REPORT_FILE
from merge_adapter.types import Repository

if TYPE_CHECKING:
    from merge_adapter.hub import HubRepository

_HEADER_LIMIT = 100 << 20
"""Bytes; the safetensors format allows no longer header."""
_REPORT_LIMIT = 64 << 20
_CARD = "README.md"
_LOADED = (".json", ".jinja", ".model", ".txt", ".tiktoken")
"""Endings of what configs and tokenizers are made of."""
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def read_remote_report(repository: HubRepository) -> dict[str, Any] | None:
    """merge_report.json below the repository's subfolder; None when there is none that can be read."""
    from merge_adapter.report.document import validate

    if not 0 < repository.files.get(REPORT_FILE, 0) <= _REPORT_LIMIT:
        return None
    try:
        report = json.loads(repository.read(REPORT_FILE))
        validate(report, place=f"{REPORT_FILE} of {repository.origin}")
    except (ValueError, RecursionError, InputError):
        return None  # not ours, or of another schema: it is no evidence of anything
    return dict(report)


def differences(
    repository: HubRepository, listed: Mapping[str, tuple[int, str]], *, keep_in: Path | None = None
) -> tuple[str, ...]:
    """Which of `listed` (path -> bytes, sha256) the repository does not hold unchanged, one sentence each.

    Large files by the hash that the Hub keeps, small ones by fetching them, into `keep_in` where it is given.
    """
    problems = []
    for path, (size, sha256) in listed.items():
        entry = repository.entries.get(path)
        if entry is None:
            problems.append(f"{path} is missing")
        elif entry.size != size:
            problems.append(f"{path} has {entry.size} bytes, expected {size}")
        elif (entry.lfs.sha256 if entry.lfs else _fetch(repository, path, keep_in)) != sha256:
            problems.append(f"{path} has other content than was sent")
    return tuple(problems)


def listed_files(report: Mapping[str, Any]) -> dict[str, tuple[int, str]]:
    """path -> (bytes, sha256) of a report's files."""
    return {file["path"]: (file["bytes"], file["sha256"]) for file in report["output"]["files"]}


def model_files(report: Mapping[str, Any]) -> dict[str, tuple[int, str]]:
    """The same without the card: a publication is what it was when people have edited what it says to them."""
    return {path: file for path, file in listed_files(report).items() if path != _CARD}


def check_remote(
    repository: HubRepository, listed: Mapping[str, tuple[int, str]], *, loads: bool = True
) -> None:
    """Raise HubError when the Hub does not hold `listed`, or, with `loads`, when what it serves cannot be loaded."""
    with tempfile.TemporaryDirectory(prefix="merge-adapter-check-") as scratch:
        problems = differences(repository, listed, keep_in=Path(scratch))
        if problems:
            raise HubError(
                f"what {repository.origin} holds is not what was sent: {'; '.join(problems[:5])}",
                hint="Nothing was offered as ready. Run the same command again: it repairs what differs.",
            )
        for path in listed:
            if path.endswith(".safetensors"):
                check_header(repository, path)
        if loads:
            _check_loads(repository, listed, Path(scratch))


def check_header(repository: Repository, path: str) -> None:
    """Fetch a safetensors header and compare its last offset with the file's length; HubError on any fault."""
    size = repository.files[path]
    length = int.from_bytes(repository.read(path, length=8), "little")
    problem = "the header is longer than the file" if length > min(size - 8, _HEADER_LIMIT) else ""
    if not problem:
        try:
            header = json.loads(repository.read(path, offset=8, length=length))
            ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
            if 8 + length + max(ends, default=0) != size:
                problem = f"the tensors end at byte {8 + length + max(ends, default=0)} of {size}"
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            problem = f"the header cannot be read ({type(error).__name__})"
    if problem:
        raise HubError(
            f"{path} of {repository.origin} is not a whole safetensors file: {problem}",
            hint="Nothing was offered as ready. Merge and publish again.",
        )


def _fetch(repository: HubRepository, path: str, keep_in: Path | None) -> str:
    """Fetch a whole file; its sha256."""
    content = repository.read(path)
    if keep_in is not None:
        place = keep_in / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)
    return sha256_of([content])


def _check_loads(repository: HubRepository, listed: Mapping[str, tuple[int, str]], fresh: Path) -> None:
    """Load config and tokenizer with transformers from a fresh download, whose small files are in `fresh` already."""
    if "config.json" not in listed:
        return
    for path in listed:
        if path.endswith(_LOADED) and not (fresh / path).exists():
            _fetch(repository, path, fresh)
    config = json.loads((fresh / "config.json").read_text(encoding="utf-8"))
    try:
        _load(str(fresh), config, has_tokenizer=any(name in listed for name in _TOKENIZER_FILES))
    except Exception as error:  # whatever a loader raises, it means that it does not load
        said = " ".join(str(error).split())[:300]
        raise HubError(
            f"the config or tokenizer of {repository.origin} does not load after download: {said}",
            hint="Nothing was offered as ready. Load the merged folder with transformers to see why.",
        ) from error


def _load(folder: str, config: Mapping[str, Any], *, has_tokenizer: bool) -> None:
    """Custom code is never run here: what needs it is left to the gate, which was told whether it may."""
    from transformers import AutoConfig, AutoTokenizer
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if config.get("model_type") in CONFIG_MAPPING and "auto_map" not in config:
        AutoConfig.from_pretrained(folder, local_files_only=True)
    custom = "auto_map" in config
    with suppress(FileNotFoundError, ValueError):
        own = json.loads(Path(folder, "tokenizer_config.json").read_text(encoding="utf-8"))
        custom = custom or "auto_map" in own
    if has_tokenizer and not custom:
        AutoTokenizer.from_pretrained(folder, local_files_only=True)


def published_report(repository: HubRepository) -> dict[str, Any] | None:
    """The report of a publication that lies whole in `repository`; None when there is none or parts are missing."""
    report = read_remote_report(repository)
    if report is None:
        return None
    try:
        return report if not differences(repository, model_files(report)) else None
    except NotFoundError:
        return None
