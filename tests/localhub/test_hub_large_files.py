"""Large files through xet and through LFS, in processes of their own."""

from __future__ import annotations

import hashlib
import random

import httpx2
import pytest

from localhub.xet import shard, xorb

UPLOAD = """
import os, hashlib
from pathlib import Path
from huggingface_hub import HfApi, hf_hub_download, CommitOperationAdd
api = HfApi()
repo = {repo!r}
Path("big.safetensors").write_bytes(__import__("random").Random(7).randbytes({size}))
content = Path("big.safetensors").read_bytes()
add = CommitOperationAdd("big.safetensors", {source})
api.preupload_lfs_files(repo, [add])
api.create_commit(repo, [add], commit_message="big")
back = hf_hub_download(repo, "big.safetensors", cache_dir="cache")
assert Path(back).read_bytes() == content
info = api.get_paths_info(repo, "big.safetensors")[0]
assert info.lfs.sha256 == hashlib.sha256(content).hexdigest()
print(info.xet_hash)
"""


@pytest.mark.parametrize("source", ['"big.safetensors"', "content"])
def test_xet_up_and_down(client, repo, source, tmp_path, monkeypatch):
    """A file of many chunks, from a path or from memory: the bytes come back, the hash is known."""
    monkeypatch.chdir(tmp_path)
    assert len(client(UPLOAD.format(repo=repo, size=3_000_000, source=source)).strip()) == 64


@pytest.mark.parametrize(
    "size",
    [1_000_000, pytest.param(17_000_000, id="multipart")],
)
def test_lfs_up_and_down(client, repo, size, tmp_path, monkeypatch):
    """Without xet: whole files, and above 16 MiB in parts; no xet hash."""
    monkeypatch.chdir(tmp_path)
    code = UPLOAD.format(repo=repo, size=size, source='"big.safetensors"')
    assert client(code, HF_HUB_DISABLE_XET="1").strip() == "None"


