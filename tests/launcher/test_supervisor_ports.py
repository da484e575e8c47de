"""Reserved ports: no other process gets one, and a process of the node can listen there."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from shoal.node import processes
from shoal.node.ports import PortInUse, Ports
from tests.breakable import Process, until


def test_a_port_that_somebody_listens_on_is_in_use() -> None:
    with socket.socket() as sock, Ports() as ports:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        with pytest.raises(PortInUse, match=r"port \d+ of 127.0.0.1 is in use"):
            ports.reserve(sock.getsockname()[1])


def test_a_port_that_another_node_reserved_is_in_use_until_it_gives_it_back() -> None:
    with Ports() as mine:
        with Ports() as others:
            port = others.reserve()
            with pytest.raises(PortInUse):
                mine.reserve(port)
            assert mine.reserve_preferred(port) != port
        assert mine.reserve(port) == port


def test_any_free_port_is_a_different_one_each_time() -> None:
    with Ports() as one, Ports() as two:
        assert len({one.reserve() for _ in range(50)} | {two.reserve() for _ in range(50)}) == 100


def test_a_port_with_connections_that_linger_is_free() -> None:
    """A node that is started again at once gets its port, though the last one's connections are in TIME_WAIT."""
    with socket.socket() as server, Ports() as ports:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        client = socket.create_connection(("127.0.0.1", port))
        accepted, _ = server.accept()
        accepted.close()  # The side that closes first lingers.
        client.close()
        server.close()
        assert ports.reserve(port) == port


@pytest.mark.etcd
async def test_etcd_listens_where_we_hold_the_port(tmp_path: Path) -> None:
    with Ports() as ports:
        part = processes.etcd(tmp_path / "etcd", ports.reserve(), ports.reserve())
        with Process(part.argv, tmp_path / "etcd.log"):
            await until(part.ready, "etcd ready")


@pytest.mark.mongo
async def test_mongod_listens_where_we_hold_the_port(tmp_path: Path) -> None:
    (tmp_path / "db").mkdir()
    with Ports() as ports:
        part = processes.mongod(tmp_path / "db", ports.reserve())
        with Process(part.argv, tmp_path / "mongod.log"):
            await until(part.ready, "mongod ready")
