"""Who is next among tenants that wait together: weighted fair queueing by rows.

Each tenant has a clock of its own, which advances by rows / weight whenever its rows are run; the one that is furthest
behind goes next. A tenant that comes (back) starts at the common clock: it neither saves up while it is away, nor pays
for what it used when nobody else wanted it. (Start-time fair queueing: Goyal, Vin, Cheng, 1996.)
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Mapping
from itertools import count
from typing import Any

MOST = 1024
"""Tenants that are told apart at a time. Beyond, newcomers share one place: whatever names come, memory is bounded."""

_TIDY = 64
# So many are kept before those that no longer matter are looked for.


class TenantQueue:
    """What one tenant has in the queue, and how far it is. Compared by identity."""

    __slots__ = ("calls", "order", "rows", "tag", "tenant", "weight")

    def __init__(self, tenant: str, weight: float, tag: float) -> None:
        self.tenant = tenant
        self.weight = weight
        self.tag = tag
        """The tenant's clock: rows run, by weight."""
        self.calls = 0
        self.rows = 0
        self.order: deque[Any] = deque()
        """Its calls in order of arrival. Those that have left are forgotten in passing."""


class TenantQueues:
    """The tenants of one level of priority."""

    __slots__ = ("_behind", "_by_tenant", "_news", "_now", "_numbers", "_tidy_at", "_weights")

    def __init__(self, weights: Mapping[str, float]) -> None:
        self._weights = weights
        self._now = 0.0
        self._by_tenant: dict[str, TenantQueue] = {}
        self._tidy_at = _TIDY
        self._news = 0
        self._numbers = count()
        self._behind: list[tuple[float, int, TenantQueue]] = []
        # A heap of those that wait, by their clocks; entries that do not hold any more are skipped. Not kept for one.

    def __len__(self) -> int:
        return len(self._by_tenant)

    def of(self, tenant: str) -> TenantQueue:
        """The share that a call of `tenant` is to be counted in, brought up to the common clock when it was away."""
        share = self._by_tenant.get(tenant)
        if share is None:
            share = self._new(tenant)
        if not share.calls and share.tag < self._now:
            share.tag = self._now
        return share

    def waiting(self) -> list[TenantQueue]:
        """Those that have calls in the queue."""
        return [share for share in self._by_tenant.values() if share.calls]

    def first(self) -> TenantQueue | None:
        """The one that is furthest behind, of those that have calls in the queue."""
        if len(self._by_tenant) == 1:
            (only,) = self._by_tenant.values()
            return only if only.calls else None
        behind = self._behind
        while behind:
            tag, _, share = behind[0]
            if share.calls and share.tag == tag:
                return share
            heapq.heappop(behind)
        return None

    def moved(self, share: TenantQueue) -> None:
        """The clock of a share that has calls in the queue has changed, or it has calls again."""
        if len(self._by_tenant) == 1:
            return
        heapq.heappush(self._behind, (share.tag, next(self._numbers), share))
        if len(self._behind) > 4 * len(self._by_tenant) + _TIDY:
            self._line_up()

    def serving(self, first: TenantQueue) -> None:
        """A batch begins with a call of `first`: the common clock is there now."""
        self._now = max(self._now, first.tag)

    def _line_up(self) -> None:
        self._behind = [(share.tag, next(self._numbers), share) for share in self.waiting()]
        heapq.heapify(self._behind)

    def _new(self, tenant: str) -> TenantQueue:
        self._news += 1
        # At the bound it is not worth looking each time: mostly, all of them wait.
        if len(self._by_tenant) >= self._tidy_at and (len(self._by_tenant) < MOST or self._news % _TIDY == 0):
            self._tidy()
        if len(self._by_tenant) >= MOST and tenant:
            return self.of("")
        share = self._by_tenant[tenant] = TenantQueue(tenant, self._weights.get(tenant, 1.0), self._now)
        if len(self._by_tenant) == 2:
            self._line_up()
        return share

    def _tidy(self) -> None:
        # Whoever is not ahead of the common clock would start there anyway.
        kept = {name: s for name, s in self._by_tenant.items() if s.calls or s.tag > self._now}
        if len(kept) >= MOST:
            kept = {name: s for name, s in kept.items() if s.calls}
        self._by_tenant = kept
        self._tidy_at = min(max(2 * len(kept), _TIDY), MOST)
        self._line_up()
