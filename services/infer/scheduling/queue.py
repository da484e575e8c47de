"""Queue of one model version: bounded, in groups of requests that can be stacked.

WAITING ──take──> RUNNING ──> delivered
   ├──expire, discard──> removed: never executed
   └──expire, where the model delays──> WAITING, behind the others of its level

Tenants take turns, by cost and weight; levels of priority order the requests of one tenant.

Bounds: requests by priority level, bytes over all levels. At a bound, a request is rejected; but when several tenants
wait, the tenant with the most queued requests (or bytes) loses its newest, so that no tenant can fill the queue alone.
For memory, a tenant's own requests of worse levels are evicted, too. When more than a batch of one tenant waits, its
connections take turns, by rounds of one row (or 16 KiB) of each; at the bound, the connection with the most loses its
newest.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from operator import attrgetter
from typing import NamedTuple, cast

from services.infer.requests.request import InferenceRequest
from services.infer.scheduling import batcher, slo
from services.infer.scheduling.batcher import NOTHING, BatchPolicy, Decision, Run, Wait
from services.infer.scheduling.cost import CostCurve
from services.infer.scheduling.deadline_heap import DeadlineHeap
from services.infer.scheduling.delivery import PendingRequest, Receiver
from services.infer.scheduling.fairness import Tenant, TenantQueue, Tenants
from services.infer.scheduling.long_batches import LongBatches
from services.infer.scheduling.output_sizes import UNBOUNDED, UNRESERVED_BYTES, OutputSizes
from services.infer.scheduling.rules import Rules
from services.infer.scheduling.stack_group import Member, StackGroup, add_in_turn, turn_key
from shoal.errors import ResourceExhausted

# Input of a request that counts as much as a row: large rows take longer than small ones.
_ROW_BYTES = 16 << 10

_RANK, _ROUND = attrgetter("rank"), attrgetter("round")
NO_TENANT = TenantQueue(Tenant("", 1.0, 0.0))


class QueuedRequest(PendingRequest):
    """One request from its arrival to its outcome. The loop's thread writes; a worker thread only reads."""

    __slots__ = (
        "arrived",
        "band",
        "cost",
        "deadline",
        "due",
        "expires",
        "is_waiting",
        "level",
        "on_abandoned",
        "rank",
        "request",
        "round",
        "rows",
        "size_bytes",
        "tenant_queue",
        "yields_at",
    )

    def __init__(self, request: InferenceRequest, arrived: float, deadline: float, receiver: Receiver) -> None:
        super().__init__(receiver)
        self.request = request
        self.rows = request.rows
        self.size_bytes = request.size_bytes
        self.cost = request.rows + request.size_bytes // _ROW_BYTES
        """Part of the model that the request takes from its tenant and its connection, in rows."""
        self.arrived = arrived
        """Seconds, on the scheduler's clock."""
        self.rank = 0.0
        """Time by which the priority bands of a tenant are merged, where there are several."""
        self.deadline = self.expires = deadline
        """Useless to the caller at or after `deadline`; never started at or after `expires`."""
        self.yields_at = math.inf
        """From then on the request waits behind the others of its level."""
        self.round = 0.0
        """Place among the requests of its tenant: its connections take turns when more than a batch waits."""
        self.due = math.inf
        """Time by which the model's goal wants the request completed."""
        self.level = self.band = 0
        self.tenant_queue = NO_TENANT
        self.is_waiting = False
        """True while the request is in a queue."""
        self.on_abandoned: Callable[[], None] | None = None
        """Set by a worker that ends its batch when all callers have left."""

    @property
    def tenant(self) -> str:
        return self.tenant_queue.tenant.name


@dataclass(frozen=True)
class QueueLimits:
    """Bounds of one model version's queue."""

    calls: int = 2048
    """About a second of one process at its fastest: a request that would wait longer is better sent elsewhere."""
    size_bytes: int = 256 << 20
    """Memory of queued inputs: two of the largest requests, or many small ones."""


