"""action.yml, workflows, examples and docs: sound, safe, and of one mind with the code."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from merge_adapter import __version__
from merge_adapter.action.inputs import NAMES, SECRETS
from merge_adapter.action.results import OUTPUTS
from merge_adapter.action.table import filled, main, tables

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
EXAMPLES = sorted((ROOT / "docs/examples").glob("*.yml"))
BIN = Path(sys.executable).parent


def load(path: Path) -> dict[str, Any]:
    """A workflow; YAML 1.1 reads the key `on` as true."""
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {"on" if key is True else key: value for key, value in document.items()}


def steps_of(path: Path) -> list[dict[str, Any]]:
    return [step for job in load(path)["jobs"].values() for step in job.get("steps", [])]


def test_outputs_are_those_of_the_code(definition: dict[str, Any]) -> None:
    assert tuple(definition["outputs"]) == OUTPUTS


def test_every_input_and_output_says_what_it_means(definition: dict[str, Any]) -> None:
    for entry in (*definition["inputs"].values(), *definition["outputs"].values()):
        assert entry["description"].rstrip().endswith(".")


def test_the_action_is_found_in_the_marketplace(definition: dict[str, Any]) -> None:
    assert set(definition["branding"]) == {"icon", "color"}
    assert len(definition["description"]) <= 125, "the Marketplace cuts it there"
    assert definition["runs"] == {"using": "docker", "image": "Dockerfile", "args": ["action"]}


@pytest.mark.parametrize("name", ["docs/github-action.md", "README.md"])
def test_the_tables_are_those_of_action_yml(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make them anew with: python -m merge_adapter.action.table README.md docs/github-action.md"""
    monkeypatch.chdir(ROOT)
    assert "<!-- inputs -->\n| input |" in (ROOT / name).read_text(encoding="utf-8")
    assert main(["--check", name]) == 0


def test_the_tables_fill_their_place_and_no_other(definition: dict[str, Any]) -> None:
    text = "before\n<!-- inputs -->\nold\n<!-- /inputs -->\nafter <!-- outputs -->x"
    made = filled(text, tables(ROOT / "action.yml"))
    assert made.startswith("before\n<!-- inputs -->\n| input | default | meaning |")
    assert made.endswith("<!-- /inputs -->\nafter <!-- outputs -->x")
    assert all(f"| `{name}` |" in made for name in definition["inputs"])


