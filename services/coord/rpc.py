"""gRPC servicer of shoal.coord.v1: translates messages, without logic."""

from __future__ import annotations

import asyncio
import functools
import math
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing

import grpc

from mesh.rpc.access import caller_in
from mesh.rpc.cluster_access import PolicyWatch
from mesh.rpc.interceptors import Context
from mesh.rpc.tenant_scope import Scopes
from mesh.xds.ads import AdsServer
from services.coord.access_rpc import AccessParts
from services.coord.history import FIELDS
from services.coord.instances import Instances
from services.coord.leader_channel import FAILED, LeaderChannel
from services.coord.messages import (
    envoy_message,
    history_message,
    instance_message,
    instance_messages,
    leader_message,
)
from services.coord.sampling import Sampling
from services.coord.spans import MeshSpans, visible_tenant
from shoal.access.caller_header import AS_SERVICE
from shoal.coord.v1 import coord_pb2 as pb
from shoal.coord.v1 import coord_pb2_grpc as pb_grpc
from shoal.errors import InvalidArgument, Unavailable

# Less than a client's own timeout of 5 s: it is told that the leader does not answer.
_FORWARD_S = 4.0


class CoordRpc(pb_grpc.CoordServiceServicer):
    """Servicer of CoordService."""

    def __init__(
        self,
        name: str,
        instances: Instances,
        ads: AdsServer,
        spans: MeshSpans,
        watch: PolicyWatch | None = None,
        parts: AccessParts | None = None,
        *,
        leader: LeaderChannel,
        sampling: Sampling,
    ) -> None:
        self._name = name
        self._instances = instances
        self._ads = ads
        self._watch = watch
        self._scopes = Scopes("shoal.coord.v1.CoordService", None if watch is None else watch.access)
        self._parts = parts
        self._spans = spans
        self._leader = leader
        self._sampling = sampling

    async def ListInstances(self, request: pb.ListInstancesRequest, ctx: Context) -> pb.ListInstancesResponse:
        cluster = self._instances.cluster
        found = instance_messages(cluster, request.service, self._may_see(ctx, "ListInstances"))
        return pb.ListInstancesResponse(instances=found, revision=cluster.revision, stale=cluster.stale)

    async def WatchInstances(
        self, request: pb.WatchInstancesRequest, ctx: Context
    ) -> AsyncIterator[pb.WatchInstancesResponse]:
        scope = self._scopes.of(ctx, "WatchInstances")
        async with aclosing(self._instances.watch(request.service, scope.tenant)) as clusters:
            async for cluster in clusters:
                # Instances have the same models: each is decided about once.
                may_see = functools.cache(self._may_see(ctx, "WatchInstances"))
                found = instance_messages(cluster, request.service, may_see)
                yield pb.WatchInstancesResponse(instances=found, revision=cluster.revision, stale=cluster.stale)
                del found, cluster

    def _may_see(self, ctx: Context, method: str) -> Callable[[str], bool]:
        """Return a function that returns True for the models that the caller may see."""
        if self._watch is None:
            return lambda model: True
        access, caller = self._watch.access, caller_in(ctx)
        return lambda model: access.allows(f"/shoal.coord.v1.CoordService/{method}", caller, model)

    async def GetLeader(self, request: pb.GetLeaderRequest, ctx: Context) -> pb.GetLeaderResponse:
        return leader_message(self._instances.leader())

    async def DrainInstance(self, request: pb.DrainInstanceRequest, ctx: Context) -> pb.DrainInstanceResponse:
        cluster, instance = await self._instances.drain(request.name)
        return pb.DrainInstanceResponse(instance=instance_message(instance, cluster))

    async def UndrainInstance(self, request: pb.UndrainInstanceRequest, ctx: Context) -> pb.UndrainInstanceResponse:
        cluster, instance = await self._instances.undrain(request.name)
        return pb.UndrainInstanceResponse(instance=instance_message(instance, cluster))

    async def GetMeshStatus(self, request: pb.GetMeshStatusRequest, ctx: Context) -> pb.GetMeshStatusResponse:
        envoys = [envoy_message(envoy) for envoy in self._ads.status()]
        return pb.GetMeshStatusResponse(
            envoys=envoys,
            coord=self._name,
            policy_version=0 if self._watch is None else self._watch.in_force.value.version,
            master_key="" if self._parts is None else self._parts.keys.keyring.source,
        )

    async def GetSpans(self, request: pb.GetSpansRequest, ctx: Context) -> pb.GetSpansResponse:
        access = None if self._watch is None else self._watch.access
        return await self._spans.get(request, visible_tenant(access, ctx))

    async def GetHistory(self, request: pb.GetHistoryRequest, ctx: Context) -> pb.GetHistoryResponse:
        by = request.by or "model"
        if by not in FIELDS:
            raise InvalidArgument(f"by {by[:100]!r}: expected {', '.join(FIELDS)}")
        if not 0 <= request.seconds < math.inf:
            raise InvalidArgument(f"seconds {request.seconds:g}: expected a time before now")
        if not request.forwarded and (leader := await self._leader.get()) is not None:
            response: pb.GetHistoryResponse
            forwarded = pb.GetHistoryRequest(by=by, seconds=request.seconds, points=request.points, forwarded=True)
            stub = pb_grpc.CoordServiceStub(leader)
            try:
                response = await stub.GetHistory(forwarded, timeout=_FORWARD_S, metadata=AS_SERVICE)
            except FAILED as err:
                why = err.details() if isinstance(err, grpc.aio.AioRpcError) else err
                raise Unavailable(f"the leading coord does not answer: {why}") from err
        else:
            report = await self._sampling.report(by, request.seconds, request.points)
            # The most points take some 40 ms.
            response = await asyncio.to_thread(history_message, self._name, report)
        if by == "model":
            may_see = self._may_see(ctx, "GetHistory")
            seen = [row for row in response.rows if may_see(row.name.rpartition(" ")[0])]
            del response.rows[:]
            response.rows.extend(seen)
        return response
