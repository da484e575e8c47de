"""Operations for operators: list and watch instances, get the leader, drain and undrain."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import replace

from mesh.cluster.election import Leader
from mesh.cluster.etcd import Etcd
from mesh.cluster.membership import Instance
from mesh.cluster.mirror import Mirror
from mesh.rpc.places import Places
from services.coord.cluster import Cluster, LiveCluster, cluster_of
from services.coord.drains import encode, key_of, mark_of, resolve
from shoal.errors import Unavailable

_CATCH_UP_S = 2.0
# Each watcher works on each change, for 10 ms with hundreds of models.
_MAX_WATCHES = 100


class Instances:
    """Reads and drains of instances for operators. Reads use the live copy; writes go to etcd."""

    def __init__(self, etcd: Etcd, mirror: Mirror) -> None:
        self._etcd = etcd
        self._mirror = mirror
        self._cluster = LiveCluster(mirror)
        self._places = Places(_MAX_WATCHES, "watches")
        self._turn = asyncio.Lock()

    @property
    def cluster(self) -> Cluster:
        """Latest view of the cluster."""
        return self._cluster.now

    async def watch(self, service: str, tenant: str | None = None) -> AsyncGenerator[Cluster, None]:
        """Yield the current view, and again after each change of `service`; an empty name watches all services.

        Raises:
            ResourceExhausted: too many watches.
        """
        last: tuple[object, ...] | None = None
        with self._places.take(tenant):
            async for copy in self._mirror.follow():
                # All watchers are notified at the same time: other calls go on between two of them.
                async with self._turn:
                    await asyncio.sleep(0)
                    cluster = self._cluster.of(copy)
                    shown = cluster.of_service(service)
                    now = (shown, frozenset(i.name for i in shown) & cluster.drained, cluster.stale)
                is_new = now != last
                last = now
                if is_new:
                    yield replace(cluster, instances=shown)

    def leader(self) -> Leader:
        """Return the current leader.

        Raises:
            Unavailable: there is no leader, or etcd is unreachable.
        """
        cluster = self.cluster
        if cluster.stale:
            raise Unavailable("etcd cannot be reached: the leader is unknown; traffic continues without etcd")
        if cluster.leader is None:
            raise Unavailable("there is no leader at present: an election is in progress, retry in a moment")
        return cluster.leader

    async def drain(self, name: str) -> tuple[Cluster, Instance]:
        """Take an instance out of traffic. Return the view after the change, and the instance.

        Raises:
            NotFound, InvalidArgument: see `resolve`.
            Unavailable: etcd cannot be reached.
        """
        instance = resolve(name, self.cluster.instances)
        mark = mark_of(instance)
        return await self._after_write(await self._etcd.put(mark.key, encode(mark))), instance

    async def undrain(self, name: str) -> tuple[Cluster, Instance]:
        """Return an instance to traffic; no error when it was not drained. Raises as `drain`."""
        instance = resolve(name, self.cluster.instances)
        cluster = self.cluster
        if await self._etcd.delete(key_of(instance.name)):
            cluster = await self._after_delete(key_of(instance.name))
        return cluster, instance

    async def _after_write(self, revision: int) -> Cluster:
        """Return the view once it includes `revision`, so that the caller of a drain sees the instance drained."""
        copy = self._mirror.copy
        deadline = asyncio.get_running_loop().time() + _CATCH_UP_S
        while copy.revision < revision and asyncio.get_running_loop().time() < deadline:
            copy = await self._mirror.after(copy, _CATCH_UP_S)
        return cluster_of(copy)

    async def _after_delete(self, key: bytes) -> Cluster:
        """Return the view once it no longer contains `key`."""
        copy = self._mirror.copy
        deadline = asyncio.get_running_loop().time() + _CATCH_UP_S
        while key in copy.entries and asyncio.get_running_loop().time() < deadline:
            copy = await self._mirror.after(copy, _CATCH_UP_S)
        return cluster_of(copy)
