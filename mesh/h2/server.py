"""The twin of mesh.server.GrpcServer over mesh.h2: for the hop behind Envoy, which has checked what comes.

STARTING ──serve()──> SERVING ──exit──> DRAINING (health NOT_SERVING, GOAWAY, calls in flight finish) ──> STOPPED
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Mapping, Sequence
from types import TracebackType

from mesh import sockets
from mesh.asgi.app import GrpcApp
from mesh.asgi.exchange import ShortHandler
from mesh.asgi.methods import methods_of
from mesh.h2.connection import Connection
from mesh.limits import MESSAGE_BYTES
from mesh.server import Rpc, Served
from mesh.tasks import end

log = logging.getLogger(__name__)

_BACKLOG = 1024
_TURN_S = 0.02
_NOTICE_S = 2.0
# Longest between the two goodbyes: what a peer sends before it has read the first is served.


class H2Server:
    """Serves `rpcs` at `listen` for as long as the block lasts. Use as `async with`, as GrpcServer.

    Args:
        short: methods that are answered on the short way, by path.
        share_port: other processes may listen at the same TCP port.

    Raises (on entering):
        OSError: the address cannot be bound.
    """

    def __init__(
        self,
        listen: str,
        rpcs: Sequence[Rpc],
        *,
        drain_ms: int,
        short: Mapping[str, ShortHandler],
        share_port: bool = False,
    ) -> None:
        self._listen = listen
        self._served = Served(rpcs)
        self._drain_s = drain_ms / 1000
        self._short = dict(short)
        self._share_port = share_port
        self._connections: set[Connection] = set()
        self.address = listen
        """Where it really listens: with port 0, the port that was free."""

    async def __aenter__(self) -> H2Server:
        self._app = app = GrpcApp(MESSAGE_BYTES)
        app.methods, app.short = methods_of(self._served), self._short
        self._server = await self._bound()
        self._sweep = asyncio.create_task(app.sweep(), name="sweep")
        return self

    async def _bound(self) -> asyncio.Server:
        loop = asyncio.get_running_loop()

        def connection() -> Connection:
            return Connection(self._app, self._connections)

        sockets.make_way(self._listen)
        if (path := sockets.path_of(self._listen)) is not None:
            return await loop.create_unix_server(connection, str(path), backlog=_BACKLOG)
        host, _, port = self._listen.rpartition(":")
        server = await loop.create_server(
            connection, host.strip("[]"), int(port), backlog=_BACKLOG, reuse_port=self._share_port
        )
        bound: socket.socket = server.sockets[0]
        self.address = f"{host}:{bound.getsockname()[1]}"
        return server

    async def serve(self) -> None:
        """Says SERVING to health checks: for the server as a whole and for each of its services."""
        self._served.say(is_serving=True)

    async def __aexit__(
        self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._served.say(is_serving=False)
        self._server.close()
        loop = asyncio.get_running_loop()
        until = loop.time() + self._drain_s
        if heard := [connection.goodbye() for connection in tuple(self._connections)]:
            await asyncio.wait(heard, timeout=min(_NOTICE_S, self._drain_s))
        for connection in tuple(self._connections):
            connection.last_goodbye()
        while self._connections and loop.time() < until:
            await asyncio.sleep(_TURN_S)
            self._served.end_idle_streams()
        for connection in tuple(self._connections):
            connection.abort()
        await end(self._sweep)
        sockets.remove(self._listen)
