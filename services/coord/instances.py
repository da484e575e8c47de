"""What operators ask of coord: who is here, who leads, drain and undrain."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

from mesh.cluster.election import Leader
from mesh.cluster.etcd import Etcd
from mesh.cluster.membership import Instance
from mesh.cluster.mirror import Mirror
from services.coord.cluster import Cluster, cluster_of
from services.coord.drains import encode, key_of, mark_of, resolve
from shoal.errors import Unavailable

_CATCH_UP_S = 2.0


class Instances:
    """Reads from the live copy, writes to etcd."""

    def __init__(self, etcd: Etcd, mirror: Mirror) -> None:
        self._etcd = etcd
        self._mirror = mirror

    @property
    def cluster(self) -> Cluster:
        """The newest view."""
        return cluster_of(self._mirror.copy)

    async def watch(self, service: str) -> AsyncIterator[Cluster]:
        """The view as it is now, and again whenever what it says of `service` (of all, if empty) has changed."""
        last: tuple[object, ...] | None = None
        async for copy in self._mirror.follow():
            cluster = cluster_of(copy)
            shown = cluster.of_service(service)
            now = (shown, frozenset(i.name for i in shown) & cluster.drained, cluster.stale)
            if now != last:
                yield replace(cluster, instances=shown)
            last = now

    def leader(self) -> Leader:
        """Who leads.

        Raises:
            Unavailable: nobody does, or it cannot be known.
        """
        cluster = self.cluster
        if cluster.stale:
            raise Unavailable("etcd cannot be reached: nobody can say who leads; traffic goes on without")
        if cluster.leader is None:
            raise Unavailable("nobody leads at present: an election is under way, ask again in a moment")
        return cluster.leader

    async def drain(self, name: str) -> tuple[Cluster, Instance]:
        """Takes an instance out of traffic. Returns the view after it, and the instance.

        Raises:
            NotFound, InvalidArgument: see `resolve`.
            Unavailable: etcd cannot be reached.
        """
        instance = resolve(name, self.cluster.instances)
        mark = mark_of(instance)
        return await self._seen(await self._etcd.put(mark.key, encode(mark))), instance

    async def undrain(self, name: str) -> tuple[Cluster, Instance]:
        """Puts an instance back; no error when it was not drained. Raises as `drain`."""
        instance = resolve(name, self.cluster.instances)
        cluster = self.cluster
        if await self._etcd.delete(key_of(instance.name)):
            cluster = await self._gone(key_of(instance.name))
        return cluster, instance

    async def _seen(self, revision: int) -> Cluster:
        """The view once it has come to `revision`, so that whoever drained an instance sees it drained."""
        copy = self._mirror.copy
        deadline = asyncio.get_running_loop().time() + _CATCH_UP_S
        while copy.revision < revision and asyncio.get_running_loop().time() < deadline:
            copy = await self._mirror.after(copy, _CATCH_UP_S)
        return cluster_of(copy)

    async def _gone(self, key: bytes) -> Cluster:
        copy = self._mirror.copy
        deadline = asyncio.get_running_loop().time() + _CATCH_UP_S
        while key in copy.entries and asyncio.get_running_loop().time() < deadline:
            copy = await self._mirror.after(copy, _CATCH_UP_S)
        return cluster_of(copy)
