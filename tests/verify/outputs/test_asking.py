"""The socket over which the merged model's process asks for weights."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from merge_adapter.verify.outputs.asking import socket_address


@pytest.mark.parametrize("depth", [0, 5])
def test_a_socket_may_lie_however_deep(tmp_path: Path, depth: int) -> None:
    """Folders for temporary files can be deeper than the hundred bytes that an address may have."""
    folder = tmp_path.joinpath(*["d" * 100] * depth)
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket(socket.AF_UNIX) as listening, socket.socket(socket.AF_UNIX) as asking:
        with socket_address(folder / "pager") as short:
            listening.bind(short)
        listening.listen(1)
        assert (folder / "pager").is_socket()
        with socket_address(folder / "pager") as short:
            asking.connect(short)
        asking.sendall(b"weights")
        with listening.accept()[0] as client:
            assert client.recv(16) == b"weights"
