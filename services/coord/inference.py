"""Inference server that the gateway shows: coord responds for all infer instances, where one could not for the others.

    ServerLive, ServerReady   from membership, like health
    ModelStatistics           summed over the node's instances, to which its Envoy sends calls

The other methods of the protocol go to infer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import grpc

from mesh.cluster.membership import Instance, State
from mesh.cluster.mirror import Mirror
from mesh.rpc.access import Access, caller_in
from mesh.rpc.client.channel import Channel
from mesh.rpc.client.failures import CallFailed
from mesh.rpc.interceptors import Context
from mesh.rpc.tenant_scope import Scopes
from mesh.rpc.tenant_turns import TenantTurns
from services.coord.cluster import Cluster, cluster_of
from services.coord.statistics import merged
from shoal.access.caller_header import CALLER_HEADER
from shoal.errors import ResourceExhausted, ShoalError, Unavailable, from_status
from shoal.inference.v2 import inference_pb2 as pb
from shoal.inference.v2 import inference_pb2_grpc as pb_grpc

METHODS = ("ServerLive", "ServerReady", "ModelStatistics")
"""Methods that coord serves."""

REPLICA_S = 5.0
"""Longest wait for the statistics of one instance, whose event loop is never busy for this long."""

MOST_BYTES = 32 << 20
"""Statistics of all instances together, before they are summed: a hundred thousand versions with few batch sizes."""

Metadata = tuple[tuple[str, str], ...]

_AT_ONCE = 2
# Beyond this, parsing and summing would hold the event loop for several milliseconds.
_LONG_BYTES = 16 << 10
_STATISTICS = "/inference.GRPCInferenceService/ModelStatistics"


def is_live(cluster: Cluster) -> bool:
    """Return True when an infer instance runs."""
    return any(cluster.state_of(i) is not State.DRAINING for i in cluster.of_service("infer"))


def is_ready(cluster: Cluster) -> bool:
    """Return True when an infer instance takes traffic, and each awaited model is ready on one of those that do.

    A model is awaited while it may still become ready. A model that cannot be loaded is not.
    """
    instances = [i for i in cluster.of_service("infer") if cluster.state_of(i) is State.READY]
    serving = {model.name for instance in instances for model in instance.models}
    awaited = [instance.awaited for instance in instances if instance.awaited is not None]
    return bool(awaited) and serving.issuperset(name for names in awaited for name in names)


class MeshInference(pb_grpc.GRPCInferenceServiceServicer):
    """Servicer of METHODS. `access` knows the callers; None: each names its tenant."""

    def __init__(self, mirror: Mirror, node: str, access: Access | None = None) -> None:
        self._mirror = mirror
        self._node = node
        self._scopes = Scopes("inference.GRPCInferenceService", access)
        self._turns = TenantTurns(_AT_ONCE)

    async def ServerLive(self, request: pb.ServerLiveRequest, context: Context) -> pb.ServerLiveResponse:
        return pb.ServerLiveResponse(live=is_live(cluster_of(self._mirror.copy)))

    async def ServerReady(self, request: pb.ServerReadyRequest, context: Context) -> pb.ServerReadyResponse:
        return pb.ServerReadyResponse(ready=is_ready(cluster_of(self._mirror.copy)))

    async def ModelStatistics(self, request: pb.ModelStatisticsRequest, context: Context) -> pb.ModelStatisticsResponse:
        instances = [
            instance
            for instance in cluster_of(self._mirror.copy).of_service("infer")
            if instance.node == self._node and instance.state is not State.STARTING
        ]
        caller = caller_in(context)
        # The instances decide by the caller which models the statistics have.
        metadata = () if caller is None else ((CALLER_HEADER, caller.decode("latin-1")),)
        async with self._turns.take(self._scopes.of(context, "ModelStatistics").tenant or ""):
            responses = await _fetch(instances, request.SerializeToString(), metadata)
            size = sum(map(len, responses))
            if size > MOST_BYTES:
                raise ResourceExhausted(f"the statistics have {size} bytes: request those of one model, by its name")
            if size <= _LONG_BYTES:
                return _merged(responses)
            return await asyncio.to_thread(_merged, responses)


def _merged(responses: Sequence[bytes]) -> pb.ModelStatisticsResponse:
    return merged(map(pb.ModelStatisticsResponse.FromString, responses))


async def _fetch(instances: Sequence[Instance], request: bytes, metadata: Metadata) -> list[bytes]:
    """Return the serialized responses of the instances that have the model.

    An instance that has ended is left out: its counts ended with it.

    Raises:
        Unavailable: no instance responds, or one does not in time; sums without its counts would be wrong.
        ShoalError: no instance has the model, or the request is invalid; as the instances say.
    """
    outcomes = await asyncio.gather(*(_fetch_one(instance, request, metadata) for instance in instances))
    found = [outcome for outcome in outcomes if isinstance(outcome, bytes)]
    refused = [outcome for outcome in outcomes if isinstance(outcome, ShoalError)]
    if found:
        return found
    raise refused[0] if refused else Unavailable("no infer instance responds: see `shoal status`")


async def _fetch_one(instance: Instance, request: bytes, metadata: Metadata) -> bytes | ShoalError | None:
    """Return an instance's response, or its refusal; None when it has ended."""
    try:
        async with Channel(instance.address) as channel:
            return await channel.unary(_STATISTICS, request, timeout_s=REPLICA_S, metadata=metadata)
    except CallFailed as err:
        if err.code() is grpc.StatusCode.UNAVAILABLE:
            return None
        if err.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            raise Unavailable(f"{instance.name} gave no statistics within {REPLICA_S:g} s: try again") from err
        return from_status(err.code().value[0], err.details() or "")
