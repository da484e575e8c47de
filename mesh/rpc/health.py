"""grpc.health.v1 of a server: statuses of services are checked once, or watched.

Protocol: grpc's health/v1/health.proto. A watch is an ordinary stream here, so a stop ends it as it ends the others.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping
from types import MappingProxyType
from typing import Any

from grpc_health.v1 import health_pb2 as pb
from grpc_health.v1 import health_pb2_grpc

from mesh.process.watched import Watched
from shoal.errors import NotFound


class Health(health_pb2_grpc.HealthServicer):
    """Statuses of services by name; "" is the server as a whole."""

    def __init__(self) -> None:
        self._statuses: Watched[Mapping[str, int]] = Watched(MappingProxyType({}))

    def set_status(self, services: Iterable[str], *, is_serving: bool) -> None:
        """Set the status of the server as a whole and of each of `services`."""
        status = pb.HealthCheckResponse.SERVING if is_serving else pb.HealthCheckResponse.NOT_SERVING
        self._statuses.set({**self._statuses.value, **dict.fromkeys(["", *services], status)})

    async def Check(self, request: pb.HealthCheckRequest, context: Any) -> pb.HealthCheckResponse:
        status = self._statuses.value.get(request.service)
        if status is None:
            raise NotFound(f"no service is called {request.service!r} here")
        return pb.HealthCheckResponse(status=status)

    async def Watch(self, request: pb.HealthCheckRequest, context: Any) -> AsyncIterator[pb.HealthCheckResponse]:
        """Send the status now and after each change; SERVICE_UNKNOWN for a service that may be added later."""
        last = None
        async for statuses in self._statuses.follow():
            status = statuses.get(request.service, pb.HealthCheckResponse.SERVICE_UNKNOWN)
            if status != last:
                last = status
                yield pb.HealthCheckResponse(status=status)
