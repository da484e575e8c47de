"""Health service (grpc.health.v1) for the whole mesh: at the gateway, coord responds for every public service.

The name "" is coord itself. It is SERVING while coord accepts calls, with or without etcd, because Envoy's own health
check requests it. A public service is SERVING while at least one of its instances accepts traffic.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any

from grpc_health.v1 import health_pb2, health_pb2_grpc

from mesh.cluster.mirror import Mirror
from mesh.process.watched import Watched
from mesh.rpc.interceptors import Context
from services.coord.cluster import Cluster, LiveCluster
from shoal.errors import NotFound

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


def status_of(name: str, cluster: Cluster, services: Mapping[str, str], is_up: bool) -> int:
    """Return the status of the gRPC service `name`.

    `services` maps each public gRPC service to the service that serves it. `is_up` is True while coord accepts calls.
    """
    if name == "":
        return SERVING if is_up else NOT_SERVING
    if name not in services:
        return SERVICE_UNKNOWN
    return SERVING if cluster.is_ready(services[name]) else NOT_SERVING


class MeshHealth(health_pb2_grpc.HealthServicer):
    """Health servicer that responds from cluster membership."""

    def __init__(self, mirror: Mirror, services: Mapping[str, str]) -> None:
        self._mirror = mirror
        self._services = services
        self._cluster = LiveCluster(mirror)
        self._is_up = Watched(False)
        self._turn = asyncio.Lock()

    def serve(self) -> None:
        """Report coord as SERVING."""
        self._is_up.set(True)

    def leave(self) -> None:
        """Report coord as NOT_SERVING."""
        self._is_up.set(False)

    async def Check(self, request: health_pb2.HealthCheckRequest, ctx: Context) -> health_pb2.HealthCheckResponse:
        status = self._status(request.service)
        if status == SERVICE_UNKNOWN:
            raise NotFound(f"no service {request.service[:100]!r}; there are: {', '.join(self._services)}")
        return health_pb2.HealthCheckResponse(status=status)

    async def List(self, request: Any, ctx: Context) -> Any:
        listed = {name: health_pb2.HealthCheckResponse(status=self._status(name)) for name in ("", *self._services)}
        return health_pb2.HealthListResponse(statuses=listed)  # type: ignore[attr-defined]  # newer than its types

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, ctx: Context
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        last: int | None = None
        async for _ in self._changes(request.service):
            # Thousands may watch, and all are notified at the same time: other calls go on between two of them.
            async with self._turn:
                await asyncio.sleep(0)
            status = self._status(request.service)
            if status != last:
                yield health_pb2.HealthCheckResponse(status=status)
            last = status

    def _changes(self, name: str) -> AsyncIterator[object]:
        return self._is_up.follow() if name == "" else self._mirror.follow()

    def _status(self, name: str) -> int:
        return status_of(name, self._cluster.now, self._services, self._is_up.value)
