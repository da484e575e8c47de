"""Whether calls get through a node's gateway: Envoy has its listeners, its routes, and instances behind each."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from functools import partial

from shoal.node.probes import FRESH, PROBE_S, health

# One call of each service that reads, costs little, and is answered with an empty request: whatever the answer, the
# service gave it.
_CALLS = {
    "coord": "/shoal.coord.v1.CoordService/GetLeader",
    "store": "/shoal.store.v1.StoreService/ListModels",
    "infer": "/inference.GRPCInferenceService/ServerLive",
    "ingest": "/shoal.ingest.v1.IngestService/GetJob",
}
_NOT_THROUGH = ("UNAVAILABLE", "UNIMPLEMENTED", "DEADLINE_EXCEEDED", "UNKNOWN", "INTERNAL")
# What Envoy answers itself without a route or an instance; and answers that are no sign of health.


def probes(gateway: str, services: Sequence[str]) -> dict[str, Callable[[], Awaitable[bool]]]:
    """A probe for each of `services`, by what it is called on the screen; with all of them there, for the whole too."""
    found = {f"{service} through the gateway": partial(gets_through, gateway, _CALLS[service]) for service in services}
    return {**found, "the gateway's health": partial(health, gateway)} if set(services) == set(_CALLS) else {**found}


async def gets_through(gateway: str, method: str) -> bool:
    """Whether a call of `method` is answered by its service."""
    import grpc

    async with grpc.aio.insecure_channel(gateway, options=FRESH) as channel:
        call = channel.unary_unary(method, request_serializer=bytes, response_deserializer=bytes)
        try:
            await call(b"", timeout=PROBE_S)
        except grpc.aio.AioRpcError as err:
            return err.code().name not in _NOT_THROUGH
        return True