def test_workflows_and_examples_fit_githubs_schemas() -> None:
    check = [str(BIN / "check-jsonschema"), "--builtin-schema"]
    for schema, files in (
        ("vendor.github-workflows", (*WORKFLOWS, *EXAMPLES)),
        ("vendor.github-actions", (ROOT / "action.yml",)),
        ("vendor.dependabot", (ROOT / ".github/dependabot.yml",)),
    ):
        done = subprocess.run([*check, schema, *map(str, files)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_zizmor_finds_no_fault() -> None:
    """Offline, so without the question whether a pinned commit is the tag's; CI asks that as well."""
    done = subprocess.run(
        [
            str(BIN / "zizmor"), "--offline", "--no-progress", "--config", ".github/zizmor.yml",
            ".github", "action.yml", *map(str, EXAMPLES),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", [*WORKFLOWS, *EXAMPLES], ids=lambda path: path.stem)
def test_every_workflow_asks_for_no_more_than_it_needs(path: Path) -> None:
    """No permission at the top, those of each job spelled out; never on pull_request_target."""
    workflow = load(path)
    assert workflow["permissions"] == {}
    assert all("permissions" in job for job in workflow["jobs"].values())
    assert "pull_request_target" not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", [*WORKFLOWS, *EXAMPLES], ids=lambda path: path.stem)
def test_actions_are_pinned_by_commit(path: Path) -> None:
    """With the version beside it, for people and for Dependabot; this action itself by the tag that users follow."""
    for used in re.findall(r"uses: (\S+)(.*)", path.read_text(encoding="utf-8")):
        name, comment = used
        if name == "./" or name.startswith("merge-adapter/merge-adapter"):
            continue
        assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", name), name
        assert re.fullmatch(r" # v\d+\.\d+\.\d+", comment), f"{name}{comment}"


@pytest.mark.parametrize("path", [*WORKFLOWS, *EXAMPLES], ids=lambda path: path.stem)
def test_values_reach_scripts_by_their_environment_alone(path: Path) -> None:
    """An expression inside a script is a place to inject."""
    assert not [step for step in steps_of(path) if "${{" in step.get("run", "")]


@pytest.mark.parametrize(
    ("released", "tag", "newest"),
    [
        (("v1.2.3",), "v1.2.3", "true true true"),
        (("v1.2.3", "v1.2.10"), "v1.2.10", "true true true"),
        (("v1.2.3", "v1.2.10"), "v1.2.3", "false false false"),
        (("v1.9.9", "v1.10.0"), "v1.9.9", "false false true"),
        (("v1.9.9", "v1.10.0", "v2.0.0"), "v1.10.0", "false true true"),
        (("v1", "v1.2.3", "v1.3.0-rc1", "v10.0.0"), "v1.2.3", "false true true"),
    ],
)
def test_a_release_moves_no_tag_back(
    released: tuple[str, ...], tag: str, newest: str, tmp_path: Path, git: Callable[..., str], workspace: Path
) -> None:
    """Of all, of its major and of its minor version: `latest`, `1` and `1.2` are moved by the newest alone."""
    workflow = load(ROOT / ".github/workflows/release.yml")
    (script,) = [step["run"] for step in workflow["jobs"]["package"]["steps"] if step.get("id") == "newest"]
    git("commit", "--quiet", "--allow-empty", "-m", "released")
    for name in released:
        git("tag", name)
    output = tmp_path / "output"
    environment = {**os.environ, "GITHUB_REF_NAME": tag, "GITHUB_OUTPUT": str(output)}
    # as GitHub starts it
    command = ["bash", "--noprofile", "--norc", "-e", "-o", "pipefail", "-c", script]
    subprocess.run(command, cwd=workspace, env=environment, check=True)
    told = dict(line.split("=") for line in output.read_text().splitlines())
    assert " ".join(told[key] for key in ("newest", "newest-of-major", "newest-of-minor")) == newest
    assert "newest-of-major == 'true'" in workflow["jobs"]["tag"]["if"]


def test_what_users_name_is_what_a_release_makes() -> None:
    """The tag of the action and those of the images, which carry no v, are of this package's major version."""
    actions, images = set(), set()
    for pattern in ("README.md", "docs/**/*.*", "spaces/*", "src/**/*.py", ".github/**/*.yml"):
        for path in ROOT.glob(pattern):
            text = path.read_text(encoding="utf-8")
            actions |= set(re.findall(r"uses: merge-adapter/merge-adapter\S*@(\S+)", text))
            images |= set(re.findall(r"ghcr\.io/[\w/-]+:([\w-]+)", text))
    major = __version__.partition(".")[0]
    assert actions == {f"v{major}"}
    assert images == {major, f"{major}-cuda"}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_no_work_is_dropped_while_it_waits(path: Path) -> None:
    """Of the runs that wait in a group GitHub keeps the last: right only where that one does the work of all.

    Each push brings adapters of its own, and so does each dispatch.
    """
    workflow = load(path)
    if {"push", "repository_dispatch"} & set(workflow["on"]):
        waits = workflow["concurrency"]
        assert waits.get("queue") == "max" or "github.run_id" in waits["group"]


@pytest.mark.parametrize("path", [*WORKFLOWS, *EXAMPLES], ids=lambda path: path.stem)
def test_a_last_job_that_is_skipped_does_not_count_as_passed(path: Path) -> None:
    """One that does nothing but wait for others runs whatever became of them, and looks."""
    for job in load(path)["jobs"].values():
        if "needs" in job and not [step for step in job["steps"] if "uses" in step]:
            assert "always()" in job["if"]
            assert any("result }}" in value for step in job["steps"] for value in step["env"].values())


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_use_inputs_that_exist(path: Path) -> None:
    for step in steps_of(path):
        if str(step.get("uses", "")).startswith("merge-adapter/merge-adapter@"):
            assert set(step.get("with", {})) <= set(NAMES)
        given = {name for name in step.get("env", {}) if name.startswith("INPUT_")}
        assert {name.removeprefix("INPUT_").lower().replace("_", "-") for name in given} <= set(NAMES)


def test_the_reusable_workflow_hands_every_input_on(definition: dict[str, Any]) -> None:
    """All but those that need a checkout or concern feedback, which it has no permission for."""
    workflow = load(ROOT / ".github/workflows/merge.yml")
    call = workflow["on"]["workflow_call"]
    (step,) = steps_of(ROOT / ".github/workflows/merge.yml")
    left_out = {"path", "probes", "output", "verify", "github-token"}
    handed = {name.removeprefix("INPUT_").lower().replace("_", "-") for name in step["env"]}
    assert handed == set(NAMES) - left_out
    own = {"runs-on", "image", "container-options", "timeout-minutes"}
    assert set(call["inputs"]) == handed - set(SECRETS) | own
    for name in handed - set(SECRETS) - {"device"}:
        default = call["inputs"][name]["default"]
        assert str(default).lower() == str(definition["inputs"][name].get("default", "")).lower()
    assert set(call["outputs"]) <= set(OUTPUTS)


def test_the_docs_show_every_example() -> None:
    text = (ROOT / "docs/github-action.md").read_text(encoding="utf-8")
    assert [path.name for path in EXAMPLES if f"examples/{path.name}" not in text] == []


def test_the_dockerfile_has_no_trap_for_an_action() -> None:
    """No USER, no WORKDIR, no shell between the runner and Python; the base is pinned by its digest."""
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    assert not [line for line in lines if line.startswith(("USER", "WORKDIR"))]
    (entry,) = [line for line in lines if line.startswith("ENTRYPOINT")]
    assert entry.startswith('ENTRYPOINT ["')
    (base,) = [line for line in lines if line.startswith("ARG BASE_IMAGE")]
    assert re.fullmatch(r"ARG BASE_IMAGE=\S+:[\w.-]+@sha256:[0-9a-f]{64}", base)


def test_the_image_installs_what_the_package_requires() -> None:
    program = [sys.executable, str(ROOT / "scripts/container/requirements.py"), str(ROOT / "pyproject.toml")]
    listed = subprocess.run([*program, "bot"], capture_output=True, text=True, check=True).stdout.splitlines()
    assert any(line.startswith("torch>=") for line in listed)
    assert any(line.startswith("fastapi>=") for line in listed)
    unknown = subprocess.run([*program, "bott"], capture_output=True, text=True, check=False)
    assert unknown.returncode == 2
    assert "no such extra: bott" in unknown.stderr


@pytest.mark.parametrize(
    ("command", "port"),
    [
        ("merge-adapter run acme/adapter", None),
        ("python merge-adapter serve", 7860),
        ("python merge-adapter serve --port 80 --host 0.0.0.0", 80),
        ("python merge-adapter serve --host 0.0.0.0 --port=8080", 8080),
        ("python merge-adapter serve --config bot.toml", 8888),
        ("python merge-adapter serve -c bot.toml --port 80", 80),
    ],
)
def test_the_health_check_asks_where_the_bot_listens(
    command: str, port: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the command line, the environment or a file of settings says. Every other command is well as it runs."""
    monkeypatch.delenv("MERGE_ADAPTER_BOT_PORT", raising=False)
    monkeypatch.chdir(tmp_path)
    Path("bot.toml").write_text("port = 8888\n")
    health = runpy.run_path(str(ROOT / "scripts/container/health.py"))
    assert health["port_of"](command.split()) == port


@pytest.mark.skipif(shutil.which("dash") is None, reason="dash is not installed")
def test_a_shell_between_would_lose_inputs() -> None:
    """Why the entry point is Python and the reusable workflow spells its variables with underscores."""
    done = subprocess.run(
        ["dash", "-c", "env"],
        env={"PATH": "/usr/bin:/bin", "INPUT_BASE-MODEL": "x", "INPUT_BASE_MODEL": "y"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "INPUT_BASE_MODEL=y" in done.stdout
    assert "INPUT_BASE-MODEL" not in done.stdout