class Batch:
    """Requests that run as one."""

    __slots__ = ("fired", "leaves_rows", "requests", "reserved", "rows", "size_bytes")

    def __init__(
        self, requests: Sequence[QueuedRequest], rows: int, size_bytes: int, fired: str, *, leaves_rows: bool
    ) -> None:
        self.requests = requests
        self.rows = rows
        self.size_bytes = size_bytes
        self.fired = fired
        """Reason for running the batch now, in one word."""
        self.leaves_rows = leaves_rows
        """True when requests remain in the queue: the model has a backlog."""
        self.reserved: Sequence[int] = ()
        """Bytes that the memory of each request counts for its outputs until they exist; empty: none."""


class Queue:
    """Adds at the back, takes batches from the front. Pure: no event loop, and no clock but the times passed in."""

    def __init__(
        self,
        model: str,
        limits: QueueLimits,
        policy: BatchPolicy,
        rules: Rules,
        cost: CostCurve,
        outputs: OutputSizes = UNBOUNDED,
        long_batches: LongBatches | None = None,
    ) -> None:
        self._model = model
        self._long_batches = long_batches or LongBatches()
        self._outputs = outputs
        self._limits = limits
        self._policy = policy
        self._rules = rules
        self._cost = cost
        self._has_goal = policy.has_goal
        self._waits = policy.is_static or policy.has_goal
        # The last emptied group, for reuse by the next new key.
        self._spare_group: StackGroup | None = None
        # Where a level delays timed-out requests, a second band behind the level's own holds them.
        self._bands_each = 2 if any(level.delays for level in rules.levels) else 1
        self._bands = self._bands_each * len(rules.levels)
        self._max_requests = tuple(level.calls or limits.calls for level in rules.levels)
        self._waiting = [0] * len(rules.levels)
        self._tenants = Tenants(rules.weights)
        self._groups: dict[Hashable, StackGroup] = {}
        self._loads: dict[int, _Loads] = {}
        self._count = 0
        self.rows = 0
        self.size_bytes = 0
        self.arrivals = slo.Arrivals()
        self._last_due = -math.inf
        self._expiry: DeadlineHeap[QueuedRequest] = DeadlineHeap()
        self._yielding: DeadlineHeap[QueuedRequest] = DeadlineHeap()

    def __len__(self) -> int:
        return self._count

    def holds(self, request: InferenceRequest) -> bool:
        """Return True when exactly this request waits here."""
        group = self._groups.get(request.key)
        return group is not None and any(cast("QueuedRequest", member).request is request for member in group.order())

    def oldest(self) -> float:
        """Return the earliest arrival of the first request of each flow; infinite when none waits."""
        return min((group.oldest() for group in list(self._groups.values()) if group.count), default=math.inf)

    def add(self, queued: QueuedRequest, tenant: str, retry_after_ms: Callable[[], int]) -> Sequence[QueuedRequest]:
        """Add a request at the back; return the requests that are evicted for it.

        Raises:
            ResourceExhausted: the queue is full; retry after `retry_after_ms()`. An empty queue accepts any request.
        """
        level = queued.level
        queued.band = level * self._bands_each
        queued.tenant_queue = self._tenants.of(tenant, queued.band)
        evicted: Sequence[QueuedRequest] = ()
        size = self.size_bytes + queued.size_bytes
        if self._waiting[level] >= self._max_requests[level] or (size > self._limits.size_bytes and self._count):
            evicted = self._choose_victims(queued)
            if not evicted:
                raise self._full_error(level, retry_after_ms())
            for victim in evicted:
                self.discard(victim)
        self._insert(queued, queued.arrived)
        self._count += 1
        self._waiting[level] += 1
        self.rows += queued.rows
        self.size_bytes += queued.size_bytes
        if self._has_goal:
            self.arrivals.add(queued.rows)
            self._last_due = max(self._last_due, queued.due)
        if queued.expires != math.inf:
            self._expiry.add(queued.expires, queued)
        if queued.yields_at != math.inf:
            self._yielding.add(queued.yields_at, queued)
        return evicted

    def discard(self, queued: QueuedRequest) -> bool:
        """Remove one request; return False when it is not (or no longer) queued."""
        if not queued.is_waiting:
            return False
        self._unlink(queued)
        self._count -= 1
        self._waiting[queued.level] -= 1
        self.rows -= queued.rows
        self.size_bytes -= queued.size_bytes
        return True

    def next_expiry(self) -> float:
        """Return the next time at which a request expires or yields; infinite when none does."""
        return min(self._expiry.next(), self._yielding.next())

    def expire(self, now: float) -> list[QueuedRequest]:
        """Remove and return the expired requests, and move those that yield behind the others of their level."""
        for queued in self._yielding.until(now):
            self._unlink(queued)
            queued.band += 1
            queued.tenant_queue = self._tenants.of(queued.tenant, queued.band)
            queued.round = 0.0
            self._insert(queued, now)
        expired = list(self._expiry.until(now))
        for queued in expired:
            self.discard(queued)
        return expired

    def shed(self, horizon: float) -> list[QueuedRequest]:
        """Remove and return the requests that are useless at `horizon`, the end of the next batch."""
        shed: list[QueuedRequest] = []
        while (queued := self._expiry.first()) is not None and queued.deadline <= horizon:
            self.discard(queued)
            shed.append(queued)
        return shed

    def rows_ahead(self, queued: QueuedRequest, tenant: str) -> float:
        """Return the rows that would run before a request added now: a low estimate."""
        if queued.due < self._last_due:
            # The request goes before an unknown number of queued ones.
            return 0
        own = self._tenants.find(tenant)
        if own is None or not own.count:
            return 0
        band = queued.level * self._bands_each
        own_rows = sum(tenant_queue.rows for better, tenant_queue in own.queues.items() if better < band)
        if (same := own.queues.get(band)) is not None:
            own_rows += _rows_before(same, queued)
        # While rows of the tenant run, other tenants get their shares of the instances.
        return sum(
            own_rows if other is own else min(other.rows, own_rows * other.weight / own.weight)
            for other in self._tenants.waiting()
        )

    def take(
        self,
        now: float,
        *,
        max_rows: int = 0,
        instances: int = 1,
        is_idle: bool = True,
        is_late: bool = False,
        room_comes: bool = False,
    ) -> Batch | Wait:
        """Remove and return the next batch, or return how long to wait for one. Call `expire` first.

        Args:
            max_rows: bound of rows where the policy runs what is queued; 0: the policy's own bound.
            instances: executions that may run at the same time.
            is_idle: the requests found an idle instance, and did not wait for one.
            is_late: never wait for a better batch.
            room_comes: running batches have reserved memory for outputs. Requests whose own find no room wait until
                these end.
        """
        if not self._groups:
            return NOTHING
        if self._waits and not is_late:
            return self._take_when_due(now, instances, room_comes=room_comes)
        key = self._next_key()
        group = self._groups[key]
        front, is_cut = self._front(key, group, now, max_rows)
        if room_comes and self._finds_no_room(front[0]):
            return NOTHING
        if is_late:
            fired = "closing"
        elif self._policy.max_rows == 1:
            fired = "alone"
        elif is_cut or group.rows >= self._policy.max_rows:
            fired = "full"
        else:
            fired = "idle" if is_idle else "queued"
        return self._pop(key, front, fired)

    def _finds_no_room(self, queued: QueuedRequest) -> bool:
        size = self._outputs.reservation(queued.request.key, queued.rows)
        return size > UNRESERVED_BYTES and size > queued.request.memory.room

    def _take_when_due(self, now: float, instances: int, *, room_comes: bool) -> Batch | Wait:
        ready: dict[Hashable, StackGroup] = {}
        runs: dict[Hashable, tuple[list[QueuedRequest], str]] = {}
        soonest: tuple[float, Hashable, list[QueuedRequest]] | None = None
        rate = self.arrivals.per_second(now) if self._has_goal else 0.0
        for key, group in self._candidates().items():
            front, is_cut = self._front(key, group, now)
            if room_comes and self._finds_no_room(front[0]):
                continue
            is_full = is_cut or group.rows >= self._outputs.max_rows(key)
            decision = self._decide(group, front, is_full, now, rate, instances)
            if isinstance(decision, Run):
                ready[key], runs[key] = group, (front[: decision.count], decision.fired)
            elif decision.until is not None and (soonest is None or decision.until < soonest[0]):
                soonest = decision.until, key, front
        if not ready:
            return Wait(soonest[0]) if soonest else NOTHING
        key = self._first_key(ready)
        requests, fired = runs[key]
        if soonest and self._has_goal:
            until, waiting, front = soonest
            # A group that waits for more rows must not become late through one that does not wait.
            if until < now + self._cost.expected(sum(queued.rows for queued in requests)):
                return self._pop(waiting, front, "slo")
        return self._pop(key, requests, fired)

    def _decide(
        self, group: StackGroup, front: list[QueuedRequest], is_full: bool, now: float, rate: float, instances: int
    ) -> Decision:
        if self._has_goal:
            return slo.decide(front, now, self._policy, self._cost, rate=rate, instances=instances, is_full=is_full)
        return batcher.decide(front, group.oldest(), now, self._policy, is_full=is_full)

    def _front(
        self, key: Hashable, group: StackGroup, now: float, max_rows: int = 0
    ) -> tuple[list[QueuedRequest], bool]:
        most = min(max_rows or self._policy.max_rows, self._outputs.max_rows(key))
        row_bytes = self._outputs.row_bytes(key)
        if row_bytes * min(most, group.rows) > UNRESERVED_BYTES:
            # The outputs are reserved before the run: what finds no room now waits for a later batch.
            head = cast("QueuedRequest", next(group.heads()))
            most = min(most, max(head.request.memory.room // row_bytes, 1))
        front, is_cut = cast("tuple[list[QueuedRequest], bool]", group.front(most, self._policy.max_bytes))
        if group.size_bytes > self._long_batches.from_bytes:
            count = self._joining(front, now)
            return front[:count], is_cut or count < len(front)
        return front, is_cut

    def _joining(self, front: Sequence[QueuedRequest], now: float) -> int:
        """Return the number of requests from the first on that save time as one batch."""
        size = front[0].size_bytes
        for count, queued in enumerate(front[1:], 1):
            if not self._long_batches.joins(size, queued.size_bytes, is_alone=count == 1, now=now):
                return count
            size += queued.size_bytes
        return len(front)

    def _next_key(self) -> Hashable:
        """Return the key of the group whose turn is next, without a policy."""
        if len(self._groups) == 1:
            return next(iter(self._groups))
        first = self._tenants.first()
        assert first is not None, "requests are queued"
        return _head(first).request.key

    def _candidates(self) -> dict[Hashable, StackGroup]:
        """Return the groups that are considered: all, unless there are very many."""
        if len(self._groups) <= _MAX_DECIDED_GROUPS:
            return self._groups
        if self._has_goal:
            some = heapq.nsmallest(_MAX_DECIDED_GROUPS, self._groups.items(), key=lambda item: item[1].soonest())
        else:
            some = list(islice(self._groups.items(), _MAX_DECIDED_GROUPS))
        key = self._next_key()
        return {key: self._groups[key], **dict(some)}

    def _first_key(self, groups: dict[Hashable, StackGroup]) -> Hashable:
        """Return the key of the group whose turn is next."""
        if len(groups) == 1:
            return next(iter(groups))
        best: dict[TenantQueue, tuple[Member, Hashable]] = {}
        for key, group in groups.items():
            for head in group.heads():
                known = best.get(head.tenant_queue)
                if known is None or (head.due, head.arrived) < (known[0].due, known[0].arrived):
                    best[head.tenant_queue] = head, key
        return min(best.values(), key=_turn_of_first)[1]

    def _pop(self, key: Hashable, requests: list[QueuedRequest], fired: str) -> Batch:
        if self._loads:
            self._loads = {}
        group = self._groups[key]
        group.take(requests)
        if not group.count:
            self._spare_group = self._groups.pop(key)
        elif len(self._groups) > _MAX_DECIDED_GROUPS:
            # Groups that have waited for longer are considered first.
            self._groups[key] = self._groups.pop(key)
        first = requests[0]
        self._tenants.serving(first.tenant_queue.tenant)
        advanced_queues = {first.tenant_queue: None}
        rows = size = 0
        for queued in requests:
            queued.is_waiting = False
            tenant_queue = queued.tenant_queue
            if tenant_queue is not first.tenant_queue:
                advanced_queues[tenant_queue] = None
            tenant_queue.count -= 1
            tenant_queue.rows -= queued.rows
            tenant = tenant_queue.tenant
            tenant.count -= 1
            tenant.size_bytes -= queued.size_bytes
            tenant.virtual_time += queued.cost / tenant.weight
            rows += queued.rows
            size += queued.size_bytes
            self._waiting[queued.level] -= 1
        self._count -= len(requests)
        self.rows -= rows
        self.size_bytes -= size
        for tenant_queue in advanced_queues:
            if tenant_queue.tenant.count:
                self._tenants.advanced(tenant_queue.tenant)
            if not tenant_queue.count:
                tenant_queue.order.clear()
                if tenant_queue.is_crowded:
                    tenant_queue.is_crowded = False
                    tenant_queue.rounds.clear()
        return Batch(requests, rows, size, fired, leaves_rows=self._count > 0)

    def _insert(self, queued: QueuedRequest, arrived: float) -> None:
        if self._loads:
            self._loads = {}
        tenant_queue = queued.tenant_queue
        if tenant_queue.is_crowded or tenant_queue.rows > self._policy.max_rows:
            self._set_round(queued, tenant_queue)
        group = self._groups.get(queued.request.key)
        if group is None:
            group = self._spare_group or StackGroup(by_due=self._has_goal)
            self._groups[queued.request.key], self._spare_group = group, None
        if self._bands > 1:
            # Distance of levels in time: a request that waits long enough overtakes later ones (`Rules.aging_s`).
            gap_s = min(self._rules.aging_s, _MAX_LEVEL_GAP_S)
            queued.rank = arrived + queued.band * gap_s
        group.add(queued)
        queued.is_waiting = True
        tenant_queue.count += 1
        tenant_queue.rows += queued.rows
        tenant = tenant_queue.tenant
        tenant.count += 1
        tenant.size_bytes += queued.size_bytes
        if tenant_queue.is_crowded:
            add_in_turn(tenant_queue.order, queued)
        else:
            tenant_queue.order.append(queued)
        if tenant.count == 1:
            self._tenants.advanced(tenant)
        elif len(tenant_queue.order) > 2 * tenant_queue.count + _ORDER_SLACK:
            tenant_queue.order = deque(other for other in tenant_queue.order if _is_in(other, tenant_queue))

    def _set_round(self, queued: QueuedRequest, tenant_queue: TenantQueue) -> None:
        """Give the request its round, while more waits than one batch takes."""
        _drop_first(tenant_queue)
        if not tenant_queue.order:
            tenant_queue.rounds.clear()
        # A goal has an order of its own: that of the due times.
        tenant_queue.is_crowded = bool(tenant_queue.order) and not self._has_goal
        queued.round = (
            tenant_queue.add_round(queued.request.memory.sender, queued.cost) if tenant_queue.is_crowded else 0.0
        )

    def _unlink(self, queued: QueuedRequest) -> None:
        if self._loads:
            self._loads = {}
        group = self._groups[queued.request.key]
        group.remove(queued)
        if not group.count:
            del self._groups[queued.request.key]
        queued.is_waiting = False
        queued.tenant_queue.count -= 1
        queued.tenant_queue.rows -= queued.rows
        queued.tenant_queue.tenant.count -= 1
        queued.tenant_queue.tenant.size_bytes -= queued.size_bytes
        order = queued.tenant_queue.order
        # An evicted request is the newest one: it is not searched for.
        if order[-1] is queued:
            order.pop()
        else:
            order.remove(queued)

    def _full_error(self, level: int, after_ms: int) -> ResourceExhausted:
        return ResourceExhausted(
            f"Exceeds maximum queue size of model '{self._model}': {self._waiting[level]} requests wait, "
            f"{self.size_bytes} bytes in all; at most {self._max_requests[level]} and {self._limits.size_bytes} may; "
            f"retry after {after_ms} ms",
            retry_after_ms=after_ms,
        )

    def _choose_victims(self, queued: QueuedRequest) -> list[QueuedRequest]:
        """Return the requests to evict for `queued`; none when `queued` itself is to be rejected."""
        excess = self._waiting[queued.level] + 1 - self._max_requests[queued.level]
        excess_bytes = self.size_bytes + queued.size_bytes - self._limits.size_bytes
        victims: dict[QueuedRequest, None] = {}
        if excess_bytes > 0:
            for victim in self._candidates_for_bytes(queued):
                if excess_bytes <= 0:
                    break
                victims[victim] = None
                excess_bytes -= victim.size_bytes
                excess -= victim.level == queued.level
        if excess > 0:
            for victim in self._candidates_for_calls(queued):
                if excess <= 0:
                    break
                excess -= victim not in victims
                victims[victim] = None
        return list(victims) if excess <= 0 and excess_bytes <= 0 else []

    def _candidates_for_bytes(self, queued: QueuedRequest) -> Iterator[QueuedRequest]:
        """Yield the requests with a weaker claim to memory than `queued`, the weakest first.

        They are the newest of the tenant with the most bytes, else those of worse levels of the request's own tenant.
        """
        own, loads = queued.tenant_queue.tenant, self._byte_loads()
        after = loads.by_tenant.get(own.name, 0.0) + queued.size_bytes / own.weight
        heaviest = self._tenants.find(loads.heaviest)
        if heaviest is not None and heaviest is not own:
            load = loads.by_tenant[loads.heaviest]
            for _, tenant_queue in sorted(heaviest.queues.items(), reverse=True):
                for victim in _newest_first(tenant_queue):
                    if load <= after:
                        break
                    load -= victim.size_bytes / heaviest.weight
                    yield victim
        for band, tenant_queue in sorted(own.queues.items(), reverse=True):
            if band // self._bands_each > queued.level:
                yield from _newest_first(tenant_queue)
        yield from _later_rounds(queued)

    def _candidates_for_calls(self, queued: QueuedRequest) -> Iterator[QueuedRequest]:
        """Yield the requests with a weaker claim to a place in the level of `queued`, the weakest first."""
        first_band = queued.level * self._bands_each
        bands = range(first_band + self._bands_each - 1, first_band - 1, -1)
        loads = self._loads.get(queued.level) or self._sum_loads(queued.level, bands)
        own = loads.by_tenant.get(queued.tenant)
        if len(loads.by_tenant) < (1 if own is None else 2):
            yield from _later_rounds(queued)
            return
        load = loads.by_tenant[loads.heaviest]
        heaviest = self._tenants.find(loads.heaviest)
        assert heaviest is not None, "it has requests"
        for band in bands:
            tenant_queue = heaviest.queues.get(band)
            if tenant_queue is None or not tenant_queue.count:
                continue
            for victim in _newest_first(tenant_queue):
                # Only while the tenant holds more than that of `queued`: else both would evict each other for ever.
                if load <= (own or 0.0) + 1 / queued.tenant_queue.tenant.weight:
                    yield from _later_rounds(queued)
                    return
                load -= 1 / heaviest.weight
                yield victim

    def _sum_loads(self, level: int, bands: Sequence[int]) -> _Loads:
        """Return the loads of one level, and keep them until the queue changes: rejections change nothing."""
        by_tenant: dict[str, float] = {}
        for tenant in self._tenants.waiting():
            count = sum(tenant.queues[band].count for band in bands if band in tenant.queues)
            if count:
                by_tenant[tenant.name] = count / tenant.weight
        loads = self._loads[level] = _loads(by_tenant)
        return loads

    def _byte_loads(self) -> _Loads:
        """Return the loads in bytes, over all levels; they are kept, too."""
        loads = self._loads.get(_IN_BYTES)
        if loads is None:
            by_tenant = {each.name: each.size_bytes / each.weight for each in self._tenants.waiting()}
            loads = self._loads[_IN_BYTES] = _loads(by_tenant)
        return loads


# Longest distance of levels: 30 years, and still exact to a microsecond when added to a clock.
_MAX_LEVEL_GAP_S = 1e9


# Deciding for hundreds of shapes each time would take longer than many a model runs: only the groups with the earliest
# goals are considered.
_MAX_DECIDED_GROUPS = 16

_ORDER_SLACK = 64

# Key of the loads in bytes, beside those of the levels.
_IN_BYTES = -1


class _Loads(NamedTuple):
    """Queued requests of each tenant in one level, or their bytes in all levels, divided by the tenant's weight."""

    by_tenant: dict[str, float]
    heaviest: str
    """Tenant with the most; empty without any."""


def _loads(by_tenant: dict[str, float]) -> _Loads:
    return _Loads(by_tenant, max(by_tenant, key=by_tenant.__getitem__, default=""))


def _is_in(queued: QueuedRequest, tenant_queue: TenantQueue) -> bool:
    """Return True unless a request of the queue's order has run, or has moved to another band."""
    return queued.is_waiting and queued.tenant_queue is tenant_queue


def _newest_first(tenant_queue: TenantQueue) -> Iterator[QueuedRequest]:
    """Yield the requests of a tenant in one band, the last of the order first. The queue must not change meanwhile."""
    order: deque[QueuedRequest] = tenant_queue.order
    while order and not _is_in(order[-1], tenant_queue):
        order.pop()
    return (queued for queued in reversed(order) if _is_in(queued, tenant_queue))


def _later_rounds(queued: QueuedRequest) -> Iterator[QueuedRequest]:
    """Yield the waiting requests of the tenant that are at least two rounds later than `queued` would be, last first.

    Their connections hold more of the queue than that of `queued`.
    """
    tenant_queue = queued.tenant_queue
    if not tenant_queue.is_crowded:
        return
    _drop_first(tenant_queue)
    own = tenant_queue.next_round(queued.request.memory.sender)
    for victim in _newest_first(tenant_queue):
        if victim.round < own + queued.cost + 1:
            return
        yield victim


def _drop_first(tenant_queue: TenantQueue) -> None:
    """Drop the first requests of the order that no longer wait."""
    order: deque[QueuedRequest] = tenant_queue.order
    while order and not _is_in(order[0], tenant_queue):
        order.popleft()


def _head(tenant: Tenant) -> QueuedRequest:
    """Return the next request of a tenant that has some."""
    heads: list[QueuedRequest] = []
    for tenant_queue in tenant.queues.values():
        if tenant_queue.count:
            _drop_first(tenant_queue)
            heads.append(tenant_queue.order[0])
    return heads[0] if len(heads) == 1 else min(heads, key=_RANK)


def _rows_before(tenant_queue: TenantQueue, queued: QueuedRequest) -> int:
    """Return the rows of a band that run before a request that is added to it now: a low estimate."""
    if not tenant_queue.is_crowded:
        return tenant_queue.rows
    _drop_first(tenant_queue)
    place = bisect_right(tenant_queue.order, tenant_queue.next_round(queued.request.memory.sender), key=_ROUND)
    return min(tenant_queue.rows, place)


def _turn_of_first(found: tuple[Member, Hashable]) -> tuple[float, float, float, float]:
    return turn_key(found[0])
