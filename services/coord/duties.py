"""What the leader does, and only the leader: it clears drain marks whose process is gone.

Each act is a transaction that demands the leader's own key: an old leader that has not yet noticed changes nothing.
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
"""So long a drained process may be absent (etcd was away, it registers again) before its mark is cleared."""
_LOOK_S = 1.0


class Duties(Background):
    """Runs the leader's duties whenever `election` makes this replica the leader, while the `async with` lasts."""

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
                    self._miss(cluster, absent_since)
                    await self._clear_drains(term, cluster, absent_since)
                await self._mirror.after(copy, _LOOK_S)

    def _miss(self, cluster: Cluster, absent_since: dict[str, float]) -> None:
        """Notes since when the processes of marks are absent."""
        here = {instance.name for instance in cluster.instances}
        absent = {mark.name for mark in cluster.marks} - here
        for name in [name for name in absent_since if name not in absent]:
            del absent_since[name]
        for name in absent:
            absent_since.setdefault(name, self._clock())

    async def _clear_drains(self, term: Term, cluster: Cluster, absent_since: dict[str, float]) -> None:
        gone = obsolete(cluster.marks, cluster.instances, absent_since, self._clock(), self._patience_s)
        for mark in gone:
            try:
                entry = await self._etcd.get(mark.key)
                if entry is None or not term.is_current():
                    continue
                done = await self._etcd.transact(
                    [term.fence, Modified(mark.key, entry.mod_revision)], [Delete(mark.key)]
                )
            except ShoalError as err:
                log.warning("the drain mark of %s stays for now: %s", mark.name, err)
            except Exception:  # A fault of ours must not end the duties for ever.
                log.exception("clearing the drain mark of %s", mark.name)
            else:
                log.info("drain mark of %s: %s", mark.name, "cleared" if done.succeeded else "changed meanwhile")
