"""View of the cluster in etcd: instances, drain marks and the leader, all at one revision."""

from __future__ import annotations

from dataclasses import dataclass

from mesh.cluster.election import LEADER, Leader, leader_of
from mesh.cluster.membership import Instance, State, view_of
from mesh.cluster.mirror import Copy, Mirror
from services.coord.drains import DrainMark, drained, marks_of

PREFIX = b"/shoal/"


@dataclass(frozen=True)
class Cluster:
    """Immutable view of the whole cluster."""

    instances: tuple[Instance, ...] = ()
    """Sorted by service and name."""
    marks: tuple[DrainMark, ...] = ()
    drained: frozenset[str] = frozenset()
    """Names of instances that an operator has drained."""
    leader: Leader | None = None
    revision: int = 0
    stale: bool = True

    def of_service(self, service: str) -> tuple[Instance, ...]:
        """Return the instances of a service; an empty name selects all services."""
        return tuple(i for i in self.instances if not service or i.service == service)

    def state_of(self, instance: Instance) -> State:
        """Return the state of an instance: DRAINING if an operator has drained it, else the state that it publishes."""
        return State.DRAINING if instance.name in self.drained else instance.state

    def is_ready(self, service: str) -> bool:
        """Return True when at least one instance of `service` accepts traffic."""
        return any(self.state_of(i) is State.READY for i in self.of_service(service))


def cluster_of(copy: Copy) -> Cluster:
    """Parse a copy of all keys under PREFIX."""
    view = view_of(copy)
    marks = marks_of(copy.entries)
    election = {key: entry for key, entry in copy.entries.items() if key.startswith(LEADER)}
    return Cluster(
        view.instances,
        marks,
        drained(view.instances, marks),
        leader_of(Copy(election, copy.revision, copy.stale)),
        copy.revision,
        copy.stale,
    )


class LiveCluster:
    """View of a mirror's copy. A copy of hundreds of instances takes milliseconds to parse: each is parsed once."""

    def __init__(self, mirror: Mirror) -> None:
        self._mirror = mirror
        self._latest = mirror.copy, cluster_of(mirror.copy)

    @property
    def now(self) -> Cluster:
        """View of the latest copy."""
        return self.of(self._mirror.copy)

    def of(self, copy: Copy) -> Cluster:
        """Return the view of `copy`, which was the latest one a moment ago."""
        if self._latest[0] is not copy:
            self._latest = copy, cluster_of(copy)
        return self._latest[1]
