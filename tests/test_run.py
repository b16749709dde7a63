"""The whole job against a running Hub, as a user runs it: processes, environment variables, exit codes."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, snapshot_download

from localhub.process import LocalHub
from merge_adapter.errors import ExitCode
from merge_adapter.packaging.usage import snippet

Copy = Callable[..., Path]
FAST = ("--probe-tokens", "128")


@dataclass(frozen=True)
class Place:
    """A namespace of its own on the Hub, with the means to push to it and to run the tool."""

    hub: LocalHub
    owner: str
    token: str
    home: Path

    @property
    def api(self) -> HfApi:
        return HfApi(endpoint=self.hub.url, token=self.token)

    def push(self, folder: Path, name: str, *, private: bool = False) -> str:
        """Upload a folder as a repository and return its id."""
        repo_id = f"{self.owner}/{name}"
        self.api.create_repo(repo_id, private=private, exist_ok=True)
        self.api.upload_folder(repo_id=repo_id, folder_path=folder)
        return repo_id

    def run(self, *arguments: object, token: str | None = None) -> subprocess.CompletedProcess[str]:
        """`merge-adapter …` in a process of its own. Output carries no token, whatever happens."""
        used = self.token if token is None else token
        environment = {**os.environ, "HF_ENDPOINT": self.hub.url, "HF_HOME": str(self.home), "HF_TOKEN": used}
        finished = subprocess.run(
            [sys.executable, "-m", "merge_adapter", *map(str, arguments)],
            capture_output=True,
            text=True,
            env=environment,
        )
        assert "Traceback" not in finished.stderr, finished.stderr
        for secret in (self.token, used):
            assert not secret or secret not in finished.stdout + finished.stderr
        return finished

    def state(self) -> dict[str, Any]:
        """Repositories, heads and pull requests of the owner: what must not change when a run is refused."""
        found = {}
        for model in self.api.list_models(author=self.owner):
            refs = self.api.list_repo_refs(model.id, include_pull_requests=True)
            found[model.id] = sorted(
                (ref.ref, ref.target_commit) for ref in [*refs.branches, *(refs.pull_requests or [])]
            )
        return found


@pytest.fixture
def place(tmp_path: Path, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    owner = "runner"
    data = tmp_path_factory.mktemp("run-hub")
    with LocalHub(data, tokens={owner: "hf_runner", "stranger": "hf_stranger"}) as hub:
        yield Place(hub, owner, "hf_runner", tmp_path / "home")


def named(copy_of: Copy, adapter: Path, base: str, **changes: Any) -> Path:
    """A copy of an adapter whose config names `base`."""
    copy = copy_of(adapter, "adapter-to-push")
    path = copy / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": base, **changes}))
    return copy


GENERATE = """
import sys
sys.modules["peft"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
chat = [{"role": "user", "content": "What is a list?"}]
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
print(model.generate(**inputs, max_new_tokens=20, do_sample=False)[0].tolist())
"""


def expected_tokens(base: Path, adapter: Path) -> list[int]:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(adapter)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, adapter)
    chat = [{"role": "user", "content": "What is a list?"}]
    inputs = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    return list(model.generate(**inputs, max_new_tokens=20, do_sample=False)[0].tolist())


def test_the_usage_of_a_merge_in_the_adapters_own_repository_runs(
    place: Place, lm_base: Path, lm_adapter: Path, tmp_path: Path
) -> None:
    """With PEFT installed, transformers finds the adapter at the root for whatever folder it is asked."""
    repo_id = place.push(lm_adapter, "adapter")
    place.api.upload_folder(repo_id=repo_id, folder_path=lm_base, path_in_repo="merged")
    config = json.loads((lm_base / "config.json").read_text())
    shown = snippet(lm_base, config, place=repo_id, subfolder="merged", code_needed=False)
    environment = {
        **os.environ,
        "HF_ENDPOINT": place.hub.url,
        "HF_HOME": str(place.home),
        "HF_TOKEN": place.token,
    }
    done = subprocess.run([sys.executable, "-c", shown], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_an_adapter_becomes_a_pull_request_once(
    place: Place, copy_of: Copy, lm_base: Path, lm_adapter: Path, tmp_path: Path
) -> None:
    base = place.push(lm_base, "base")
    adapter = place.push(named(copy_of, lm_adapter, base), "adapter")

    first = place.run("run", adapter, "--json", *FAST)
    assert first.returncode == 0, first.stderr
    report = json.loads(first.stdout)
    publication = report["publication"]
    assert report["verification"]["verdict"] == "pass"
    assert report["adapter"]["revision"] == place.api.model_info(adapter).sha
    assert publication["operation"] == "created"
    assert publication["repo"] == f"{adapter}-merged"

    pull = place.api.get_discussion_details(publication["repo"], publication["number"])
    assert pull.status == "open"
    folder = snapshot_download(
        publication["repo"],
        revision=f"refs/pr/{publication['number']}",
        endpoint=place.hub.url,
        token=place.token,
        local_dir=tmp_path / "download",
    )
    written = subprocess.run(
        [sys.executable, "-c", GENERATE, folder], capture_output=True, text=True, check=True
    )
    assert json.loads(written.stdout) == expected_tokens(lm_base, lm_adapter)

    before = place.state()
    again = place.run("run", adapter, "--json", *FAST)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["publication"]["operation"] == "unchanged"
    assert json.loads(again.stdout)["publication"]["number"] == publication["number"]
    assert place.state() == before
    assert "unchanged" in place.run("run", adapter, *FAST).stdout

    verdict = place.run(
        "verify", f"{publication['repo']}@refs/pr/{publication['number']}", "--adapter", adapter, *FAST
    )
    assert verdict.returncode == 0, verdict.stderr


def test_a_sentence_embedding_adapter_loads_with_sentence_transformers(
    place: Place, copy_of: Copy, embedding_base: Path, embedding_adapter: Path, tmp_path: Path
) -> None:
    from sentence_transformers import SentenceTransformer

    base = place.push(embedding_base, "minilm")
    adapter = place.push(named(copy_of, embedding_adapter, base), "minilm-adapter")
    finished = place.run("run", adapter, "--json", *FAST)
    assert finished.returncode == 0, finished.stderr
    publication = json.loads(finished.stdout)["publication"]
    folder = snapshot_download(
        publication["repo"],
        revision=f"refs/pr/{publication['number']}",
        endpoint=place.hub.url,
        token=place.token,
        local_dir=tmp_path / "download",
    )
    texts = ["A cat sits on the mat.", "def add(a, b): return a + b", "The committee adjourned."]
    merged = SentenceTransformer(folder, device="cpu").encode(texts)
    plain = SentenceTransformer(str(embedding_base), device="cpu")
    before = plain.encode(texts)
    plain[0].load_adapter(str(embedding_adapter)) if hasattr(
        plain[0], "load_adapter"
    ) else plain.load_adapter(str(embedding_adapter))
    reference = plain.encode(texts)
    effect = abs(reference - before).max()
    assert abs(merged - reference).max() < effect * 1e-3


def test_a_classifier_gets_the_head_its_base_lacks(
    place: Place, copy_of: Copy, lm_base: Path, classifier_adapter: Path, tmp_path: Path
) -> None:
    base = place.push(lm_base, "base")
    adapter = place.push(named(copy_of, classifier_adapter, base), "classifier")
    finished = place.run("run", adapter, "--publish", "new-repo", "--json", *FAST)
    assert finished.returncode == 0, finished.stderr
    publication = json.loads(finished.stdout)["publication"]
    assert publication["number"] is None
    folder = snapshot_download(
        publication["repo"], endpoint=place.hub.url, token=place.token, local_dir=tmp_path / "download"
    )
    import torch
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    inputs = AutoTokenizer.from_pretrained(folder)("import os\n", return_tensors="pt")
    merged = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    plain = AutoModelForSequenceClassification.from_pretrained(lm_base, dtype=torch.float32, num_labels=2)
    reference = PeftModel.from_pretrained(plain, classifier_adapter).eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(**inputs).logits, reference(**inputs).logits, atol=5e-2, rtol=5e-2)


def test_publish_none_leaves_the_hub_alone(
    place: Place, copy_of: Copy, lm_base: Path, lm_adapter: Path
) -> None:
    base = place.push(lm_base, "base")
    adapter = place.push(named(copy_of, lm_adapter, base), "adapter")
    before = place.state()
    finished = place.run("run", adapter, "--publish", "none", "--json", *FAST)
    assert finished.returncode == 0, finished.stderr
    assert "publication" not in json.loads(finished.stdout)
    assert place.state() == before


def test_a_folder_merged_earlier_is_published_and_a_changed_one_refused(
    place: Place, copy_of: Copy, lm_base: Path, lm_adapter: Path, tmp_path: Path
) -> None:
    base = place.push(lm_base, "base")
    adapter = place.push(named(copy_of, lm_adapter, base), "adapter")
    output = tmp_path / "merged"
    finished = place.run("merge", adapter, "-o", output, "-q", *FAST)
    assert finished.returncode == 0, finished.stderr
    changed = copy_of(output, "changed")
    (changed / "config.json").write_text((changed / "config.json").read_text() + " ")
    before = place.state()
    refused = place.run("publish", changed)
    assert refused.returncode == ExitCode.INPUT
    assert "config.json" in refused.stderr
    assert place.state() == before
    published = place.run("publish", output, "--json")
    assert published.returncode == 0, published.stderr
    assert json.loads(published.stdout)["publication"]["operation"] == "created"


def test_sources_that_cannot_be_had_change_nothing(
    place: Place, copy_of: Copy, lm_base: Path, lm_adapter: Path, tmp_path: Path
) -> None:
    """Missing repository and revision, missing base, private without access, gated without access."""
    base = place.push(lm_base, "base")
    private = place.push(lm_base, "private-base", private=True)
    adapter = place.push(named(copy_of, lm_adapter, base), "adapter")
    gated = place.push(lm_base, "gated-base")
    place.api.update_repo_settings(gated, gated="manual")
    before = place.state()
    stranger = "hf_stranger"
    cases: list[tuple[tuple[str, ...], ExitCode, str]] = [
        (("runner/nothing",), ExitCode.INPUT, "runner/nothing"),
        ((f"{adapter}@nowhere",), ExitCode.INPUT, "nowhere"),
        ((base,), ExitCode.INPUT, "adapter_config.json"),
        ((adapter, "--base-model", "runner/no-base"), ExitCode.INPUT, "runner/no-base"),
        ((adapter, "--base-model", private), ExitCode.INPUT, private),
        ((adapter, "--base-model", gated), ExitCode.POLICY, gated),
    ]
    for arguments, code, words in cases:
        output = tmp_path / "out"
        finished = place.run("merge", *arguments, "-o", output, "-q", token=stranger)
        assert (finished.returncode, words in finished.stderr) == (code, True), (arguments, finished.stderr)
        assert finished.stderr.startswith("error: ")
        assert not output.exists()
        finished = place.run("run", *arguments, "-q", token=stranger)
        assert finished.returncode == code, (arguments, finished.stderr)
    assert place.state() == before


def test_a_hub_that_does_not_answer_is_exit_5(tmp_path: Path, lm_adapter: Path) -> None:
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "home")}
    finished = subprocess.run(
        [sys.executable, "-m", "merge_adapter", "plan", "owner/name"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert finished.returncode == ExitCode.REMOTE, finished.stderr
    assert "127.0.0.1:9" in finished.stderr


def test_the_published_card_loads_the_model_from_where_it_was_published(
    place: Place, lm_base: Path, lm_adapter: Path, tmp_path: Path
) -> None:
    """Of a folder whose target nobody knew when it was merged; the folder itself stays as it was."""
    output = tmp_path / "merged"
    merged = place.run("merge", lm_adapter, "--base-model", lm_base, "-o", output, "--no-verify", "-q")
    assert merged.returncode == ExitCode.DONE, merged.stderr
    before = (output / "README.md").read_bytes()
    for folder in ("", "of/last"):
        arguments = ("--target-repo", "runner/chosen", "--path-in-repo", folder, "--json", "-q")
        published = place.run("publish", output, *arguments)
        revision = json.loads(published.stdout)["publication"]["commit"]
        there = Path(place.api.snapshot_download("runner/chosen", revision=revision)) / folder
        card = (there / "README.md").read_text()
        assert '("runner/chosen"' in card and "path/to/this/folder" not in card
        assert (f'"/{folder}"' in card) == bool(folder)
        (listed,) = [
            entry
            for entry in json.loads((there / "merge_report.json").read_text())["output"]["files"]
            if entry["path"] == "README.md"
        ]
        assert listed["sha256"] == hashlib.sha256(card.encode()).hexdigest()
    assert (output / "README.md").read_bytes() == before


@pytest.mark.parametrize("arguments", [("--merged-subfolder", "nope"), ()], ids=["folder", "adapter"])
def test_where_no_model_lies_nothing_is_judged(
    place: Place, lm_base: Path, lm_adapter: Path, arguments: tuple[str, ...]
) -> None:
    """The name is wrong, and said: a folder that is not there; a repository of which only the pull request has one."""
    merged = place.push(lm_base, "subfolders") if arguments else place.push(lm_adapter, "no-model")
    found = place.run("verify", merged, *arguments, "--adapter", lm_adapter)
    assert found.returncode == ExitCode.INPUT
    assert f"there is no model in {merged}" in found.stderr
    assert "OWNER/NAME@refs/pr/N" in found.stderr and "--merged-subfolder" in found.stderr
