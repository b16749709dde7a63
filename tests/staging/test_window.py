"""A folder whose files have their full size and take the space of what is in use."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import pytest
from safetensors import safe_open

from merge_adapter.checkpoint.folder import Folder
from merge_adapter.checkpoint.layout import find_layout
from merge_adapter.errors import HubError, MalformedError, StorageError
from merge_adapter.staging.paging import HerePager, Resident
from merge_adapter.staging.window import Window, check_sparse, disk_use, sparse_file
from merge_adapter.verify.memory.places import Place, Places, same_in


@pytest.fixture
def window(sharded_base: Path, tmp_path: Path) -> Window:
    folder = tmp_path / "window"
    folder.mkdir()
    source = Folder(sharded_base)
    hashes = {path.name: sha256(path.read_bytes()).hexdigest() for path in sharded_base.glob("*.safetensors")}
    return Window(source, find_layout(source), folder, hashes=hashes)


def shard(number: int) -> str:
    return f"model-0000{number}-of-00008.safetensors"


def test_it_begins_with_headers_at_full_size(window: Window, sharded_base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "window"
    sizes = {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}
    assert sizes == {path.name: path.stat().st_size for path in sharded_base.glob("*.safetensors")}
    assert disk_use([folder]) < sum(sizes.values()) / 10
    with safe_open(folder / shard(2), framework="pt") as here:  # type: ignore[no-untyped-call]
        name = here.keys()[0]
        assert not here.get_tensor(name).any()


def test_fetched_data_shows_in_what_is_mapped_already_and_goes_again(
    window: Window, sharded_base: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "window"
    with (
        safe_open(folder / shard(2), framework="pt") as here,  # type: ignore[no-untyped-call]
        safe_open(sharded_base / shard(2), framework="pt") as there,  # type: ignore[no-untyped-call]
    ):
        name = max(here.keys(), key=lambda key: here.get_tensor(key).numel())
        mapped, expected = here.get_tensor(name), there.get_tensor(name)
        empty = disk_use([folder])
        advanced: list[int] = []
        window.fetch(shard(2), advance=advanced.append)
        assert (folder / shard(2)).read_bytes() == (sharded_base / shard(2)).read_bytes()
        assert mapped.equal(expected)
        assert sum(advanced) <= (folder / shard(2)).stat().st_size
        window.drop(shard(2))
        assert not mapped.any()
        assert disk_use([folder]) <= empty


def test_content_that_is_not_what_the_repository_states_is_refused(
    sharded_base: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "window"
    folder.mkdir()
    source = Folder(sharded_base)
    window = Window(source, find_layout(source), folder, hashes={shard(3): "0" * 64})
    with pytest.raises(MalformedError, match="arrived with sha256"):
        window.fetch(shard(3))


def test_a_fetch_can_be_stopped_between_blocks(window: Window) -> None:
    def stop() -> None:
        raise HubError("stopped")

    with pytest.raises(HubError, match="stopped"):
        window.fetch(shard(1), check=stop)


def test_a_file_system_without_sparse_files_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_sparse(tmp_path)

    def written(place: Path, head: bytes, size: int) -> None:
        place.write_bytes(head + bytes(size - len(head)))

    monkeypatch.setattr("merge_adapter.staging.window.sparse_file", written)
    with pytest.raises(StorageError, match="keeps no sparse files"):
        check_sparse(tmp_path)


def test_a_sparse_file_holds_its_beginning(tmp_path: Path) -> None:
    sparse_file(tmp_path / "deep" / "file", b"head", 1 << 20)
    content = (tmp_path / "deep" / "file").read_bytes()
    assert content[:4] == b"head"
    assert content[4:] == bytes((1 << 20) - 4)


# ------------------------------------------------------------------------------------------------ paging


def test_weights_come_when_needed_and_stay_within_the_limit(
    window: Window, sharded_base: Path, tmp_path: Path
) -> None:
    """Every tensor of every shard, one after another, through room for the largest alone."""
    folder = tmp_path / "window"
    empty = disk_use([folder])
    limit = 800_000
    resident, pager = Resident({folder: window}, limit), HerePager()
    with pager.bringing(resident):
        for number in range(1, 9):
            with (
                safe_open(folder / shard(number), framework="pt") as here,  # type: ignore[no-untyped-call]
                safe_open(sharded_base / shard(number), framework="pt") as there,  # type: ignore[no-untyped-call]
            ):
                for name in here.keys():  # noqa: SIM118 - not a mapping
                    mapped = here.get_tensor(name)
                    pager.need(mapped)
                    assert mapped.equal(there.get_tensor(name))
                    assert disk_use([folder]) - empty <= limit
    assert disk_use([folder]) <= empty
    assert resident.bytes_fetched > 2_000_000


def test_a_tensor_larger_than_the_limit_is_refused(window: Window, tmp_path: Path) -> None:
    folder = tmp_path / "window"
    resident = Resident({folder: window}, 100_000)
    with pytest.raises(StorageError, match="one tensor of model-00001"):
        resident.need(folder.resolve(), Place(shard(1), 1000, 500_000))


def test_tensors_that_no_file_holds_are_left_alone(window: Window, tmp_path: Path) -> None:
    import torch

    pager = HerePager()
    with pager.bringing(Resident({tmp_path / "window": window}, 1_000_000)):
        pager.need(torch.ones(3))


def test_a_tensor_is_found_in_its_file_and_in_another_of_the_same_layout(
    window: Window, sharded_base: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "window"
    with (
        safe_open(folder / shard(4), framework="pt") as here,  # type: ignore[no-untyped-call]
        safe_open(sharded_base / shard(4), framework="pt") as there,  # type: ignore[no-untyped-call]
    ):
        places = Places(folder)
        for name in here.keys():  # noqa: SIM118 - not a mapping
            place = places.find(here.get_tensor(name))
            assert place is not None
            assert place.file == shard(4)
            other = same_in(sharded_base / shard(4), place, here.get_tensor(name))
            assert other.equal(there.get_tensor(name))
        matrix = next(one for one in map(here.get_tensor, here.keys()) if one.ndim == 2)
        place = places.find(matrix.T[1:])
        assert place is not None
        turned = same_in(sharded_base / shard(4), place, matrix.T[1:])
        assert turned.shape == matrix.T[1:].shape
    assert Places(tmp_path).find(turned.clone()) is None
