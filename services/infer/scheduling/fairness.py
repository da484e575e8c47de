"""Weighted fair queueing by rows and bytes: the order of tenants that wait together.

Each tenant has a virtual time, which advances by cost / weight whenever its requests run; the tenant with the least
goes next. The cost of a request is its number of rows, and one more for every 16 KiB of its input. A tenant that
(again) has requests starts at the common virtual time: it saves nothing up while it has none, and pays nothing for
capacity that no other tenant needed. (Start-time fair queueing: Goyal, Vin, Cheng, 1996.)

The bands (levels of priority) of a tenant share its virtual time: a tenant that always asks for the first level gets
its share, and no more.
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


class Tenant:
    """One tenant: its virtual time, and its queued requests by band. Compared by identity."""

    __slots__ = ("count", "name", "queues", "size_bytes", "virtual_time", "weight")

    def __init__(self, name: str, weight: float, virtual_time: float) -> None:
        self.name = name
        self.weight = weight
        self.virtual_time = virtual_time
        """Costs of the requests that have run, divided by the weight."""
        self.count = 0
        """Queued requests of all bands."""
        self.size_bytes = 0
        """Bytes of their inputs."""
        self.queues: dict[int, TenantQueue] = {}
        """By band."""

    @property
    def rows(self) -> int:
        """Rows of the queued requests of all bands."""
        return sum(tenant_queue.rows for tenant_queue in self.queues.values())


class TenantQueue:
    """Queued requests of one tenant in one band. Compared by identity."""

    __slots__ = ("count", "is_crowded", "order", "rounds", "rows", "tenant")

    def __init__(self, tenant: Tenant) -> None:
        self.tenant = tenant
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


class Tenants:
    """The tenants of one model version."""

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
        self._by_tenant: dict[str, Tenant] = {}
        self._drop_idle_at = _TIDY_AT
        self._new_count = 0
        self._numbers = count()
        # Heap of the waiting tenants; stale entries are skipped. Unused while there is only one tenant.
        self._by_virtual_time: list[tuple[float, int, Tenant]] = []

    def __len__(self) -> int:
        return len(self._by_tenant)

    def of(self, name: str, band: int) -> TenantQueue:
        """Return the queue that counts a request; a tenant without any is advanced to the common virtual time."""
        tenant = self._by_tenant.get(name)
        if tenant is None:
            tenant = self._new(name)
        if not tenant.count and tenant.virtual_time < self._common_time:
            tenant.virtual_time = self._common_time
        tenant_queue = tenant.queues.get(band)
        if tenant_queue is None:
            tenant_queue = tenant.queues[band] = TenantQueue(tenant)
        return tenant_queue

    def find(self, name: str) -> Tenant | None:
        """Return a tenant; None for one that is not known."""
        return self._by_tenant.get(name)

    def waiting(self) -> list[Tenant]:
        """Return the tenants that have queued requests."""
        return [tenant for tenant in self._by_tenant.values() if tenant.count]

    def first(self) -> Tenant | None:
        """Return the tenant with the least virtual time among those that have queued requests."""
        if len(self._by_tenant) == 1:
            (only,) = self._by_tenant.values()
            return only if only.count else None
        heap = self._by_virtual_time
        while heap:
            virtual_time, _, tenant = heap[0]
            if tenant.count and tenant.virtual_time == virtual_time:
                return tenant
            heapq.heappop(heap)
        return None

    def advanced(self, tenant: Tenant) -> None:
        """Update the order after a tenant's virtual time changed, or it had its first request."""
        if len(self._by_tenant) == 1:
            return
        heapq.heappush(self._by_virtual_time, (tenant.virtual_time, next(self._numbers), tenant))
        if len(self._by_virtual_time) > 4 * len(self._by_tenant) + _TIDY_AT:
            self._rebuild_heap()

    def serving(self, first: Tenant) -> None:
        """Advance the common virtual time to that of `first`, whose request begins a batch."""
        self._common_time = max(self._common_time, first.virtual_time)

    def _rebuild_heap(self) -> None:
        self._by_virtual_time = [(tenant.virtual_time, next(self._numbers), tenant) for tenant in self.waiting()]
        heapq.heapify(self._by_virtual_time)

    def _new(self, name: str) -> Tenant:
        self._new_count += 1
        # At the bound, dropping idle tenants each time would be wasted work: mostly, all of them wait.
        if len(self._by_tenant) >= self._drop_idle_at and (
            len(self._by_tenant) < MAX_TENANTS or self._new_count % _TIDY_AT == 0
        ):
            self._drop_idle()
        if len(self._by_tenant) >= MAX_TENANTS and name:
            return self._by_tenant.get("") or self._new("")
        tenant = self._by_tenant[name] = Tenant(name, self._weights.get(name, 1.0), self._common_time)
        if len(self._by_tenant) == 2:
            self._rebuild_heap()
        return tenant

    def _drop_idle(self) -> None:
        # A tenant that is not ahead of the common virtual time would start there anyway.
        kept = {name: s for name, s in self._by_tenant.items() if s.count or s.virtual_time > self._common_time}
        if len(kept) >= MAX_TENANTS:
            kept = {name: s for name, s in kept.items() if s.count}
        self._by_tenant = kept
        self._drop_idle_at = min(max(2 * len(kept), _TIDY_AT), MAX_TENANTS)
        self._rebuild_heap()
