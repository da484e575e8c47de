"""Accepts connections at an address for an application, and drains them at the end.

start() ──> connections ... drain(): GOAWAY, last GOAWAY, open streams end ──> closed
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterable

from mesh.h2.connections import Connections
from mesh.h2.server_connection import Memory, ServerConnection
from mesh.h2.stream import Application
from mesh.process import sockets

_BACKLOG = 1024

# Time between two checks of the connections during a drain.
_DRAIN_POLL_S = 0.02

# Longest time between the two GOAWAYs. Streams that a peer opens before it has read the first are served.
_GOAWAY_READ_S = 2.0


class Listener:
    """Serves `app` at `listen`, a unix socket or a TCP address.

    Args:
        share_port: other processes may listen at the same TCP port.
        memory: limits of what the connections may hold.
        connect: returns the protocol of a new connection.
    """

    def __init__(
        self,
        listen: str,
        app: Application,
        *,
        share_port: bool = False,
        memory: Memory | None = None,
        connect: Callable[[Application, Connections, Memory], asyncio.Protocol] = ServerConnection,
    ) -> None:
        self._listen = listen
        self._app = app
        self._share_port = share_port
        self._memory = Memory() if memory is None else memory
        self._connect = connect
        self._connections: Connections = {}

    async def start(self) -> str:
        """Listen. Return the address, with the port that was chosen for port 0.

        Raises:
            OSError: the address cannot be bound.
        """
        loop = asyncio.get_running_loop()

        def connection() -> asyncio.Protocol:
            return self._connect(self._app, self._connections, self._memory)

        sockets.prepare(self._listen)
        if (path := sockets.path_of(self._listen)) is not None:
            self._server = await loop.create_unix_server(connection, str(path), backlog=_BACKLOG)
            return self._listen
        host, _, port = self._listen.rpartition(":")
        self._server = await loop.create_server(
            connection, host.strip("[]"), int(port), backlog=_BACKLOG, reuse_port=self._share_port
        )
        bound: socket.socket = self._server.sockets[0]
        return f"{host}:{bound.getsockname()[1]}"

    def held_by_tenant(self) -> Iterable[tuple[str, int]]:
        """Yield the bytes that open requests of a tenant hold on a connection; "" for those that name none."""
        for connection in self._connections:
            yield from connection.held_by_tenant()

    async def drain(self, drain_s: float, on_poll: Callable[[], object] = lambda: None) -> None:
        """Stop listening, let open streams end for `drain_s`, then close the connections that are left.

        `on_poll` is called at each check meanwhile.
        """
        self._server.close()
        loop = asyncio.get_running_loop()
        until = loop.time() + drain_s
        if goaways := [connection.send_goaway() for connection in tuple(self._connections)]:
            await asyncio.wait(goaways, timeout=min(_GOAWAY_READ_S, drain_s))
        for connection in tuple(self._connections):
            connection.send_last_goaway()
        while self._connections and loop.time() < until:
            await asyncio.sleep(_DRAIN_POLL_S)
            on_poll()
        for connection in tuple(self._connections):
            connection.abort()
        sockets.remove(self._listen)
