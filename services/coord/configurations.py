"""Snapshots of the cluster for each Envoy, updated after each change."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace

from mesh.cluster.membership import Instance
from mesh.cluster.mirror import Mirror
from mesh.process.tasks import Background
from mesh.process.watched import Watched
from mesh.xds.extensions import GatewayAccess
from mesh.xds.routes import RouteTable
from mesh.xds.snapshot import EnvoyNode, Snapshot, snapshot
from mesh.xds.tracing import Tracing
from services.coord.cluster import cluster_of
from services.coord.presence import Presence, observe, with_own


@dataclass(frozen=True)
class _Inputs:
    """Everything that a snapshot follows from."""

    presence: Presence
    access: GatewayAccess | None


class Configurations(Background):
    """Source of snapshots for every Envoy. Follows the cluster during the `async with` block."""

    def __init__(
        self,
        mirror: Mirror,
        table: RouteTable,
        tracing: Tracing | None,
        *,
        settle_s: float,
        access: Watched[GatewayAccess | None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`access` is the gateway's part of the policy, whose value is None while it is not known. Without `access`,
        callers need no authentication."""
        self._mirror = mirror
        self._table = table
        self._tracing = tracing
        self._settle_s = settle_s
        self._clock = clock
        self.own: Callable[[], Instance | None] = lambda: None
        """Return the entry of this process, which every configuration contains while it is ready."""
        self._access = access
        self._inputs = Watched(_Inputs(Presence(), None if access is None else access.value))

    async def follow(self, node: EnvoyNode) -> AsyncIterator[Snapshot]:
        """Yield the node's snapshot once the cluster is known, and after each change of the snapshot. Never ends."""
        last: Snapshot | None = None
        async for inputs in self._inputs.follow():
            presence = inputs.presence
            # Without its part of the policy, a gateway would be open.
            if not presence.is_known or (self._access is not None and inputs.access is None):
                continue
            instances = with_own(presence.instances, self.own())
            lost = [each.instance for each in presence.lost]
            new = snapshot(instances, presence.drained, node, self._table, self._tracing, inputs.access, lost)
            if new != last:
                yield new
            last = new

    def serving(self) -> tuple[Instance, ...]:
        """Return the instances that may serve calls, with those that have lost their leases a moment ago."""
        presence = self._inputs.value.presence
        return with_own((*presence.instances, *(each.instance for each in presence.lost)), self.own())

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._follow_cluster())
            if self._access is not None:
                tasks.create_task(self._follow_access(self._access))

    async def _follow_cluster(self) -> None:
        while True:
            copy = self._mirror.copy
            now = self._clock()
            presence = observe(self._inputs.value.presence, cluster_of(copy), now, self._settle_s)
            self._inputs.set(replace(self._inputs.value, presence=presence))
            await self._mirror.after(copy, presence.remaining_s(now))

    async def _follow_access(self, access: Watched[GatewayAccess | None]) -> None:
        async for value in access.follow():
            self._inputs.set(replace(self._inputs.value, access=value))
