"""Background duty of the leader: delete drain marks whose process has ended.

Each deletion is a transaction that requires the leader's own key. A former leader that does not know of its successor
changes nothing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from mesh.cluster.election import Election, Term
from mesh.cluster.etcd import Delete, Etcd, Modified
from mesh.cluster.mirror import Mirror
from mesh.process.tasks import Background
from services.coord.cluster import Cluster, cluster_of
from services.coord.drains import obsolete
from shoal.errors import ShoalError

log = logging.getLogger(__name__)

PATIENCE_S = 10.0
"""Grace time of a drained process without a registration (as after an outage of etcd) before its mark is deleted."""
_POLL_S = 1.0


class Duties(Background):
    """Background task of the leader. Runs while `election` makes this replica the leader, in the `async with` block."""

    def __init__(
        self,
        etcd: Etcd,
        mirror: Mirror,
        election: Election,
        *,
        patience_s: float = PATIENCE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._etcd = etcd
        self._mirror = mirror
        self._election = election
        self._patience_s = patience_s
        self._clock = clock

    async def _run(self) -> None:
        async for term in self._election.terms():
            absent_since: dict[str, float] = {}
            while term.is_current():
                copy = self._mirror.copy
                cluster = cluster_of(copy)
                if not cluster.stale:
                    self._note_absent(cluster, absent_since)
                    await self._clear_drains(term, cluster, absent_since)
                await self._mirror.after(copy, _POLL_S)

    def _note_absent(self, cluster: Cluster, absent_since: dict[str, float]) -> None:
        """Update `absent_since`, the time since when the process of each mark is absent."""
        present = {instance.name for instance in cluster.instances}
        absent = {mark.name for mark in cluster.marks} - present
        for name in [name for name in absent_since if name not in absent]:
            del absent_since[name]
        for name in absent:
            absent_since.setdefault(name, self._clock())

    async def _clear_drains(self, term: Term, cluster: Cluster, absent_since: dict[str, float]) -> None:
        for mark in obsolete(cluster.marks, cluster.instances, absent_since, self._clock(), self._patience_s):
            try:
                entry = await self._etcd.get(mark.key)
                if entry is None or not term.is_current():
                    continue
                done = await self._etcd.transact(
                    [term.fence, Modified(mark.key, entry.mod_revision)], [Delete(mark.key)]
                )
            except ShoalError as err:
                log.warning(
                    "cannot delete the drain mark of %(name)s, will retry: %(error)s",
                    {"event": "drain.mark_retrying", "name": mark.name, "error": err},
                )
            # A bug must not end the duties for the rest of the process.
            except Exception:
                log.exception(
                    "deleting the drain mark of %(name)s failed", {"event": "drain.mark_failed", "name": mark.name}
                )
            else:
                log.info(
                    "drain mark of %(name)s: %(outcome)s",
                    {
                        "event": "drain.mark_ended",
                        "name": mark.name,
                        "outcome": "deleted" if done.succeeded else "changed meanwhile",
                    },
                )
