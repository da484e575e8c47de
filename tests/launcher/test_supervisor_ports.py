"""Reserved ports: no other process gets one, and a process of the node can listen there."""

from __future__ import annotations

import socket

import pytest

from shoal.node.ports import PortInUse, Ports


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
