"""The cluster as etcd has it: instances, drain marks and the leader, all at one revision."""

from __future__ import annotations

from dataclasses import dataclass

from mesh.cluster.election import LEADER, Leader, leader_of
from mesh.cluster.membership import Instance, State, view_of
from mesh.cluster.mirror import Copy
from services.coord.drains import DrainMark, drained, marks_of

PREFIX = b"/shoal/"


@dataclass(frozen=True)
class Cluster:
    """One view of everything, immutable."""

    instances: tuple[Instance, ...] = ()
    """Sorted by service and name."""
    marks: tuple[DrainMark, ...] = ()
    drained: frozenset[str] = frozenset()
    """Names of instances that an operator has taken out."""
    leader: Leader | None = None
    revision: int = 0
    stale: bool = True

    def of_service(self, service: str) -> tuple[Instance, ...]:
        """The instances of a service; of all for an empty name."""
        return tuple(i for i in self.instances if not service or i.service == service)

    def state_of(self, instance: Instance) -> State:
        """DRAINING for what an operator has drained, whatever the process says."""
        return State.DRAINING if instance.name in self.drained else instance.state

    def is_ready(self, service: str) -> bool:
        """Whether some instance of `service` takes traffic."""
        return any(self.state_of(i) is State.READY for i in self.of_service(service))


def cluster_of(copy: Copy) -> Cluster:
    """Reads a copy of all keys under PREFIX."""
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
