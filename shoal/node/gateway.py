"""Probes of a node's gateway: ready once calls pass through Envoy's listeners and routes to an instance."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from functools import partial

from shoal.node.probes import PROBE_S, bearer, channel_to, health

# One cheap read of each service, which accepts an empty request: any response proves that the service was reached.
_CALLS = {
    "coord": "/shoal.coord.v1.CoordService/GetLeader",
    "store": "/shoal.store.v1.StoreService/ListModels",
    "infer": "/inference.GRPCInferenceService/ServerMetadata",
    "ingest": "/shoal.ingest.v1.IngestService/GetJob",
}
# Statuses that Envoy itself returns without a route or an instance, and statuses that are no sign of health.
_NOT_REACHED = ("UNAVAILABLE", "UNIMPLEMENTED", "DEADLINE_EXCEEDED", "UNKNOWN", "INTERNAL")


def probes(
    gateway: str, services: Sequence[str], *, has_tls: bool = False, token: str = ""
) -> dict[str, Callable[[], Awaitable[bool]]]:
    """Return a probe for each of `services`, by its name on the screen; with all services, also one for the health.

    `token` is for a gateway that authenticates callers.
    """
    found = {
        f"{service} through the gateway": partial(
            reaches_service, gateway, _CALLS[service], has_tls=has_tls, token=token
        )
        for service in services
    }
    if set(services) != set(_CALLS):
        return {**found}
    return {**found, "the gateway's health": partial(health, gateway, has_tls=has_tls, token=token)}


async def reaches_service(gateway: str, method: str, *, has_tls: bool = False, token: str = "") -> bool:
    """Return True when a call of `method` reaches its service."""
    import grpc

    async with channel_to(gateway, has_tls=has_tls) as channel:
        call = channel.unary_unary(method, request_serializer=bytes, response_deserializer=bytes)
        try:
            await call(b"", timeout=PROBE_S, metadata=bearer(token))
        except grpc.aio.AioRpcError as err:
            return err.code().name not in _NOT_REACHED
        return True
