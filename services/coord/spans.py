"""Kept spans of all processes of the node, for those who operate it; a tenant's callers get those of their tenant."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import grpc

from mesh.cluster.membership import Instance
from mesh.cluster.mirror import Mirror
from mesh.metrics.spans import IDS, is_valid
from mesh.rpc.access import Access, caller_in
from mesh.rpc.client.channel import Channel
from mesh.rpc.client.failures import CallFailed
from mesh.rpc.interceptors import Context
from mesh.rpc.span_listing import latest
from mesh.rpc.tenant_turns import TenantTurns
from services.coord.cluster import cluster_of
from shoal.access.caller_header import AS_SERVICE
from shoal.access.rpc_groups import GET_SPANS, LIST_SPANS, SPANS_OF_ALL
from shoal.coord.v1 import coord_pb2 as pb
from shoal.errors import InvalidArgument, PermissionDenied, Unauthenticated
from shoal.tenant_header import TENANT_HEADER

PROCESS_S = 5.0
"""Longest wait for the spans of one process."""
# A process sends at most 2 MiB.
_AT_ONCE = 2


def visible_tenant(access: Access | None, context: Context) -> str | None:
    """Return the tenant whose spans the caller of a call may see; None: those of all tenants.

    Without `access`, that is the one that the caller names, if any.

    Raises:
        Unauthenticated, PermissionDenied: the caller may see none.
    """
    if access is None:
        named = dict(context.invocation_metadata() or ()).get(TENANT_HEADER)
        return str(named) if named else None
    caller = caller_in(context)
    verified = access.check(GET_SPANS, caller)
    try:
        access.check(SPANS_OF_ALL, caller)
        return None
    except (PermissionDenied, Unauthenticated):
        if verified is None or not verified.tenant:
            raise
        return verified.tenant


class MeshSpans:
    """Asks the processes of the node of this coord."""

    def __init__(self, mirror: Mirror, node: str) -> None:
        self._mirror = mirror
        self._node = node
        self._turns = TenantTurns(_AT_ONCE)

    async def get(self, request: pb.GetSpansRequest, tenant: str | None) -> pb.GetSpansResponse:
        """Return the spans that a request asks for, of one tenant; None: of all. Raises InvalidArgument."""
        if not is_valid(request.trace, request.job):
            raise InvalidArgument(f"trace, job: {IDS}")
        wanted = pb.ListSpansRequest(trace=request.trace, job=request.job, tenant=tenant).SerializeToString()
        instances = [one for one in cluster_of(self._mirror.copy).instances if one.node == self._node]
        async with self._turns.take(tenant or ""):
            answers = await asyncio.gather(*(_list(instance, wanted) for instance in instances))
            return await asyncio.to_thread(_merged, instances, answers)


def _merged(instances: Sequence[Instance], answers: Sequence[bytes | None]) -> pb.GetSpansResponse:
    listed = [pb.ListSpansResponse.FromString(answer) for answer in answers if answer is not None]
    spans, is_truncated = latest(span for each in listed for span in each.spans)
    silent = [one.name for one, answer in zip(instances, answers, strict=True) if answer is None]
    return pb.GetSpansResponse(
        spans=spans, silent=silent, truncated=is_truncated or any(each.truncated for each in listed)
    )


async def _list(instance: Instance, request: bytes) -> bytes | None:
    """Return the response of a process; None without one."""
    try:
        async with Channel(instance.address) as channel:
            return await channel.unary(LIST_SPANS, request, timeout_s=PROCESS_S, metadata=AS_SERVICE)
    except CallFailed as err:
        # It keeps no spans.
        return b"" if err.code() is grpc.StatusCode.UNIMPLEMENTED else None
