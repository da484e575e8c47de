"""Who Envoy is told of. Like the membership, but for what an outage of etcd does to it. Pure.

While etcd is away, leases cannot be refreshed. If that lasts longer than a lease, etcd comes back and drops all keys at
once, although every process is alive and writes its key again within a second or so. Envoy must not hear of that: for
`settle_s` after an outage whoever vanishes stays. Who is really dead then, Envoy's own health checks know.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from mesh.cluster.membership import Instance, State
from services.coord.cluster import Cluster


@dataclass(frozen=True)
class Presence:
    """What is shown, and until when vanished instances are kept."""

    instances: tuple[Instance, ...] = ()
    drained: frozenset[str] = frozenset()
    is_known: bool = False
    """False until etcd has been seen once: nothing may be told from nothing."""
    was_stale: bool = False
    settled_at: float = 0.0
    """On the monotonic clock; 0: no outage to recover from."""

    def remaining_s(self, now: float) -> float | None:
        """Until when this must be looked at again even if nothing changes. None: no need."""
        return max(0.0, self.settled_at - now) if self.settled_at else None


def observe(before: Presence, cluster: Cluster, now: float, settle_s: float) -> Presence:
    """The presence after a look at `cluster` at `now`, on the monotonic clock."""
    if cluster.revision == 0:
        return before
    if cluster.stale:
        return replace(before, is_known=True, was_stale=True, settled_at=0.0)
    settled_at = now + settle_s if before.was_stale else before.settled_at
    if now >= settled_at:
        return Presence(cluster.instances, cluster.drained, is_known=True)
    here = {instance.name for instance in cluster.instances}
    kept = [i for i in before.instances if i.name not in here and i.state is State.READY]
    instances = tuple(sorted([*cluster.instances, *kept], key=lambda i: (i.service, i.name)))
    kept_drained = {i.name for i in kept} & before.drained
    return Presence(instances, cluster.drained | kept_drained, is_known=True, settled_at=settled_at)
