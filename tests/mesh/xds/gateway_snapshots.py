"""Snapshots of a gateway whose mesh has no instances."""

from __future__ import annotations

from collections.abc import AsyncIterator

from mesh.process.watched import Watched
from mesh.xds.extensions import GatewayAccess, gateway_access
from mesh.xds.snapshot import EnvoyNode, Snapshot, snapshot
from services.coord.traffic import AT_GATEWAY, table


class Source:
    """Snapshots without instances. A call that is admitted finds no instance, and gets UNAVAILABLE."""

    def __init__(self) -> None:
        self.access: Watched[GatewayAccess] = Watched(gateway_access(None, AT_GATEWAY))

    async def follow(self, node: EnvoyNode) -> AsyncIterator[Snapshot]:
        async for one in self.access.follow():
            yield snapshot((), frozenset(), node, table(), None, one)
