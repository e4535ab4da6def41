"""Other libraries on real processes: they compute what we do, from the same weights, and failing is a row."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import peers
from fastpar.run.launch import launch


@pytest.fixture(scope="module")
def rows() -> dict[str, dict[str, Any]]:
    names = ("fastpar ulysses=N", "diffusers ulysses", "diffusers ring")
    return {row["name"]: row for row in launch(peers.work, peers.Job("flux", "tiny", 2, 2, names), 2)}


def test_both_are_exact_and_we_start_fewer_exchanges(rows: dict[str, dict[str, Any]]) -> None:
    ours, theirs = rows["fastpar ulysses=N"], rows["diffusers ulysses"]
    for row in (ours, theirs):
        assert row["relative error"] < 1e-6 and row["ms"] > 0  # bytes are those of the machine, and tests run beside
    assert theirs["collectives"] == 4 * 2 + 1  # two attentions and the output
    assert ours["collectives"] == 2 + 1 + 1  # with two ranks keys and values are one message; do all hold the same?
    assert rows["one process"]["collectives"] == 0 and rows["one process"]["speedup"] == 1


def test_what_does_not_run_says_why(rows: dict[str, dict[str, Any]]) -> None:
    assert rows["diffusers ring"].keys() == {"name", "error"}
    assert "ValueError" in rows["diffusers ring"]["error"]
    assert "diffusers ring" in peers.table("flux", list(rows.values()))


def test_those_that_patch_others_have_processes_of_their_own() -> None:
    groups = peers.together([])
    assert sum(map(len, groups)) == len(peers.ENTRIES) - 1 and len(groups) == 1 + len(peers.APART)
    assert all(not name.startswith(peers.APART) for name in groups[0])
    assert peers.together(["cache-dit ulysses, compiled"]) == [("cache-dit ulysses, compiled",)]


def test_bytes_are_those_of_the_loopback_device() -> None:
    import socket

    before = peers._loopback()
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as sender:
        there, _ = server.accept()
        sender.sendall(bytes(1 << 20))
        left = 1 << 20
        while left:
            left -= len(there.recv(left))
        there.close()
    assert peers._loopback() - before >= 1 << 20
