"""Retention rounds: the instance that holds the store's leader lease removes what the rules no longer keep.

lease held? ──no──> check again soon
    └──yes──> check the clock ──> sweep (about two seconds) ──more to remove──> again ... ──nothing left──> next round
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

from mesh.mongo_lease import LeaderLease
from mesh.process.tasks import Background, for_ever
from services.store.retention.sweep import Sweep, Swept

log = logging.getLogger(__name__)

LEASE_MS = 5_000
"""A leader that was killed is replaced after this time."""
RENEW_MS = 1_500
"""Two renewals may be lost before the lease expires."""
# Interval at which a follower checks whether it holds the lease.
_CHECK_S = 1.0
_AWAY_S = 5.0


class RetentionRounds(Background):
    """Sweeps every `every_s`, and immediately again while there is more, while this instance holds `lease`."""

    def __init__(
        self,
        sweep: Sweep,
        lease: LeaderLease,
        every_s: float,
        *,
        check: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """Store what a round needs; `check` runs before each round (mesh.removal_guard)."""
        self._sweep = sweep
        self._check = check
        self._lease = lease
        self._every_s = every_s

    async def _run(self) -> None:
        await for_ever("apply retention", self._round, away_s=min(_AWAY_S, self._every_s), log=log)

    async def _round(self) -> float:
        if not self._lease.is_held:
            return min(_CHECK_S, self._every_s)
        if self._check is not None:
            await self._check()
        swept = await self._sweep.apply(self._lease)
        if swept != Swept(more=swept.more):
            log.info(
                "retention removed %(results)d results, %(answers)d answers, %(tombstones)d tombstones",
                {
                    "event": "retention.removed",
                    "results": swept.results,
                    "answers": swept.answers,
                    "tombstones": swept.tombstones,
                },
            )
        return 0.0 if swept.more else self._every_s
