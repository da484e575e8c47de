"""Two nodes that share an etcd under one name would write over each other's instances: the second is refused."""

from __future__ import annotations

import asyncio
import time

from shoal.errors import FailedPrecondition, ShoalError

_PATIENCE_S = 5.0
# A node of this name that was killed is forgotten when its leases end, after 3 s.
_POLL_S = 0.3


async def refuse_namesake(etcd: str, name: str) -> None:
    """Returns when no instance of a node called `name` is registered at `etcd`, or when it cannot be asked.

    Raises:
        FailedPrecondition: there is one, and it stays.
    """
    deadline = time.monotonic() + _PATIENCE_S
    while found := await _instances_of(etcd, name):
        if time.monotonic() > deadline:
            raise FailedPrecondition(
                f"a node called {name!r} runs already with the etcd at {etcd} ({', '.join(found)}): "
                "give this one another name with --node"
            )
        await asyncio.sleep(_POLL_S)


async def _instances_of(etcd: str, name: str) -> list[str]:
    from mesh.cluster.etcd import Etcd
    from mesh.cluster.membership import PREFIX

    try:
        async with Etcd(etcd) as client:
            entries = (await client.list(PREFIX)).entries
    except ShoalError:
        return []  # It is away: the node says so itself, while it waits.
    keys = [entry.key.removeprefix(PREFIX).decode(errors="replace").split("/") for entry in entries]
    return [parts[2] for parts in keys if len(parts) == 3 and parts[1] == name]
