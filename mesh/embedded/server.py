"""The twin of mesh.server.GrpcServer, for a service that runs inside Envoy.

STARTING ──serve()──> SERVING ──exit──> DRAINING (health NOT_SERVING, Envoy says goodbye on its connections,
                                        calls in flight finish) ──> STOPPED: the process ends
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from types import TracebackType

from mesh.asgi.app import GrpcApp
from mesh.asgi.exchange import ShortHandler
from mesh.asgi.methods import methods_of
from mesh.embedded import admin
from mesh.server import IDLE_STREAM_S, Rpc, Served
from mesh.tasks import end

log = logging.getLogger(__name__)

_TURN_S = 0.02


class EmbeddedServer:
    """Serves `rpcs` through `app` for as long as the block lasts. Use as `async with`, as GrpcServer.

    Args:
        listen: where Envoy listens; it was told at its start.
        short: methods that are answered on the short way, by path.
        admin_path: the unix socket of Envoy's admin endpoint.
    """

    def __init__(
        self,
        app: GrpcApp,
        listen: str,
        rpcs: Sequence[Rpc],
        *,
        drain_ms: int,
        short: Mapping[str, ShortHandler],
        admin_path: str | None,
    ) -> None:
        self._app = app
        self._served = Served(rpcs)
        self._drain_s = drain_ms / 1000
        self._short = dict(short)
        self._admin_path = admin_path
        self.address = listen

    async def __aenter__(self) -> EmbeddedServer:
        self._app.methods, self._app.short = methods_of(self._served), self._short
        self._sweep = asyncio.create_task(self._app.sweep(), name="sweep")
        self._app.is_open.set()
        return self

    async def serve(self) -> None:
        """Says SERVING to health checks: for the server as a whole and for each of its services."""
        self._served.say(is_serving=True)

    async def __aexit__(
        self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._served.say(is_serving=False)
        loop = asyncio.get_running_loop()
        until = loop.time() + self._drain_s
        if self._admin_path is not None:
            # With their next answer the connections hear a goodbye; and nobody comes back through a new one.
            await admin.post(self._admin_path, "/drain_listeners?graceful&skip_exit")
            await admin.post(self._admin_path, "/drain_listeners")
        quiet_since = loop.time()
        while loop.time() < until:
            if self._app.exchanges or self._app.calls:
                quiet_since = loop.time()
                self._served.end_idle_streams()
            elif loop.time() - quiet_since >= IDLE_STREAM_S:
                break  # Who was told goodbye has gone elsewhere.
            await asyncio.sleep(_TURN_S)
        if left := len(self._app.exchanges) + len(self._app.calls):
            log.warning("%d calls were still in flight after %.1f s of drain", left, self._drain_s)
        await end(self._sweep)
