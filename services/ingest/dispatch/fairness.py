"""Order of tenants with queued jobs: weighted fair queueing by claimed jobs.

Each tenant has a virtual clock that advances by 1 / weight per claimed job; the tenant furthest behind is next. A
tenant that becomes active starts at the common clock: it neither saves up credit while idle, nor pays for capacity that
it used while no other tenant needed it. (Start-time fair queueing: Goyal, Vin, Cheng, 1996.)

The weights are read at each claim, so a change takes effect immediately, also for queued jobs.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Sequence

# Number of clocks at which those without effect are dropped.
_PRUNE_AT = 1_000
# Number of jobs that an idle tenant may be ahead of the common clock, which advances by whole claims.
_AHEAD = 64


class TenantClocks:
    """Virtual clocks of one claimer. When each claimer is fair, all of them together are."""

    def __init__(self, weight_of: Callable[[str], float]) -> None:
        self._weight_of = weight_of
        self._now = 0.0
        """The common clock: the clock of the last served tenant at that time."""
        self._clocks: dict[str, float] = {}
        self._waiting: set[str] = set()
        self._prune_at = _PRUNE_AT

    def furthest_behind(self, tenants: Collection[str], most: int) -> list[str]:
        """Return up to `most` of `tenants`, furthest behind first. `tenants` are all tenants with queued jobs."""
        for tenant in tenants:
            if tenant not in self._waiting:
                self._clocks[tenant] = max(self._now, self._clocks.get(tenant, 0.0))
        self._waiting = set(tenants)
        if len(self._clocks) > self._prune_at:
            self._prune()
        return heapq.nsmallest(most, tenants, key=lambda tenant: (self._clocks[tenant], tenant))

    def allot(self, tenants: Sequence[str], capacity: int) -> dict[str, int]:
        """Divide `capacity` jobs among `tenants`. Nothing is charged yet: a tenant may have fewer jobs."""
        if len(tenants) == 1:
            return {tenants[0]: capacity}
        steps = {tenant: 1 / self._weight_of(tenant) for tenant in tenants}
        heap = [(self._clocks[tenant], tenant) for tenant in tenants]
        heapq.heapify(heap)
        shares: dict[str, int] = {}
        for _ in range(capacity if heap else 0):
            clock, tenant = heap[0]
            shares[tenant] = shares.get(tenant, 0) + 1
            heapq.heapreplace(heap, (clock + steps[tenant], tenant))
        return shares

    def becomes_idle(self, tenant: str) -> None:
        """Note that a claim leaves no queued job of `tenant`."""
        self._waiting.discard(tenant)

    def take_turn(self, tenant: str) -> bool:
        """Charge an idle tenant for one job and return True, unless it is ahead of the common clock by several jobs."""
        step = 1 / self._weight_of(tenant)
        clock = max(self._now, self._clocks.get(tenant, 0.0)) + step
        if clock > self._now + _AHEAD * step:
            return False
        self._clocks[tenant] = clock
        return True

    def charge(self, tenant: str, jobs: int) -> None:
        """Advance the clock of `tenant` by `jobs` claimed jobs, at least one."""
        step = 1 / self._weight_of(tenant)
        before = self._clocks.get(tenant, self._now)
        self._clocks[tenant] = before + jobs * step
        self._now = max(self._now, before + (jobs - 1) * step)

    def _prune(self) -> None:
        # An idle tenant that is not ahead of the common clock would start there anyway.
        kept = {tenant: clock for tenant, clock in self._clocks.items() if tenant in self._waiting or clock > self._now}
        self._clocks = kept
        self._prune_at = max(_PRUNE_AT, 2 * len(kept))
