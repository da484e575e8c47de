"""Instances that Envoy's configuration contains: the membership, except after an outage or lost leases. Pure.

During an outage, leases cannot be refreshed. After an outage longer than a lease, etcd deletes all keys at the same
time. The processes are alive, and write their keys again within about a second, so the deletions must not reach Envoy.
Therefore, for `settle_s` after an outage, instances that disappear are kept. Envoy's own health checks find dead
instances in that time.

A machine that stands still for longer than a lease loses the leases of its instances, too. An instance that leaves
publishes DRAINING first, so one that disappears as READY is lost: its lease has ended. For `settle_s`, Envoy gets the
lost instances of a service or model that has no other one (`mesh/xds/snapshot.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from mesh.cluster.membership import Instance, State
from services.coord.cluster import Cluster

# Far more than a cluster has. It bounds the entries of instances that register under ever new names and disappear.
_MAX_LOST = 1024


@dataclass(frozen=True)
class Lost:
    """An instance whose lease has ended, and the end of the time in which it may serve."""

    instance: Instance
    until: float
    """On the monotonic clock."""


@dataclass(frozen=True)
class Presence:
    """Instances for Envoy, and the end of the time in which disappeared instances are kept."""

    instances: tuple[Instance, ...] = ()
    drained: frozenset[str] = frozenset()
    is_known: bool = False
    """False until etcd was read once: an empty initial view must not reach Envoy."""
    was_stale: bool = False
    settled_at: float = 0.0
    """On the monotonic clock; 0: no outage to recover from."""
    lost: tuple[Lost, ...] = ()
    """Not in `instances`. Oldest first."""

    def remaining_s(self, now: float) -> float | None:
        """Return the time until the next required `observe`, even without a change; None if none is required."""
        if self.was_stale:
            return None
        ends = [lost.until for lost in self.lost] + ([self.settled_at] if self.settled_at else [])
        return max(0.0, min(ends) - now) if ends else None


def with_own(instances: tuple[Instance, ...], own: Instance | None) -> tuple[Instance, ...]:
    """Return the instances with the coord that builds the configuration, also when it has lost its lease.

    On a busy machine a process may not refresh its lease in time, and etcd deletes its key. Envoy would have no coord
    then, although it receives this configuration from one.
    """
    if own is None or own.state is not State.READY or any(instance.name == own.name for instance in instances):
        return instances
    return tuple(sorted([*instances, own], key=lambda i: (i.service, i.name)))


def observe(before: Presence, cluster: Cluster, now: float, settle_s: float) -> Presence:
    """Return the presence that follows from the view `cluster` at `now`, on the monotonic clock."""
    if cluster.revision == 0:
        return before
    if cluster.stale:
        return replace(before, is_known=True, was_stale=True, settled_at=0.0)
    settled_at = now + settle_s if before.was_stale else before.settled_at
    registered = {instance.name for instance in cluster.instances}
    gone = [i for i in before.instances if i.name not in registered and i.state is State.READY]
    # Nothing can register during an outage, so that time does not count.
    known = [replace(each, until=settled_at) for each in before.lost] if before.was_stale else before.lost
    lost = [each for each in known if each.instance.name not in registered and now < each.until]
    if now < settled_at:
        instances = tuple(sorted([*cluster.instances, *gone], key=lambda i: (i.service, i.name)))
        kept_drained = {i.name for i in gone} & before.drained
        drained = cluster.drained | kept_drained
        return Presence(instances, drained, is_known=True, settled_at=settled_at, lost=tuple(lost))
    if not before.settled_at:  # Otherwise, they were kept until now.
        lost += [Lost(instance, now + settle_s) for instance in gone if instance.name not in before.drained]
    return Presence(cluster.instances, cluster.drained, is_known=True, lost=tuple(lost[-_MAX_LOST:]))
