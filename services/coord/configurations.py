"""Snapshots of the cluster for each Envoy, updated after each change."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable

from mesh.cluster.membership import Instance
from mesh.cluster.mirror import Mirror
from mesh.process.tasks import Background
from mesh.process.watched import Watched
from mesh.xds.routes import RouteTable
from mesh.xds.snapshot import EnvoyNode, Snapshot, snapshot
from mesh.xds.tracing import Tracing
from services.coord.cluster import cluster_of
from services.coord.presence import Presence, observe, with_own


class Configurations(Background):
    """Source of snapshots for every Envoy. Follows the cluster during the `async with` block."""

    def __init__(
        self,
        mirror: Mirror,
        table: RouteTable,
        tracing: Tracing | None,
        *,
        settle_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._mirror = mirror
        self._table = table
        self._tracing = tracing
        self._settle_s = settle_s
        self._clock = clock
        self.own: Callable[[], Instance | None] = lambda: None
        """Return the entry of this process, which every configuration contains while it is ready."""
        self._presence: Watched[Presence] = Watched(Presence())

    async def follow(self, node: EnvoyNode) -> AsyncIterator[Snapshot]:
        """Yield the node's snapshot once the cluster is known, and after each change of the snapshot. Never ends."""
        last: Snapshot | None = None
        async for presence in self._presence.follow():
            if not presence.is_known:
                continue
            instances = with_own(presence.instances, self.own())
            new = snapshot(instances, presence.drained, node, self._table, self._tracing)
            if new != last:
                yield new
            last = new

    async def _run(self) -> None:
        while True:
            copy = self._mirror.copy
            now = self._clock()
            self._presence.set(observe(self._presence.value, cluster_of(copy), now, self._settle_s))
            await self._mirror.after(copy, self._presence.value.remaining_s(now))
