"""Catching up with 200 adapters: the table, what is carried out, and going on after a stop."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from merge_adapter.bot.rows import list_jobs
from merge_adapter.bot.store import Store
from merge_adapter.bot.survey import Standing, survey
from merge_adapter.hub import Hub

MANY = 200
UNMERGEABLE = 10


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory, lm_base: Path, lm_adapter: Path) -> Iterator[Any]:
    """A Hub on which `acme` has 200 tiny adapters, ten of them without a base, and one repository that is none."""
    from huggingface_hub import CommitOperationAdd, HfApi

    from localhub.process import LocalHub

    config = json.loads((lm_adapter / "adapter_config.json").read_text()) | {
        "r": 2,
        "target_modules": ["q_proj"],
        "layers_to_transform": [0],
    }
    width = json.loads((lm_base / "config.json").read_text())["hidden_size"]
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    torch.manual_seed(0)
    weights = save(
        {
            f"{prefix}.lora_A.weight": torch.randn(2, width) / width,
            f"{prefix}.lora_B.weight": torch.randn(width, 2) / 2,
        }
    )
    place = tmp_path_factory.mktemp("many")
    with LocalHub(place / "hub", {"ada": "hf_ada"}, {"demo": ["ada"], "acme": ["ada"]}) as hub:
        api = HfApi(endpoint=hub.url, token="hf_ada")
        api.create_repo("demo/pydoc-llama")
        api.upload_folder(repo_id="demo/pydoc-llama", folder_path=lm_base)

        def push(number: int) -> None:
            repo_id = f"acme/tiny-{number:03}"
            api.create_repo(repo_id)
            base = "nobody/gone" if number < UNMERGEABLE else "demo/pydoc-llama"
            text = json.dumps(config | {"base_model_name_or_path": base}).encode()
            files = {"adapter_config.json": text, "adapter_model.safetensors": weights}
            added = [CommitOperationAdd(name, content) for name, content in files.items()]
            api.create_commit(repo_id, added, commit_message="train")

        with ThreadPoolExecutor(6) as pool:
            list(pool.map(push, range(MANY)))
        api.create_repo("acme/plain")
        yield hub


def backfill(hub: Any, data: Path, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    chosen = {"endpoint": hub.url, "token": "hf_ada", **settings}
    environment = {
        **os.environ,
        **{f"MERGE_ADAPTER_BOT_{name.upper()}": value for name, value in chosen.items()},
    }
    return subprocess.run(
        [sys.executable, "-m", "merge_adapter", "backfill", "--data", str(data), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )


def test_200_adapters_are_looked_at_and_two_of_them_done(many: Any, tmp_path: Path) -> None:
    """Dry by default; what is carried out is up to date the next time, and nothing is done twice."""
    dry = backfill(many, tmp_path / "bot", "--author", "acme", "--json")
    assert dry.returncode == 0, dry.stderr
    found = json.loads(dry.stdout)
    assert Counter(one["state"] for one in found["adapters"]) == {
        "to do": MANY - UNMERGEABLE,
        "refused": UNMERGEABLE,
    }
    assert found["jobs"] == [] and all(
        "nobody/gone" in one["note"] for one in found["adapters"][:UNMERGEABLE]
    )
    todo = found["adapters"][-1]
    assert todo["id"] == "acme/tiny-199" and todo["bytes_written"] > todo["bytes_uploaded"] > 0
    assert not (tmp_path / "bot").exists()
    names = tmp_path / "names.txt"
    names.write_text(
        "# two to do, one that cannot be done\nacme/tiny-100\nacme/tiny-101  # second\nacme/tiny-001\n"
    )
    done = backfill(many, tmp_path / "bot", "--file", str(names), "--go", "--parallel", "2", "--json")
    assert done.returncode == 0, done.stderr
    jobs = json.loads(done.stdout)["jobs"]
    assert [(job["adapter"], job["state"]) for job in jobs] == [
        ("acme/tiny-100", "done"),
        ("acme/tiny-101", "done"),
    ]
    again = backfill(many, tmp_path / "bot", "--file", str(names), "--go")
    assert again.returncode == 0 and "2 up to date, 1 refused" in again.stdout
    assert "nothing was to do" in again.stdout
    with Store(tmp_path / "bot" / "bot.sqlite3") as store:
        assert len(list_jobs(store)) == 2


def test_the_table_tells_hardware_and_what_it_costs(many: Any, tmp_path: Path) -> None:
    """As the runner would choose it, in all too; what fits on no hardware is refused, and says why."""
    names = tmp_path / "names.txt"
    names.write_text("acme/tiny-150\nacme/tiny-151\nacme/tiny-001\n")
    settings = {"runner": "hf-jobs", "jobs_image": "merge-adapter:test"}
    table = backfill(many, tmp_path / "bot", "--file", str(names), **settings)
    assert table.stdout.count("cpu-basic, about $0.00") == 2 and "costs about $0.00" in table.stdout
    asked = ("--file", str(names), "--json")
    first, _, refused = json.loads(backfill(many, tmp_path / "bot", *asked, **settings).stdout)["adapters"]
    assert first["hardware"] == "cpu-basic" and 0 < first["dollars"] < 0.01
    assert refused["hardware"] is refused["dollars"] is None
    none = json.loads(backfill(many, tmp_path / "bot", *asked, **settings, jobs_flavor="moon").stdout)
    assert {one["state"] for one in none["adapters"]} == {"refused"}
    assert "there is no hardware 'moon'" in none["adapters"][0]["note"]


def test_what_the_hub_did_not_tell_is_no_success(many: Any, tmp_path: Path) -> None:
    """Nobody knows then whether there is something to do: a schedule must not take it for done."""
    names = tmp_path / "names.txt"
    names.write_text("acme/tiny-150\n")
    for more in ((), ("--go",)):
        done = backfill(many, tmp_path / "bot", "--file", str(names), *more, token="hf_of_nobody")
        assert done.returncode == 5 and "1 unknown" in done.stdout


def test_what_cannot_be_read_is_said(many: Any, tmp_path: Path) -> None:
    nothing = backfill(many, tmp_path / "bot")
    assert nothing.returncode == 2 and "nothing was named" in nothing.stderr
    names = tmp_path / "names.txt"
    names.write_text("../etc/passwd\n")
    bad = backfill(many, tmp_path / "bot", "--file", str(names))
    assert bad.returncode == 2 and "not a Hub id" in bad.stderr
    names.write_bytes(b"acme/tiny-\xff\n")
    bad = backfill(many, tmp_path / "bot", "--file", str(names))
    assert bad.returncode == 2 and "cannot be read as UTF-8" in bad.stderr
    bad = backfill(many, tmp_path / "bot", "--author", "acme/tiny-001")
    assert bad.returncode == 2 and "not the name of an owner" in bad.stderr
    names.write_bytes(b"\xef\xbb\xbf# saved by an editor of Windows\r\n")
    empty = backfill(many, tmp_path / "bot", "--file", str(names))
    assert empty.returncode == 0 and "no adapter was found" in empty.stdout


def test_each_adapter_of_a_repository_is_looked_at(
    tmp_path: Path, hub: Any, push_adapter: Any, lm_adapter: Path, make_settings: Any
) -> None:
    """As pushes are: a line, a job and a target for each folder, where no adapter lies at the root."""
    for name in ("a", "b/c"):
        shutil.copytree(lm_adapter, tmp_path / "several" / name)
    (tmp_path / "several" / "broken").mkdir()
    (tmp_path / "several" / "broken" / "adapter_config.json").write_text("{}")
    repo_id, sha = push_adapter("ada/several-behind", folder=tmp_path / "several")
    root, _ = push_adapter("ada/one-behind")
    found = survey((repo_id, root), Hub(hub.url, "hf_ada"), make_settings(hub.url, tmp_path / "bot"))
    assert [(one.repo_id, one.subfolder, one.standing) for one in found] == [
        (repo_id, "a", Standing.TO_DO),
        (repo_id, "b/c", Standing.TO_DO),
        (repo_id, "broken", Standing.REFUSED),
        (root, "", Standing.TO_DO),
    ]
    requests = [one.request(batch="x") for one in found if one.standing is Standing.TO_DO]
    assert [(one.revision, one.target) for one in requests[:2]] == [
        (sha, "ada/several-behind-a-merged"),
        (sha, "ada/several-behind-b-c-merged"),
    ]
    assert len({one.dedupe for one in requests}) == 3
