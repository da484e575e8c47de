"""Channel from a coord to the one that leads."""

from __future__ import annotations

from typing import Self

import grpc

from mesh.cluster.mirror import Mirror
from mesh.rpc.channel import connect
from services.coord.cluster import cluster_of

# Longest wait for the calls to a former leader.
_FORMER_S = 5.0

FAILED = (grpc.aio.AioRpcError, grpc.aio.UsageError)
"""Errors of a call over the channel. The second one: another coord leads since the channel was given out."""


class LeaderChannel:
    """Channel to the leader, made at the first use. Use as `async with`.

    Args:
        mirror: copy of all keys of the cluster, which tell the leader.
        name: this instance.
    """

    def __init__(self, mirror: Mirror, name: str) -> None:
        self._mirror = mirror
        self._name = name
        self._open: tuple[str, grpc.aio.Channel] | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        if self._open is not None:
            await self._open[1].close()

    async def get(self) -> grpc.aio.Channel | None:
        """Return the channel; None when this coord leads, or no leader is known."""
        cluster = cluster_of(self._mirror.copy)
        leader = cluster.leader
        if leader is None or leader.name == self._name:
            return None
        address = next((each.address for each in cluster.instances if each.name == leader.name), None)
        if address is None:
            return None
        if self._open is None or self._open[0] != address:
            former, self._open = self._open, (address, connect(address))
            if former is not None:
                # Other calls may still wait for the former leader, and a closed channel would cancel them.
                await former[1].close(_FORMER_S)
        return self._open[1]
