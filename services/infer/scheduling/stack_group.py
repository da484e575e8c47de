"""Stack group: queued requests that can run as one (same inputs, row shapes and outputs), in execution order.

    group ──> bands, best first ──> one flow for each tenant ──> requests in order of arrival, or of due time

A band holds the requests of one priority level, or those of a level that yielded. Among bands, the request with the
least rank goes first, among tenants the one with the least virtual time (`fairness`). With one band and one tenant,
nearly always, the order is that of the one flow.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Sequence
from operator import attrgetter
from typing import Protocol, TypeAlias, TypeVar

from services.infer.scheduling.fairness import TenantQueue


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

    __slots__ = ("_bands", "_by_due", "count", "rows", "size_bytes")

    def __init__(self, bands: int, *, by_due: bool) -> None:
        self._bands: tuple[Flows[Member], ...] = tuple({} for _ in range(bands))
        self._by_due = by_due
        self.count = self.rows = self.size_bytes = 0

    def add(self, queued: Member) -> None:
        flows = self._bands[queued.band]
        flow = flows.get(queued.tenant_queue)
        if flow is None:
            flows[queued.tenant_queue] = deque((queued,))
        elif self._by_due and queued.due < flow[-1].due:
            flow.insert(bisect_right(flow, queued.due, key=_DUE), queued)
        else:
            add_in_turn(flow, queued)
        self.count += 1
        self.rows += queued.rows
        self.size_bytes += queued.size_bytes

    def remove(self, queued: Member) -> bool:
        """Remove one request from any position; return False when it is not in the group."""
        flows = self._bands[queued.band]
        flow = flows.get(queued.tenant_queue)
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
        self._count_removed(queued, flows, flow)
        return True

    def take(self, requests: Sequence[Member]) -> None:
        """Remove the first requests of `order`."""
        if len(requests) == self.count:
            for flows in self._bands:
                flows.clear()
            self.count = self.rows = self.size_bytes = 0
            return
        for queued in requests:
            flows = self._bands[queued.band]
            flow = flows[queued.tenant_queue]
            flow.popleft()
            self._count_removed(queued, flows, flow)

    def _count_removed(self, queued: Member, flows: Flows[Member], flow: deque[Member]) -> None:
        if not flow:
            del flows[queued.tenant_queue]
        self.count -= 1
        self.rows -= queued.rows
        self.size_bytes -= queued.size_bytes

    def oldest(self) -> float:
        """Return the earliest arrival. The group is not empty, and in order of arrival."""
        # Without rounds, the first request of a flow is the oldest. A group in order of due time has no use for it.
        return min(
            min(map(_ARRIVED, flow)) if flow[-1].round else flow[0].arrived
            for flows in self._bands
            for flow in flows.values()
        )

    def soonest(self) -> float:
        """Return the earliest due time. The group is not empty, and in order of due time."""
        return min(flow[0].due for flows in self._bands for flow in flows.values())

    def heads(self) -> Iterator[Member]:
        """Yield the next request of each band."""
        for flows in self._bands:
            if flows:
                yield min((flow[0] for flow in flows.values()), key=fair_order_key)

    def order(self) -> Iterator[Member]:
        """Yield all requests in execution order."""
        bands = [flows for flows in self._bands if flows]
        if len(bands) > 1:
            return heapq.merge(*(_fair_order(flows) for flows in bands), key=_RANK)
        return _fair_order(bands[0]) if bands else iter(())

    def front(self, max_rows: int, max_bytes: int) -> tuple[list[Member], bool]:
        """Return the first requests that may run together, at least one, and True when others remain."""
        if self.rows <= max_rows and self.size_bytes <= max_bytes:
            flows = self._bands[0]
            if len(self._bands) == len(flows) == 1:
                return list(*flows.values()), False
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


def fair_order_key(queued: Member) -> tuple[float, float, float]:
    """Return the sort key of a request within its band; the least runs first."""
    return queued.tenant_queue.virtual_time, queued.due, queued.arrived


def _fair_order(flows: Flows[Member]) -> Iterator[Member]:
    """Yield the requests of all tenants, each time one of the tenant with the least virtual time."""
    if len(flows) == 1:
        return iter(*flows.values())
    return _interleaved(flows)


def _interleaved(flows: Flows[Member]) -> Iterator[Member]:
    waiting = [
        (*fair_order_key(flow[0]), n, tenant_queue, flow, 0) for n, (tenant_queue, flow) in enumerate(flows.items())
    ]
    heapq.heapify(waiting)
    while waiting:
        virtual_time, _, _, n, tenant_queue, flow, at = waiting[0]
        queued = flow[at]
        yield queued
        if at + 1 < len(flow):
            virtual_time, after = virtual_time + queued.cost / tenant_queue.weight, flow[at + 1]
            heapq.heapreplace(waiting, (virtual_time, after.due, after.arrived, n, tenant_queue, flow, at + 1))
        else:
            heapq.heappop(waiting)
