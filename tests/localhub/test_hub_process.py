"""The Hub as a process: starting, stopping, restarting, and many clients at once."""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError

from localhub.process import LocalHub, LocalHubError


def _localhub(*arguments):
    command = [sys.executable, "-m", "localhub", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_prints_its_url_and_nothing_else(tmp_path):
    """One line on stdout; ends on SIGTERM."""
    with _localhub("--data", str(tmp_path), "--token", "alice=hf_a") as process:
        url = process.stdout.readline().strip()
        httpx2.get(f"{url}/api/whoami-v2", headers={"Authorization": "Bearer hf_a"}).raise_for_status()
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=120)
    assert (out, err) == ("", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--token", "alice"], "expected NAME=TOKEN"),
        (["--token", "a/../b=x"], "Invalid account name"),
        (["--oauth-client", "x"], "expected ID"),
        (["--trusted-publisher", "{}"], "expected a JSON object"),
    ],
)
def test_bad_options(tmp_path, arguments, message):
    """Exit code 2 and the reason; a secret is not repeated."""
    with _localhub("--data", str(tmp_path), *arguments) as process:
        out, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert message in err
    assert out == ""


def test_port_in_use(hub, tmp_path):
    """Said as an error that names the port, also by the context manager."""
    port = int(hub.url.rpartition(":")[2])
    with pytest.raises(LocalHubError, match=f"cannot listen on 127.0.0.1:{port}"):
        LocalHub(tmp_path, {"alice": "hf_a"}, port=port).start()


def test_tokens_are_not_in_the_process_list(hub):
    """Every user of a machine can read the arguments of every process."""
    with open(f"/proc/{hub.pid}/cmdline", "rb") as file:
        assert b"hf_alice" not in file.read()


def test_restart_keeps_address_and_content(tmp_path):
    """Repositories, large files, tokens."""
    with LocalHub(tmp_path, {"alice": "hf_alice"}) as hub:
        api = HfApi(endpoint=hub.url, token="hf_alice")
        api.create_repo("alice/m")
        api.upload_file(path_or_fileobj=b"\x00" * 5000, path_in_repo="w.bin", repo_id="alice/m")
        url = hub.url
        hub.restart()
        assert hub.url == url
        answer = httpx2.get(f"{url}/alice/m/resolve/main/w.bin", follow_redirects=True)
        assert answer.content == b"\x00" * 5000


def test_another_hub_on_the_same_port_gets_every_chunk(tmp_path):
    """Clients remember what a store has; that of another data folder is another store, whatever its address."""
    content = bytes(range(256)) * 4000
    with LocalHub(tmp_path / "one", {"alice": "hf_alice"}) as hub:
        port = int(hub.url.rpartition(":")[2])
        api = HfApi(endpoint=hub.url, token="hf_alice")
        api.create_repo("alice/m")
        api.upload_file(path_or_fileobj=content, path_in_repo="w.bin", repo_id="alice/m")
    options = ["--wait-for-port=120"]
    with LocalHub(tmp_path / "two", {"alice": "hf_alice"}, port=port, options=options) as hub:
        api.create_repo("alice/m")
        api.upload_file(path_or_fileobj=content, path_in_repo="w.bin", repo_id="alice/m")
        answer = httpx2.get(f"{hub.url}/alice/m/resolve/main/w.bin", follow_redirects=True)
        assert answer.content == content


def test_only_one_of_many_wins_a_parent(alice, repo):
    """Eight commits on the same parent at once: one is in, seven look again."""
    head = alice.model_info(repo).sha

    def commit(number: int) -> bool:
        operation = CommitOperationAdd(f"{number}.txt", b"1")
        try:
            alice.create_commit(repo, [operation], commit_message=str(number), parent_commit=head)
        except HfHubHTTPError as error:
            assert error.response.status_code == 412
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(commit, range(8))) == 1
    assert len(alice.list_repo_commits(repo)) == 2


def test_pull_requests_opened_at_once_have_numbers_of_their_own(alice, bob, repo):
    """Ten at once, each with its ref and commit."""

    def propose(number: int) -> tuple[int, str]:
        operation = CommitOperationAdd(f"{number}.txt", b"1")
        done = bob.create_commit(repo, [operation], commit_message=str(number), create_pr=True)
        return done.pr_num, done.oid

    with ThreadPoolExecutor(10) as pool:
        opened = dict(pool.map(propose, range(10)))
    assert sorted(opened) == list(range(1, 11))
    refs = alice.list_repo_refs(repo, include_pull_requests=True).pull_requests
    assert {int(ref.name): ref.target_commit for ref in refs} == opened


@pytest.mark.parametrize("attempt", range(2))
def test_kill_at_any_moment_leaves_whole_repositories(tmp_path, attempt):
    """kill -9 amid parallel commits: what was answered is there, git is sound, and it goes on."""
    import threading
    import time

    with LocalHub(tmp_path, {"alice": "hf_alice"}) as hub:
        api = HfApi(endpoint=hub.url, token="hf_alice")
        answered: list[tuple[str, str]] = []

        def work(number: int) -> None:
            # Without the client: it would go on asking the dead Hub for half a minute.
            name = f"alice/m{number}"
            headers = {"Authorization": "Bearer hf_alice"}
            with httpx2.Client(base_url=hub.url, headers=headers, timeout=120) as raw:
                try:
                    raw.post("/api/repos/create", json={"name": name})
                    for step in range(1000):
                        lines = [
                            {"key": "header", "value": {"summary": f"c{step}"}},
                            {"key": "file", "value": {"path": f"{step}.txt", "content": "x"}},
                        ]
                        query = "?create_pr=1" if step % 5 == 4 else ""
                        body = "\n".join(map(json.dumps, lines))
                        done = raw.post(f"/api/models/{name}/commit/main{query}", content=body)
                        answered.append((name, done.json()["commitOid"]))
                except httpx2.HTTPError:
                    return

        threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        while len(answered) < 3 + 10 * attempt:
            assert any(thread.is_alive() for thread in threads)
            time.sleep(0.001)
        hub.kill()
        for thread in threads:
            thread.join()
        hub.restart()
        for name, oid in answered[-40:]:
            assert api.model_info(name, revision=oid).sha == oid
        for name in {name for name, _ in answered}:
            bare = tmp_path / "repos" / "models" / f"{name}.git"
            done = subprocess.run(
                ["git", "-C", bare, "fsck", "--no-dangling"], capture_output=True, text=True
            )
            assert (done.returncode, done.stdout) == (0, "")
            for pull in itertools.islice(api.get_repo_discussions(name), 5):
                assert api.get_discussion_details(name, pull.num).diff
            api.create_commit(name, [CommitOperationAdd("after", b"1")], commit_message="after")