def test_xet_file_read_without_xet(client, alice, repo, tmp_path):
    """What came as chunks is put together for clients that want plain bytes."""
    content = b"".join(hashlib.sha256(bytes([n % 256, n // 256])).digest() * 64 for n in range(700))
    alice.upload_file(path_or_fileobj=content, path_in_repo="w.safetensors", repo_id=repo)
    code = (
        "from huggingface_hub import hf_hub_download; import hashlib, pathlib;"
        f"p = hf_hub_download({repo!r}, 'w.safetensors', cache_dir={str(tmp_path)!r});"
        "print(hashlib.sha256(pathlib.Path(p).read_bytes()).hexdigest())"
    )
    assert client(code, HF_HUB_DISABLE_XET="1").strip() == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("revision", ["main", "refs/pr/1"])
def test_headers_are_read_by_ranges(hub, alice, bob, repo, revision):
    """Safetensors metadata and slices without the rest, on main and on a pull request."""
    import torch
    from huggingface_hub import CommitOperationAdd, HfFileSystem
    from safetensors.torch import save

    content = save({"weight": torch.arange(6.0).reshape(2, 3)})
    operations = [CommitOperationAdd("model.safetensors", content)]
    if revision == "main":
        alice.create_commit(repo, operations, commit_message="c")
    else:
        bob.create_commit(repo, operations, commit_message="c", create_pr=True)
    found = alice.get_safetensors_metadata(repo, revision=revision)
    assert found.files_metadata["model.safetensors"].tensors["weight"].shape == [2, 3]
    system = HfFileSystem(endpoint=hub.url, token="hf_alice", skip_instance_cache=True)
    with system.open(f"{repo}/model.safetensors", "rb", revision=revision) as file:
        file.seek(-24, 2)
        assert file.read() == content[-24:]


@pytest.mark.parametrize("revision", ["main", "refs/pr/1"])
def test_snapshots(client, alice, bob, repo, revision, tmp_path):
    """A whole repository at once, large and small files, with and without xet."""
    from huggingface_hub import CommitOperationAdd

    operations = [
        CommitOperationAdd("w.safetensors", b"\x05w" * 70_000),
        CommitOperationAdd("sub/c.json", b"{}"),
    ]
    bob.create_commit(repo, operations, commit_message="c", create_pr=True)
    if revision == "main":
        alice.merge_pull_request(repo, 1)
    code = f"""
from pathlib import Path
from huggingface_hub import HfApi, snapshot_download
folder = Path(snapshot_download({repo!r}, revision={revision!r}, cache_dir={str(tmp_path)!r} + "/" + {{name!r}}))
assert (folder / "w.safetensors").read_bytes() == b"\\x05w" * 70_000
assert (folder / "sub" / "c.json").read_bytes() == b"{{{{}}}}"
print(folder.name)
"""
    sha = alice.model_info(repo, revision=revision).sha
    assert client(code.format(name="xet")).strip() == sha
    assert client(code.format(name="plain"), HF_HUB_DISABLE_XET="1").strip() == sha


def test_chunks_are_stored_once(hub, client, alice, repo, tmp_path, monkeypatch):
    """A second file that shares nine tenths of its bytes adds about a tenth."""
    monkeypatch.chdir(tmp_path)

    def stored() -> int:
        return sum(path.stat().st_size for path in (hub.data / "xet" / "xorbs").glob("*/*"))

    code = """
import random
from huggingface_hub import HfApi
rng = random.Random({seed})
body = bytearray(random.Random(99).randbytes(8_000_000))
body[:{changed}] = rng.randbytes({changed})
HfApi().upload_file(path_or_fileobj=bytes(body), path_in_repo="f{seed}.safetensors", repo_id={repo!r})
"""
    client(code.format(seed=1, changed=10, repo=repo))
    before = stored()
    client(code.format(seed=2, changed=800_000, repo=repo))
    assert 700_000 < stored() - before < 1_500_000


def test_a_file_that_repeats_parts_of_itself_comes_back_whole(alice, repo, tmp_path):
    """Its terms take overlapping runs of one xorb."""
    parts = [random.Random(seed).randbytes(400_000) for seed in range(3)]
    content = b"".join((*parts, parts[1], parts[0], parts[2][:200_000], parts[1][150_000:], *parts))
    alice.upload_file(path_or_fileobj=content, path_in_repo="again.bin", repo_id=repo)
    path = alice.hf_hub_download(repo, "again.bin", cache_dir=tmp_path)
    with open(path, "rb") as file:
        assert file.read() == content


@pytest.mark.parametrize("private", [False, True])
def test_chunks_of_others_are_not_uploaded_again(hub, client, alice, tmp_path, private):
    """A client with an empty cache finds the chunks of public repositories, and only of those."""
    source = f"alice/chunk-source-{private}".lower()
    seed = int(private) + 50
    code = """
import random
from huggingface_hub import HfApi
body = bytearray(random.Random({seed}).randbytes(4_000_000))
body[2_000_000:2_000_100] = bytes({number} for _ in range(100))
HfApi().upload_file(path_or_fileobj=bytes(body), path_in_repo="w.safetensors", repo_id={repo!r})
"""

    def stored() -> int:
        return sum(path.stat().st_size for path in (hub.data / "xet" / "xorbs").glob("*/*"))

    alice.create_repo(source, private=private)
    client(code.format(seed=seed, number=1, repo=source), HF_XET_CACHE=str(tmp_path / "one"))
    before = stored()
    alice.create_repo(f"{source}-target")
    client(code.format(seed=seed, number=2, repo=f"{source}-target"), HF_XET_CACHE=str(tmp_path / "two"))
    added = stored() - before
    assert added > 3_900_000 if private else added < 500_000


def test_several_processes_at_once(hub, repo, tmp_path, client):
    """Three clients with caches of their own upload side by side; all of it arrives."""
    from concurrent.futures import ThreadPoolExecutor

    def upload(number: int) -> str:
        home = str(tmp_path / str(number))
        code = f"""
import random
from huggingface_hub import HfApi
data = random.Random({number}).randbytes(1_500_000)
HfApi().create_repo("alice/parallel-{number}")
HfApi().upload_file(path_or_fileobj=data, path_in_repo="x.bin", repo_id="alice/parallel-{number}")
"""
        return client(code, HF_HOME=home, HF_XET_CACHE=home + "/xet")

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(upload, range(3)))
    import random

    for number in range(3):
        answer = httpx2.get(f"{hub.url}/alice/parallel-{number}/resolve/main/x.bin", follow_redirects=True)
        assert answer.content == random.Random(number).randbytes(1_500_000)


def test_copy_across_repositories(alice, bob, repo):
    """Nothing is uploaded; the copy has the same content and the source's owner decides who may."""
    from huggingface_hub import CommitOperationAdd, CommitOperationCopy
    from huggingface_hub.errors import RepositoryNotFoundError

    content = b"\x07weights" * 9000
    alice.create_repo("alice/copy-source", private=True)
    files = [CommitOperationAdd("w.safetensors", content), CommitOperationAdd("config.json", b"{}")]
    alice.create_commit("alice/copy-source", files, commit_message="c")

    def copies():
        return [
            CommitOperationCopy(name, f"sub/{name}", src_repo_id="alice/copy-source", src_repo_type="model")
            for name in ("w.safetensors", "config.json")
        ]

    alice.create_commit(repo, copies(), commit_message="copied")
    source = alice.get_paths_info("alice/copy-source", "w.safetensors")[0]
    target = alice.get_paths_info(repo, "sub/w.safetensors")[0]
    assert (target.blob_id, target.xet_hash) == (source.blob_id, source.xet_hash)
    with pytest.raises(RepositoryNotFoundError):
        bob.create_commit(repo, copies(), commit_message="not yours", create_pr=True)


def test_storage_urls_are_signed(hub, alice, repo):
    """Neither a changed hash nor a made-up signature opens anything."""
    alice.upload_file(path_or_fileobj=b"\x00" * 2000, path_in_repo="x.bin", repo_id=repo)
    location = httpx2.head(f"{hub.url}/{repo}/resolve/main/x.bin").headers["location"]
    assert httpx2.get(location).content == b"\x00" * 2000
    assert "localhost" in location
    for changed in (location.replace("get.", "put.", 1), location.replace("/x.bin", "0/x.bin")):
        assert httpx2.get(changed).status_code == 403


def test_xet_tokens_are_needed_and_scoped(hub, alice, nobody, repo):
    """A reading token uploads nothing, and no token reads nothing."""
    read = httpx2.get(f"{hub.url}/api/models/{repo}/xet-read-token/main").json()
    answer = httpx2.post(
        f"{read['casUrl']}/v1/shards",
        content=b"",
        headers={"Authorization": f"Bearer {read['accessToken']}"},
    )
    assert answer.status_code == 401
    assert httpx2.get(f"{read['casUrl']}/v1/reconstructions/{'0' * 64}").status_code == 401
    assert httpx2.get(f"{hub.url}/api/models/{repo}/xet-write-token/main").status_code == 401


def _write_token(hub, repo):
    url = f"{hub.url}/api/models/{repo}/xet-write-token/main"
    return httpx2.get(url, headers={"Authorization": "Bearer hf_alice"}).json()


@pytest.mark.parametrize("content", [b"", b"\x00\x01", b"\x00\xff\xff\xff\x00\x01\x00\x00abc", b"\x09" * 64])
def test_malformed_xorbs_and_shards_are_refused(hub, repo, content):
    """400 with a reason, nothing stored."""
    token = _write_token(hub, repo)
    headers = {"Authorization": f"Bearer {token['accessToken']}"}
    hash = "ab" * 32
    answer = httpx2.post(f"{token['casUrl']}/v1/xorbs/default/{hash}", content=content, headers=headers)
    assert answer.status_code == 400
    assert not (hub.data / "xet" / "xorbs" / "ab" / hash).exists()
    assert httpx2.post(f"{token['casUrl']}/v1/shards", content=content, headers=headers).status_code == 400
    evil = f"{token['casUrl']}/v1/xorbs/default/..%2F..%2Fx"
    assert httpx2.post(evil, content=content, headers=headers).status_code == 400


def test_shard_that_refers_to_missing_chunks(hub, repo):
    """A client whose cache outlived the store's content is told, instead of leaving a broken file."""
    import struct

    token = _write_token(hub, repo)
    last = b"\xff" * 32 + b"\0" * 16
    data = struct.pack("<32sQQ", b"tag", 2, 0)
    data += struct.pack("<32sIIQ", b"f" * 32, 0, 1, 0)
    data += struct.pack("<32sIIII", b"x" * 32, 0, 100, 0, 1)
    data += last + last
    parsed = shard.parse(data)
    assert parsed.files[0].terms[0].length == 100
    answer = httpx2.post(
        f"{token['casUrl']}/v1/shards",
        content=data,
        headers={"Authorization": f"Bearer {token['accessToken']}"},
    )
    assert answer.status_code == 400
    assert "never uploaded" in answer.json()["error"]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 1023, 1024])
def test_byte_grouping_is_undone(size):
    """Scheme 2 stores all bytes at positions 0 mod 4 first, then 1, 2, 3."""
    import lz4.frame

    raw = bytes(n % 251 for n in range(size))
    grouped = b"".join(raw[lane::4] for lane in range(4))
    assert xorb.unpack(lz4.frame.compress(grouped), xorb.Scheme.BYTE_GROUPED_LZ4, size) == raw
