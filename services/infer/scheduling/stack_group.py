"""Calls that can be run as one (same inputs, row shapes and outputs), in the order in which they should be.

    lane ──> bands, best first ──> one flow for each tenant ──> calls: in order of arrival, or of due time

Among bands the call that has waited longest by its rank goes first, among tenants the one that is furthest behind
(`fairness`). With one band and one tenant, which is nearly always, the order is that of the one flow.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from operator import attrgetter
from typing import Protocol, TypeAlias, TypeVar

from services.infer.scheduling.fairness import TenantQueue


class Member(Protocol):
    """What a lane needs of a call."""

    rows: int
    size_bytes: int
    arrived: float
    due: float
    rank: float
    band: int
    share: TenantQueue


M = TypeVar("M", bound=Member)
Flows: TypeAlias = dict[TenantQueue, deque[M]]

_DUE, _RANK = attrgetter("due"), attrgetter("rank")


class StackGroup:
    """Calls with one key. What is taken out must be a front of `order`."""

    __slots__ = ("_bands", "_by_due", "calls", "rows", "size_bytes")

    def __init__(self, bands: int, *, by_due: bool) -> None:
        self._bands: tuple[Flows[Member], ...] = tuple({} for _ in range(bands))
        self._by_due = by_due
        self.calls = self.rows = self.size_bytes = 0

    def add(self, call: Member) -> None:
        flows = self._bands[call.band]
        flow = flows.get(call.share)
        if flow is None:
            flows[call.share] = deque((call,))
        elif self._by_due and call.due < flow[-1].due:
            flow.insert(bisect_right(flow, call.due, key=_DUE), call)
        else:
            flow.append(call)
        self.calls += 1
        self.rows += call.rows
        self.size_bytes += call.size_bytes

    def remove(self, call: Member) -> bool:
        """Takes one call out of the middle; False when it is not in."""
        flows = self._bands[call.band]
        flow = flows.get(call.share)
        if flow is None or call not in flow:
            return False
        flow.remove(call)
        self._left(call, flows, flow)
        return True

    def take(self, calls: Sequence[Member]) -> None:
        """Takes out the first calls of `order`."""
        if len(calls) == self.calls:
            for flows in self._bands:
                flows.clear()
            self.calls = self.rows = self.size_bytes = 0
            return
        for call in calls:
            flows = self._bands[call.band]
            flow = flows[call.share]
            flow.popleft()
            self._left(call, flows, flow)

    def _left(self, call: Member, flows: Flows[Member], flow: deque[Member]) -> None:
        if not flow:
            del flows[call.share]
        self.calls -= 1
        self.rows -= call.rows
        self.size_bytes -= call.size_bytes

    def oldest(self) -> float:
        """When the first of its calls came. The lane is not empty."""
        # In order of due time the first to come may be anywhere; then nobody asks.
        return min(flow[0].arrived for flows in self._bands for flow in flows.values())

    def soonest(self) -> float:
        """The earliest due time among its calls, when they are in that order. The lane is not empty."""
        return min(flow[0].due for flows in self._bands for flow in flows.values())

    def heads(self) -> Iterator[Member]:
        """The next call of each band."""
        for flows in self._bands:
            if flows:
                yield min((flow[0] for flow in flows.values()), key=behind)

    def of(self, band: int, share: TenantQueue) -> Iterable[Member]:
        """The calls of one tenant in one band."""
        return self._bands[band].get(share, ())

    def order(self) -> Iterator[Member]:
        """All calls, in the order in which they should run."""
        bands = [flows for flows in self._bands if flows]
        if len(bands) > 1:
            return heapq.merge(*(_fairly(flows) for flows in bands), key=_RANK)
        return _fairly(bands[0]) if bands else iter(())

    def front(self, max_rows: int, max_bytes: int) -> tuple[list[Member], bool]:
        """The first calls, as many as may run together, and at least one; and whether others are left for that."""
        if self.rows <= max_rows and self.size_bytes <= max_bytes:
            flows = self._bands[0]
            if len(self._bands) == len(flows) == 1:
                return list(*flows.values()), False
            return list(self.order()), False
        rows = size = 0
        front: list[Member] = []
        for call in self.order():
            rows += call.rows
            size += call.size_bytes
            if front and (rows > max_rows or size > max_bytes):
                break
            front.append(call)
        return front, True


def behind(call: Member) -> tuple[float, float, float]:
    """Whose turn it is among the calls of one band: the least."""
    return call.share.tag, call.due, call.arrived


def _fairly(flows: Flows[Member]) -> Iterator[Member]:
    """The calls of all tenants, always one of the tenant that is furthest behind."""
    if len(flows) == 1:
        return iter(*flows.values())
    return _interleaved(flows)


def _interleaved(flows: Flows[Member]) -> Iterator[Member]:
    waiting = [(*behind(flow[0]), n, share, flow, 0) for n, (share, flow) in enumerate(flows.items())]
    heapq.heapify(waiting)
    while waiting:
        tag, _, _, n, share, flow, at = waiting[0]
        call = flow[at]
        yield call
        if at + 1 < len(flow):
            tag, after = tag + call.rows / share.weight, flow[at + 1]
            heapq.heapreplace(waiting, (tag, after.due, after.arrived, n, share, flow, at + 1))
        else:
            heapq.heappop(waiting)
