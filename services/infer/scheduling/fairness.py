"""Weighted fair queueing by rows and bytes: the order of tenants that wait together.

Each tenant has a virtual time, which advances by cost / weight whenever its requests run; the tenant with the least
goes next. The cost of a request is its number of rows, and one more for every 16 KiB of its input. A tenant that
(again) has requests starts at the common virtual time: it saves nothing up while it has none, and pays nothing for
capacity that no other tenant needed. (Start-time fair queueing: Goyal, Vin, Cheng, 1996.)
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Hashable, Mapping
from itertools import count
from typing import Any

MAX_TENANTS = 1024
"""Tenants that are distinguished at a time. Further tenants share one queue, so that memory is bounded."""

# Number of tenants from which idle ones are dropped.
_TIDY_AT = 64


class TenantQueue:
    """Queued requests of one tenant in one band, with its virtual time. Compared by identity."""

    __slots__ = ("count", "is_crowded", "order", "rounds", "rows", "tenant", "virtual_time", "weight")

    def __init__(self, tenant: str, weight: float, virtual_time: float) -> None:
        self.tenant = tenant
        self.weight = weight
        self.virtual_time = virtual_time
        """Costs of the requests that have run, divided by the weight."""
        self.count = 0
        self.rows = 0
        self.order: deque[Any] = deque()
        """Requests in order of their rounds. Those that left the queue are dropped lazily."""
        self.rounds: dict[Hashable, float] = {}
        """Round of the next request of each sender that has sent more than one of them."""
        self.is_crowded = False
        """True since more than a batch waited, until nothing does: then requests have rounds."""

    def next_round(self, sender: Hashable) -> float:
        """Return the round of a sender's next request. The first of `order` waits."""
        begun = self.order[0].round if self.order else 0.0
        return max(begun, self.rounds.get(sender, 0.0))

    def add_round(self, sender: Hashable, cost: int) -> float:
        """Return the round of a sender's request of this cost, whose next one comes so much later."""
        if len(self.rounds) > 2 * self.count + _TIDY_AT:
            begun = self.order[0].round if self.order else 0.0
            self.rounds = {other: after for other, after in self.rounds.items() if after > begun}
        found = self.next_round(sender)
        self.rounds[sender] = found + cost
        return found


class TenantQueues:
    """The tenants of one band."""

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
        # Heap of the waiting tenants; stale entries are skipped. Unused while there is only one tenant.
        self._by_virtual_time: list[tuple[float, int, TenantQueue]] = []

    def __len__(self) -> int:
        return len(self._by_tenant)

    def of(self, tenant: str) -> TenantQueue:
        """Return the queue that counts a request of `tenant`; an empty queue is advanced to the common virtual time."""
        tenant_queue = self._by_tenant.get(tenant)
        if tenant_queue is None:
            tenant_queue = self._new(tenant)
        if not tenant_queue.count and tenant_queue.virtual_time < self._common_time:
            tenant_queue.virtual_time = self._common_time
        return tenant_queue

    def find(self, tenant: str) -> TenantQueue | None:
        """Return the queue of `tenant`; None for a tenant that has none."""
        return self._by_tenant.get(tenant)

    def waiting(self) -> list[TenantQueue]:
        """Return the tenants that have queued requests."""
        return [tenant_queue for tenant_queue in self._by_tenant.values() if tenant_queue.count]

    def first(self) -> TenantQueue | None:
        """Return the tenant with the least virtual time among those that have queued requests."""
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
        """Update the order after a tenant's virtual time changed, or its queue became non-empty."""
        if len(self._by_tenant) == 1:
            return
        heapq.heappush(self._by_virtual_time, (tenant_queue.virtual_time, next(self._numbers), tenant_queue))
        if len(self._by_virtual_time) > 4 * len(self._by_tenant) + _TIDY_AT:
            self._rebuild_heap()

    def serving(self, first: TenantQueue) -> None:
        """Advance the common virtual time to that of `first`, whose request begins a batch."""
        self._common_time = max(self._common_time, first.virtual_time)

    def _rebuild_heap(self) -> None:
        self._by_virtual_time = [
            (tenant_queue.virtual_time, next(self._numbers), tenant_queue) for tenant_queue in self.waiting()
        ]
        heapq.heapify(self._by_virtual_time)

    def _new(self, tenant: str) -> TenantQueue:
        self._new_count += 1
        # At the bound, dropping idle tenants each time would be wasted work: mostly, all of them wait.
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
        # A tenant that is not ahead of the common virtual time would start there anyway.
        kept = {name: s for name, s in self._by_tenant.items() if s.count or s.virtual_time > self._common_time}
        if len(kept) >= MAX_TENANTS:
            kept = {name: s for name, s in kept.items() if s.count}
        self._by_tenant = kept
        self._drop_idle_at = min(max(2 * len(kept), _TIDY_AT), MAX_TENANTS)
        self._rebuild_heap()
