"""Check that a node's name is unique in an etcd: nodes of one name would overwrite each other's registrations."""

from __future__ import annotations

import asyncio
import time

from shoal.errors import FailedPrecondition, ShoalError

# The registrations of a killed node of this name expire with its leases, after 3 s.
_WAIT_S = 5.0
_POLL_S = 0.3


async def check_unique(etcd: str, name: str) -> None:
    """Wait until no instance of a node called `name` is registered at `etcd`. Also return when etcd is unreachable.

    Raises:
        FailedPrecondition: an instance stays registered.
    """
    deadline = time.monotonic() + _WAIT_S
    while found := await _instances_of(etcd, name):
        if time.monotonic() > deadline:
            raise FailedPrecondition(
                f"a node called {name!r} already runs with the etcd at {etcd} ({', '.join(found)}): "
                "give this node another name with --node"
            )
        await asyncio.sleep(_POLL_S)


async def _instances_of(etcd: str, name: str) -> list[str]:
    from mesh.cluster.etcd import Etcd
    from mesh.cluster.membership import PREFIX

    try:
        async with Etcd(etcd) as client:
            entries = (await client.list(PREFIX)).entries
    # etcd is unreachable: the node reports that itself while it waits.
    except ShoalError:
        return []
    keys = [entry.key.removeprefix(PREFIX).decode(errors="replace").split("/") for entry in entries]
    return [parts[2] for parts in keys if len(parts) == 3 and parts[1] == name]
