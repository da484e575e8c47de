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

MAX_TENANTS = 1024
"""Tenants that are told apart at a time. Beyond, newcomers share one place: whatever names come, memory is bounded."""

_TIDY_AT = 64
# So many are kept before those that no longer matter are looked for.


class TenantQueue:
    """What one tenant has in the queue, and how far it is. Compared by identity."""

    __slots__ = ("count", "order", "rows", "tenant", "virtual_time", "weight")

    def __init__(self, tenant: str, weight: float, virtual_time: float) -> None:
        self.tenant = tenant
        self.weight = weight
        self.virtual_time = virtual_time
        """The tenant's clock: rows run, by weight."""
        self.count = 0
        self.rows = 0
        self.order: deque[Any] = deque()
        """Its requests in order of arrival. Those that have left are forgotten in passing."""


class TenantQueues:
    """The tenants of one level of priority."""

    __slots__ = (
        "_by_tenant",
        "_by_virtual_time",
        "_common_time",
        "_drop_idle_at",
        "_new_count",
        "_numbers",
        "_weights",
    )

    def __init__(self, weights: Mapping[str, float]) -> None:
        self._weights = weights
        self._common_time = 0.0
        self._by_tenant: dict[str, TenantQueue] = {}
        self._drop_idle_at = _TIDY_AT
        self._new_count = 0
        self._numbers = count()
        self._by_virtual_time: list[tuple[float, int, TenantQueue]] = []
        # A heap of those that wait, by their clocks; entries that do not hold any more are skipped. Not kept for one.

    def __len__(self) -> int:
        return len(self._by_tenant)

    def of(self, tenant: str) -> TenantQueue:
        """The share that a request of `tenant` is to be counted in, brought up to the common clock when it was away."""
        tenant_queue = self._by_tenant.get(tenant)
        if tenant_queue is None:
            tenant_queue = self._new(tenant)
        if not tenant_queue.count and tenant_queue.virtual_time < self._common_time:
            tenant_queue.virtual_time = self._common_time
        return tenant_queue

    def waiting(self) -> list[TenantQueue]:
        """Those that have requests in the queue."""
        return [tenant_queue for tenant_queue in self._by_tenant.values() if tenant_queue.count]

    def first(self) -> TenantQueue | None:
        """The one that is furthest behind, of those that have requests in the queue."""
        if len(self._by_tenant) == 1:
            (only,) = self._by_tenant.values()
            return only if only.count else None
        heap = self._by_virtual_time
        while heap:
            virtual_time, _, tenant_queue = heap[0]
            if tenant_queue.count and tenant_queue.virtual_time == virtual_time:
                return tenant_queue
            heapq.heappop(heap)
        return None

    def advanced(self, tenant_queue: TenantQueue) -> None:
        """The clock of a share that has requests in the queue has changed, or it has requests again."""
        if len(self._by_tenant) == 1:
            return
        heapq.heappush(self._by_virtual_time, (tenant_queue.virtual_time, next(self._numbers), tenant_queue))
        if len(self._by_virtual_time) > 4 * len(self._by_tenant) + _TIDY_AT:
            self._rebuild_heap()

    def serving(self, first: TenantQueue) -> None:
        """A batch begins with a request of `first`: the common clock is there now."""
        self._common_time = max(self._common_time, first.virtual_time)

    def _rebuild_heap(self) -> None:
        self._by_virtual_time = [
            (tenant_queue.virtual_time, next(self._numbers), tenant_queue) for tenant_queue in self.waiting()
        ]
        heapq.heapify(self._by_virtual_time)

    def _new(self, tenant: str) -> TenantQueue:
        self._new_count += 1
        # At the bound it is not worth looking each time: mostly, all of them wait.
        if len(self._by_tenant) >= self._drop_idle_at and (
            len(self._by_tenant) < MAX_TENANTS or self._new_count % _TIDY_AT == 0
        ):
            self._drop_idle()
        if len(self._by_tenant) >= MAX_TENANTS and tenant:
            return self.of("")
        tenant_queue = self._by_tenant[tenant] = TenantQueue(tenant, self._weights.get(tenant, 1.0), self._common_time)
        if len(self._by_tenant) == 2:
            self._rebuild_heap()
        return tenant_queue

    def _drop_idle(self) -> None:
        # Whoever is not ahead of the common clock would start there anyway.
        kept = {name: s for name, s in self._by_tenant.items() if s.count or s.virtual_time > self._common_time}
        if len(kept) >= MAX_TENANTS:
            kept = {name: s for name, s in kept.items() if s.count}
        self._by_tenant = kept
        self._drop_idle_at = min(max(2 * len(kept), _TIDY_AT), MAX_TENANTS)
        self._rebuild_heap()
