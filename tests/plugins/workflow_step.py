"""The action's surroundings: `act` runs a step as the runner runs it.

It starts the container's entry point with the variables and files of a runner, and reads its log by the runner's own
rules.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
REGISTERED = {"add-mask", "error", "warning", "notice", "debug", "group", "endgroup", "stop-commands", "set-output",
              "save-state", "set-env", "add-path", "add-matcher", "remove-matcher", "echo"}  # fmt: skip
"""The commands that the runner knows."""


# ------------------------------------------------------------------------------------------ a step of a job


@dataclass(frozen=True)
class Command:
    name: str
    properties: Mapping[str, str]
    data: str


@dataclass
class Step:
    """What a step left: exit code, log, the commands the runner would have obeyed, outputs, summary."""

    code: int
    log: str
    commands: list[Command]
    outputs: dict[str, str]
    summary: str
    workspace: Path

    def annotations(self, level: str) -> list[str]:
        return [command.data for command in self.commands if command.name == level]

    @property
    def results(self) -> list[dict[str, Any]]:
        return json.loads(self.outputs["results"])


def obeyed(log: str) -> list[Command]:
    """The commands in a log, by the rules of the runner's ActionCommand and ActionCommandManager."""
    found: list[Command] = []
    registered = set(REGISTERED)
    stopped: str | None = None
    for line in re.split(r"\r\n|\r|\n", log):
        command = _new_form(line, registered) or _old_form(line, registered)
        if command is None:
            continue
        if stopped is not None:
            if command.name == stopped:
                registered.discard(stopped)
                stopped = None
            continue
        if command.name == "stop-commands":
            stopped = command.data
            registered.add(stopped)
            continue
        found.append(command)
    assert stopped is None, "the log ends with commands stopped"
    return found


@pytest.fixture(scope="session")
def runner_obeys() -> Callable[[str], list[Command]]:
    """`runner_obeys(log)`: the commands that the runner takes from a log."""
    return obeyed


def _new_form(line: str, registered: set[str]) -> Command | None:
    match = re.match(r"\s*::([^:\s]+)(?: (.*?))?::(.*)$", line)
    if match is None or match[1] not in registered:
        return None
    properties = dict(pair.split("=", 1) for pair in (match[2] or "").split(",") if "=" in pair)
    return Command(match[1], {k: _decoded(v) for k, v in properties.items()}, _decoded(match[3]))


def _old_form(line: str, registered: set[str]) -> Command | None:
    match = re.search(r"##\[([^\]\s]+)(?: ([^\]]*))?\](.*)$", line)
    return Command(match[1], {}, match[3]) if match and match[1] in registered else None


def _decoded(text: str) -> str:
    for code, character in (("%3A", ":"), ("%2C", ","), ("%0A", "\n"), ("%0D", "\r"), ("%25", "%")):
        text = text.replace(code, character)
    return text


def read_outputs(text: str) -> dict[str, str]:
    """The file GITHUB_OUTPUT, as the runner reads it."""
    outputs: dict[str, str] = {}
    lines = iter(text.split("\n"))
    for line in lines:
        if not line:
            continue
        name, delimiter = line.split("<<", 1)
        value = []
        for inner in lines:
            if inner == delimiter:
                break
            value.append(inner)
        else:
            raise AssertionError(f"the output {name} does not end")
        outputs[name] = "\n".join(value)
    return outputs


@pytest.fixture(scope="session")
def definition() -> dict[str, Any]:
    """action.yml."""
    return yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """An empty GITHUB_WORKSPACE."""
    place = tmp_path / "github" / "workspace"
    place.mkdir(parents=True)
    return place


@pytest.fixture
def act(tmp_path: Path, workspace: Path, definition: dict[str, Any]) -> Callable[..., Step]:
    """`act("push", payload, inputs={…}, env={…})`: one step, in a process of its own."""
    count = iter(range(1000))

    def run(
        event_name: str = "workflow_dispatch",
        event: Mapping[str, Any] | None = None,
        *,
        inputs: Mapping[str, str] | None = None,
        env: Mapping[str, str] | None = None,
    ) -> Step:
        files = tmp_path / "github" / f"step-{next(count)}"
        (files / "home").mkdir(parents=True)
        for name in ("outputs", "summary"):
            (files / name).touch()
        (files / "event.json").write_text(json.dumps(event or {}), encoding="utf-8")
        values = {name: str(entry.get("default", "")) for name, entry in definition["inputs"].items()}
        values |= {"github-token": ""} | dict(inputs or {})
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(files / "home"),
            "LANG": "C.UTF-8",
            "OMP_NUM_THREADS": "1",
            "HF_HOME": os.environ["HF_HOME"],
            "HF_ENDPOINT": os.environ["HF_ENDPOINT"],
            "HF_HUB_DISABLE_TELEMETRY": "1",
            **{f"INPUT_{name.upper()}": value for name, value in values.items()},
            "GITHUB_WORKSPACE": str(workspace),
            "GITHUB_EVENT_NAME": event_name,
            "GITHUB_EVENT_PATH": str(files / "event.json"),
            "GITHUB_REPOSITORY": "octocat/adapters",
            "GITHUB_SHA": "6dcb09b5b57875f334f61aebed695e2e4193db5e",
            "GITHUB_REF": "refs/heads/main",
            "GITHUB_RUN_ID": "1658821493",
            "GITHUB_RUN_ATTEMPT": "1",
            "GITHUB_WORKFLOW": "Merge",
            "GITHUB_JOB": "merge",
            "GITHUB_OUTPUT": str(files / "outputs"),
            "GITHUB_STEP_SUMMARY": str(files / "summary"),
            **(env or {}),
        }
        done = subprocess.run(
            [str(Path(sys.executable).parent / "merge-adapter"), "action"],
            cwd=workspace,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=900,
            check=False,
        )
        log = done.stdout.decode()
        return Step(
            done.returncode,
            log,
            obeyed(log),
            read_outputs((files / "outputs").read_text(encoding="utf-8")),
            (files / "summary").read_text(encoding="utf-8"),
            workspace,
        )

    return run


@pytest.fixture
def git(workspace: Path) -> Callable[..., str]:
    """`git("commit", "-m", "…")` in the workspace, which is made a repository first."""

    def run(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-c", "user.name=Ada", "-c", "user.email=ada@example.org", *arguments],
            cwd=workspace,
            env={"PATH": os.environ["PATH"], "HOME": str(workspace.parent), "GIT_CONFIG_NOSYSTEM": "1"},
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.strip()

    run("init", "--quiet", "--initial-branch=main")
    return run
