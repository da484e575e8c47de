"""Stack group: queued requests that can run as one (same inputs, row shapes and outputs), in execution order.

    group ──> tenants ──> one flow for each band of a tenant ──> requests in order of arrival, or of due time

A band holds the requests of one priority level, or those of a level that yielded. Among tenants, the one with the least
virtual time (`fairness`) goes first; among its bands, the request with the least rank. With one band and one tenant,
nearly always, the order is that of the one flow.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from operator import attrgetter
from typing import Protocol, TypeAlias, TypeVar

from services.infer.scheduling.fairness import Tenant, TenantQueue


class Member(Protocol):
    """A queued request as a group sees it."""

    rows: int
    size_bytes: int
    cost: int
    arrived: float
    due: float
    round: float
    rank: float
    band: int
    tenant_queue: TenantQueue


M = TypeVar("M", bound=Member)
Flows: TypeAlias = dict[TenantQueue, deque[M]]

_ARRIVED, _DUE, _RANK, _ROUND = map(attrgetter, ("arrived", "due", "rank", "round"))


class StackGroup:
    """Requests with one key. `take` removes only a front of `order`."""

    __slots__ = ("_by_due", "_flows", "count", "rows", "size_bytes")

    def __init__(self, *, by_due: bool) -> None:
        self._flows: Flows[Member] = {}
        self._by_due = by_due
        self.count = self.rows = self.size_bytes = 0

    def add(self, queued: Member) -> None:
        flow = self._flows.get(queued.tenant_queue)
        if flow is None:
            self._flows[queued.tenant_queue] = deque((queued,))
        elif self._by_due and queued.due < flow[-1].due:
            flow.insert(bisect_right(flow, queued.due, key=_DUE), queued)
        else:
            add_in_turn(flow, queued)
        self.count += 1
        self.rows += queued.rows
        self.size_bytes += queued.size_bytes

    def remove(self, queued: Member) -> bool:
        """Remove one request from any position; return False when it is not in the group."""
        flow = self._flows.get(queued.tenant_queue)
        if flow is None:
            return False
        # An evicted request is the newest one: it is not searched for.
        if flow[-1] is queued:
            flow.pop()
        else:
            try:
                flow.remove(queued)
            except ValueError:
                return False
        self._count_removed(queued, flow)
        return True

    def take(self, requests: Sequence[Member]) -> None:
        """Remove the first requests of `order`."""
        if len(requests) == self.count:
            self._flows.clear()
            self.count = self.rows = self.size_bytes = 0
            return
        for queued in requests:
            flow = self._flows[queued.tenant_queue]
            flow.popleft()
            self._count_removed(queued, flow)

    def _count_removed(self, queued: Member, flow: deque[Member]) -> None:
        if not flow:
            del self._flows[queued.tenant_queue]
        self.count -= 1
        self.rows -= queued.rows
        self.size_bytes -= queued.size_bytes

    def oldest(self) -> float:
        """Return the earliest arrival. The group is not empty, and in order of arrival."""
        # Without rounds, the first request of a flow is the oldest. A group in order of due time has no use for it.
        return min(min(map(_ARRIVED, flow)) if flow[-1].round else flow[0].arrived for flow in self._flows.values())

    def soonest(self) -> float:
        """Return the earliest due time. The group is not empty, and in order of due time."""
        return min(flow[0].due for flow in self._flows.values())

    def heads(self) -> Iterator[Member]:
        """Yield the next request of each band of each tenant."""
        return (flow[0] for flow in self._flows.values())

    def order(self) -> Iterator[Member]:
        """Yield all requests in execution order: each time one of the tenant with the least virtual time."""
        if len(self._flows) == 1:
            return iter(*self._flows.values())
        by_tenant: dict[Tenant, list[deque[Member]]] = {}
        for tenant_queue, flow in self._flows.items():
            by_tenant.setdefault(tenant_queue.tenant, []).append(flow)
        in_order = {tenant: _by_rank(flows) for tenant, flows in by_tenant.items()}
        return next(iter(in_order.values())) if len(in_order) == 1 else _interleaved(in_order)

    def front(self, max_rows: int, max_bytes: int) -> tuple[list[Member], bool]:
        """Return the first requests that may run together, at least one, and True when others remain."""
        if self.rows <= max_rows and self.size_bytes <= max_bytes:
            return list(self.order()), False
        rows = size = 0
        front: list[Member] = []
        for queued in self.order():
            rows += queued.rows
            size += queued.size_bytes
            if front and (rows > max_rows or size > max_bytes):
                break
            front.append(queued)
        return front, True


def add_in_turn(order: deque[M], queued: M) -> None:
    """Add a request behind those of its round."""
    if not order or order[-1].round <= queued.round:
        order.append(queued)
    else:
        order.insert(bisect_right(order, queued.round, key=_ROUND), queued)


def turn_key(queued: Member) -> tuple[float, float, float, float]:
    """Return the sort key of the next request of a band of a tenant; the least runs first."""
    return queued.tenant_queue.tenant.virtual_time, queued.rank, queued.due, queued.arrived


def _by_rank(flows: Sequence[Iterable[Member]]) -> Iterator[Member]:
    """Return the requests of a tenant's bands in order."""
    return iter(flows[0]) if len(flows) == 1 else heapq.merge(*flows, key=_RANK)


def _interleaved(in_order: dict[Tenant, Iterator[Member]]) -> Iterator[Member]:
    """Yield the requests of all tenants, each time one of the tenant with the least virtual time."""
    waiting = []
    for n, (tenant, requests) in enumerate(in_order.items()):
        first = next(requests)
        waiting.append((*turn_key(first), n, first, tenant, requests))
    heapq.heapify(waiting)
    while waiting:
        virtual_time, *_, n, queued, tenant, requests = waiting[0]
        yield queued
        after = next(requests, None)
        if after is None:
            heapq.heappop(waiting)
        else:
            virtual_time += queued.cost / tenant.weight
            entry = (virtual_time, after.rank, after.due, after.arrived, n, after, tenant, requests)
            heapq.heapreplace(waiting, entry)
