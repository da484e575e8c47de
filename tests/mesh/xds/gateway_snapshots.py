"""Snapshots of a gateway whose mesh has no instances that respond."""

from __future__ import annotations

from collections.abc import AsyncIterator

from mesh.cluster.membership import Instance
from mesh.process.watched import Watched
from mesh.xds.extensions import GatewayAccess, gateway_access
from mesh.xds.snapshot import EnvoyNode, Snapshot, snapshot
from services.coord.traffic import AT_GATEWAY, table


class Source:
    """Snapshots without instances, or with some that do not respond. A call that is admitted gets UNAVAILABLE."""

    def __init__(self, instances: tuple[Instance, ...] = ()) -> None:
        self.instances = instances
        self.access: Watched[GatewayAccess] = Watched(gateway_access(None, AT_GATEWAY))

    async def follow(self, node: EnvoyNode) -> AsyncIterator[Snapshot]:
        async for one in self.access.follow():
            yield snapshot(self.instances, frozenset(), node, table(), None, one)
