"""The twin of mesh.server.GrpcServer, for a service that runs inside Envoy.

STARTING ──serve()──> SERVING ──exit──> DRAINING (health NOT_SERVING, Envoy says goodbye on its connections,
                                        calls in flight finish) ──> STOPPED: the process ends
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from types import TracebackType

from grpc_health.v1 import health_pb2

from mesh.embedded import admin
from mesh.embedded.app import GrpcApp
from mesh.embedded.exchange import ShortHandler
from mesh.embedded.methods import Methods
from mesh.health import Health
from mesh.interceptors import ServerInterceptor
from mesh.server import Rpc, add_services
from mesh.tasks import end

log = logging.getLogger(__name__)

_IDLE_STREAM_S = 0.25
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
        self._rpcs = tuple(rpcs)
        self._drain_s = drain_ms / 1000
        self._short = dict(short)
        self._admin_path = admin_path
        self._names = [rpc.descriptor.full_name for rpc in self._rpcs]
        self._health = Health()
        self._interceptor = ServerInterceptor()
        self.address = listen

    async def __aenter__(self) -> EmbeddedServer:
        methods = Methods(self._interceptor.wrap)
        add_services(methods, self._rpcs, self._health)
        await self._say(health_pb2.HealthCheckResponse.NOT_SERVING)
        self._app.methods, self._app.short = methods.by_path, self._short
        self._sweep = asyncio.create_task(self._app.sweep(), name="sweep")
        self._app.is_open.set()
        return self

    async def serve(self) -> None:
        """Says SERVING to health checks: for the server as a whole and for each of its services."""
        await self._say(health_pb2.HealthCheckResponse.SERVING)

    async def __aexit__(
        self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self._say(health_pb2.HealthCheckResponse.NOT_SERVING)
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
                self._interceptor.end_idle_streams(_IDLE_STREAM_S)
            elif loop.time() - quiet_since >= _IDLE_STREAM_S:
                break  # Who was told goodbye has gone elsewhere.
            await asyncio.sleep(_TURN_S)
        if left := len(self._app.exchanges) + len(self._app.calls):
            log.warning("%d calls were still in flight after %.1f s of drain", left, self._drain_s)
        await end(self._sweep)

    async def _say(self, status: int) -> None:
        for name in ["", *self._names]:
            await self._health.set(name, status)
