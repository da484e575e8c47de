"""Who is next among tenants whose jobs wait: weighted fair queueing by jobs claimed.

Each tenant has a clock that advances by 1 / weight for every job of its that is claimed; whoever is furthest behind is
next. A tenant that comes (back) starts at the common clock: it neither saves up while it has nothing waiting, nor pays
for what it used when nobody else wanted it. (Start-time fair queueing: Goyal, Vin, Cheng, 1996.)

The weights are asked for at each claim, so a change counts from then on, for what waits already too.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Sequence

_TIDY = 1_000
# So many clocks are kept before those that no longer matter are forgotten.


class Clocks:
    """The clocks of one claimer. Each of several shares out fairly what it claims, and so do all of them together."""

    def __init__(self, weight_of: Callable[[str], float]) -> None:
        self._weight_of = weight_of
        self._now = 0.0
        """The common clock: how far whoever was served last was when it was."""
        self._clocks: dict[str, float] = {}
        self._waiting: Collection[str] = frozenset()
        self._tidy_at = _TIDY

    def behind(self, tenants: Collection[str], most: int) -> list[str]:
        """Up to `most` of the `tenants`, which are all that have jobs waiting: those furthest behind, in that order."""
        for tenant in tenants:
            if tenant not in self._waiting:
                self._clocks[tenant] = max(self._now, self._clocks.get(tenant, 0.0))
        self._waiting = tenants
        if len(self._clocks) > self._tidy_at:
            self._tidy()
        return heapq.nsmallest(most, tenants, key=lambda tenant: (self._clocks[tenant], tenant))

    def allot(self, tenants: Sequence[str], room: int) -> dict[str, int]:
        """Shares `room` jobs out among some of those that wait. Nothing is charged yet: they may have fewer."""
        if len(tenants) == 1:
            return {tenants[0]: room}
        steps = {tenant: 1 / self._weight_of(tenant) for tenant in tenants}
        line = [(self._clocks[tenant], tenant) for tenant in tenants]
        heapq.heapify(line)
        shares: dict[str, int] = {}
        for _ in range(room if line else 0):
            clock, tenant = line[0]
            shares[tenant] = shares.get(tenant, 0) + 1
            heapq.heapreplace(line, (clock + steps[tenant], tenant))
        return shares

    def charge(self, tenant: str, jobs: int) -> None:
        """So many jobs of `tenant`, at least one, were claimed."""
        step = 1 / self._weight_of(tenant)
        before = self._clocks.get(tenant, self._now)
        self._clocks[tenant] = before + jobs * step
        self._now = max(self._now, before + (jobs - 1) * step)

    def _tidy(self) -> None:
        # Whoever is away and not ahead of the common clock would start there anyway.
        kept = {tenant: clock for tenant, clock in self._clocks.items() if tenant in self._waiting or clock > self._now}
        self._clocks = kept
        self._tidy_at = max(_TIDY, 2 * len(kept))
