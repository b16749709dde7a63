"""The proxy that breaks things, against the real client."""

from __future__ import annotations

import subprocess
import sys
import time

import httpx2
import pytest
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError

from localhub.faults import (
    Answer,
    Cut,
    CutRequest,
    Delay,
    ExpiredToken,
    FaultProxy,
    Line,
    LoseAnswer,
    Rule,
    Throttle,
    parse_rule,
)


@pytest.fixture
def proxy(hub):
    with FaultProxy(hub.url) as running:
        yield running


@pytest.fixture
def behind(proxy):
    """Alice's client, through the proxy."""
    return HfApi(endpoint=proxy.url, token="hf_alice")


def _commit(api, repo, content=b"1"):
    return api.create_commit(repo, [CommitOperationAdd("a.txt", content)], commit_message="c")


def test_without_rules_it_is_not_there(behind, proxy, repo, tmp_path):
    """Uploads through xet, downloads, redirects: all of it goes through the proxy."""
    content = b"\x01\x02\x03" * 100_000
    url = behind.upload_file(path_or_fileobj=content, path_in_repo="w.bin", repo_id=repo)
    assert url.startswith(proxy.url)
    path = behind.hf_hub_download(repo, "w.bin", cache_dir=tmp_path)
    with open(path, "rb") as file:
        assert file.read() == content
    targets = [seen.target for seen in proxy.seen]
    assert any("/v1/xorbs" in target for target in targets)
    assert any("/v1/reconstructions" in target for target in targets)


def test_whoever_has_an_answer_finds_its_request(alice, proxy, repo):
    """Small and large answers, without a body, refused and cut: noted before the client can know the end."""
    alice.upload_file(path_or_fileobj=b"t" * 50_000, path_in_repo="t.txt", repo_id=repo)
    proxy.add(Rule(Answer(503), path="refused"))
    proxy.add(Rule(Cut(after=10), path="cut"))
    asked = []
    with httpx2.Client(base_url=proxy.url) as client:
        for _ in range(30):
            for method, path, status in [
                ("GET", f"/api/models/{repo}", 200),
                ("GET", f"/{repo}/resolve/main/t.txt", 200),
                ("HEAD", f"/{repo}/resolve/main/t.txt", 200),
                ("GET", "/refused", 503),
                ("GET", f"/{repo}/resolve/main/t.txt?cut", None),
            ]:
                try:
                    assert client.request(method, path).status_code == status
                except httpx2.RemoteProtocolError:
                    assert status is None
                asked.append((method, path, status))
                assert [(one.method, one.target, one.status) for one in proxy.seen] == asked


def test_rate_limit_with_retry_after(behind, proxy, repo):
    """The client waits as long as it is told, and goes on."""
    rule = proxy.add(Rule(Answer(429, retry_after=1), path="/preupload/", times=1))
    start = time.monotonic()
    _commit(behind, repo)
    assert rule.struck == 1
    assert time.monotonic() - start >= 1


def test_server_error_on_the_commit_is_raised(behind, alice, proxy, repo):
    """The commit POST is not repeated by the client."""
    proxy.add(Rule(Answer(503), method="POST", path="/commit/", times=1))
    with pytest.raises(HfHubHTTPError, match="503"):
        _commit(behind, repo)
    assert len(alice.list_repo_commits(repo)) == 1
    _commit(behind, repo)


def test_lost_answer_leaves_a_commit_behind(behind, alice, proxy, repo):
    """The work is done, the client sees a broken connection."""
    proxy.add(Rule(LoseAnswer(), method="POST", path="/commit/", times=1))
    with pytest.raises(httpx2.RemoteProtocolError):
        _commit(behind, repo)
    assert len(alice.list_repo_commits(repo)) == 2


def test_cut_before_and_amid(hub, behind, alice, proxy, repo):
    """Before the Hub hears of it, or in the middle of a body."""
    proxy.add(Rule(CutRequest(), method="POST", path="/commit/", times=1))
    with pytest.raises(httpx2.RemoteProtocolError):
        _commit(behind, repo)
    assert len(alice.list_repo_commits(repo)) == 1
    alice.upload_file(path_or_fileobj=b"t" * 50_000, path_in_repo="t.txt", repo_id=repo)
    proxy.add(Rule(Cut(after=1000), path="/resolve/", times=1))
    with pytest.raises(httpx2.RemoteProtocolError):
        httpx2.get(f"{proxy.url}/{repo}/resolve/main/t.txt")
    assert len(httpx2.get(f"{proxy.url}/{repo}/resolve/main/t.txt").content) == 50_000


def test_expired_token(behind, proxy, repo):
    """After some requests the token is worth nothing."""
    proxy.add(Rule(ExpiredToken(), path="/api/", skip=1))
    behind.model_info(repo)
    with pytest.raises(HfHubHTTPError, match="Invalid credentials"):
        behind.model_info(repo)


def test_slow_answers(alice, proxy, repo):
    """A pause before, and a narrow pipe."""
    alice.upload_file(path_or_fileobj=b"t" * 40_000, path_in_repo="t.txt", repo_id=repo)
    proxy.add(Rule(Delay(0.3), path="/api/models", times=1))
    proxy.add(Rule(Throttle(100_000), path="/resolve/", times=1))
    start = time.monotonic()
    httpx2.get(f"{proxy.url}/api/models/{repo}")
    assert time.monotonic() - start >= 0.3
    start = time.monotonic()
    assert len(httpx2.get(f"{proxy.url}/{repo}/resolve/main/t.txt").content) == 40_000
    assert time.monotonic() - start >= 0.3


def test_command_line(hub, repo):
    """The same as a process, with rules as JSON."""
    rule = '{"fault": "answer", "status": 500, "path": "whoami"}'
    command = [sys.executable, "-m", "localhub.faults", "--upstream", hub.url, "--rule", rule]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            url = process.stdout.readline().strip()
            assert httpx2.get(f"{url}/api/whoami-v2").status_code == 500
            assert httpx2.get(f"{url}/api/models/{repo}").status_code == 200
        finally:
            process.terminate()


@pytest.mark.parametrize("text", ['{"fault": "no"}', '{"fault": "cut", "odd": 1}', "{"])
def test_rules_that_are_none(text):
    """Said at once."""
    with pytest.raises(ValueError, match=r"fault|Expecting"):
        parse_rule(text)


def test_a_limited_line_still_carries_everything(hub, repo, tmp_path):
    """Both ways, through xet; what passed is counted."""
    content = bytes(range(256)) * 800
    with FaultProxy(hub.url, download=2e6, upload=2e6) as proxy:
        api = HfApi(endpoint=proxy.url, token="hf_alice")
        api.upload_file(path_or_fileobj=content, path_in_repo="l.bin", repo_id=repo)
        path = api.hf_hub_download(repo, "l.bin", cache_dir=tmp_path)
        with open(path, "rb") as file:
            assert file.read() == content
        assert proxy.up.bytes > 0
        assert proxy.down.bytes > 0


def test_a_line_lets_no_more_through_than_its_rate():
    """Whoever carries waits for the bytes of those before it."""
    line = Line(1e6)
    began = time.monotonic()
    for _ in range(5):
        line.carry(20_000)
    assert time.monotonic() - began >= 0.09
