"""The calls that wait for one model version: bounded, in lanes of calls that can be stacked.

WAITING ──take──> RUNNING ──> answered
   ├──expire, discard──> gone: it is never executed
   └──expire, where the model delays──> WAITING, behind the others of its level

Bounds: calls by level of priority, bytes over all. When one is reached, a call is refused; but where several tenants
wait, the one that holds the most gives up its newest, so that nobody is kept out by a flood of somebody else's. For
memory, calls of worse levels give way too.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Protocol, cast

from services.infer.requests.outcome import InferenceResult, Outcome
from services.infer.requests.request import InferenceRequest
from services.infer.scheduling import batcher, slo
from services.infer.scheduling.batcher import NOTHING, BatchPolicy, Decision, Run, Wait
from services.infer.scheduling.cost import CostCurve
from services.infer.scheduling.deadline_heap import DeadlineHeap
from services.infer.scheduling.fairness import TenantQueue, TenantQueues
from services.infer.scheduling.rules import Rules
from services.infer.scheduling.stack_group import Member, StackGroup, behind
from shoal.errors import ResourceExhausted

_ARRIVED, _RANK = attrgetter("arrived"), attrgetter("rank")
NOBODY = TenantQueue("", 1.0, 0.0)


class Receiver(Protocol):
    """Who gets what became of one call: exactly one of these is called, on the loop, once."""

    def answered(self, answer: InferenceResult) -> None: ...

    def failed(self, error: BaseException) -> None: ...


class QueuedRequest:
    """One call from its arrival to its answer. The loop's thread writes; a worker thread only reads."""

    __slots__ = (
        "arrived",
        "band",
        "call",
        "deadline",
        "due",
        "expires",
        "is_abandoned",
        "is_waiting",
        "level",
        "on_abandoned",
        "outcome",
        "rank",
        "receiver",
        "rows",
        "share",
        "size_bytes",
        "yields_at",
    )

    def __init__(self, call: InferenceRequest, arrived: float, deadline: float, receiver: Receiver) -> None:
        self.call = call
        self.receiver = receiver
        self.rows = call.rows
        self.size_bytes = call.size_bytes
        self.arrived = self.rank = arrived
        """Seconds, on the scheduler's clock."""
        self.deadline = self.expires = deadline
        """Of no use to the caller at or after its deadline, and not to be started at or after it expires."""
        self.yields_at = math.inf
        """It stands back behind the others of its level from then on."""
        self.due = math.inf
        """When the model's goal wants it answered."""
        self.level = self.band = 0
        self.share = NOBODY
        self.outcome: Outcome | None = None
        """For a model whose answers wait for each other."""
        self.is_waiting = False
        """It is in a queue."""
        self.is_abandoned = False
        """Nobody waits for the answer any more."""
        self.on_abandoned: Callable[[], None] | None = None
        """Set by what runs it, and wants to hear of that."""


@dataclass(frozen=True)
class QueueLimits:
    """Bounds of one model version's queue."""

    calls: int = 2048
    """About a second of what one process answers at its fastest: what would wait longer is better off elsewhere."""
    size_bytes: int = 256 << 20
    """Inputs that wait are memory held: two of the largest requests, or many small ones."""


class Batch:
    """Calls that are run as one."""

    __slots__ = ("calls", "fired", "leaves_rows", "rows")

    def __init__(self, calls: Sequence[QueuedRequest], rows: int, fired: str, *, leaves_rows: bool) -> None:
        self.calls = calls
        self.rows = rows
        self.fired = fired
        """Why it was run when it was, in a word."""
        self.leaves_rows = leaves_rows
        """There was more than fits: the model is behind."""


class Queue:
    """Adds at the back, takes batches from the front. Knows no event loop, and no clock but the times it is told."""

    def __init__(self, model: str, limits: QueueLimits, policy: BatchPolicy, rules: Rules, cost: CostCurve) -> None:
        self._model = model
        self._limits = limits
        self._policy = policy
        self._rules = rules
        self._cost = cost
        self._has_goal = policy.has_goal
        self._waits = policy.is_static or policy.has_goal
        self._spare: StackGroup | None = None  # The last that was emptied: most often, the next call has its key.
        # Where a level delays what ran out, the band behind each level's own is for that.
        self._bands_each = 2 if any(level.delays for level in rules.levels) else 1
        self._bands = self._bands_each * len(rules.levels)
        self._most = tuple(level.calls or limits.calls for level in rules.levels)
        self._waiting = [0] * len(rules.levels)
        self._shares = tuple(TenantQueues(rules.weights) for _ in range(self._bands))
        self._lanes: dict[Hashable, StackGroup] = {}
        self._calls = 0
        self.rows = 0
        self.size_bytes = 0
        self.arrivals = slo.Arrivals()
        self._last_due = -math.inf
        self._expiry: DeadlineHeap[QueuedRequest] = DeadlineHeap()
        self._yielding: DeadlineHeap[QueuedRequest] = DeadlineHeap()

    def __len__(self) -> int:
        return self._calls

    def holds(self, call: InferenceRequest) -> bool:
        """Whether this very call waits here."""
        lane = self._lanes.get(call.key)
        return lane is not None and any(cast("QueuedRequest", member).call is call for member in lane.order())

    def add(self, pending: QueuedRequest, tenant: str, retry_after_ms: Callable[[], int]) -> Sequence[QueuedRequest]:
        """Puts a call at the back; returns those that had to give up their place for it.

        Raises:
            ResourceExhausted: the queue is full, and may have room in `retry_after_ms()`. An empty one takes any call.
        """
        level = pending.level
        pending.band = level * self._bands_each
        pending.share = self._shares[pending.band].of(tenant)
        evicted: Sequence[QueuedRequest] = ()
        size = self.size_bytes + pending.size_bytes
        if self._waiting[level] >= self._most[level] or (size > self._limits.size_bytes and self._calls):
            evicted = self._make_room(pending)
            if not evicted:
                raise self._full(level, retry_after_ms())
            for victim in evicted:
                self.discard(victim)
        self._insert(pending, pending.arrived)
        self._calls += 1
        self._waiting[level] += 1
        self.rows += pending.rows
        self.size_bytes += pending.size_bytes
        if self._has_goal:
            self.arrivals.add(pending.rows)
            self._last_due = max(self._last_due, pending.due)
        if pending.expires != math.inf:
            self._expiry.add(pending.expires, pending)
        if pending.yields_at != math.inf:
            self._yielding.add(pending.yields_at, pending)
        return evicted

    def discard(self, pending: QueuedRequest) -> bool:
        """Takes one call out; False when it was not in (any more)."""
        if not pending.is_waiting:
            return False
        self._remove(pending)
        self._calls -= 1
        self._waiting[pending.level] -= 1
        self.rows -= pending.rows
        self.size_bytes -= pending.size_bytes
        return True

    def next_expiry(self) -> float:
        """When a call runs out, or has to stand back; infinite when none does."""
        return min(self._expiry.next(), self._yielding.next())

    def expire(self, now: float) -> list[QueuedRequest]:
        """Takes out those whose time is over, and has those stand back whose level wants that."""
        for pending in self._yielding.until(now):
            self._remove(pending)
            pending.band += 1
            pending.share = self._shares[pending.band].of(pending.share.tenant)
            self._insert(pending, now)
        expired = list(self._expiry.until(now))
        for pending in expired:
            self.discard(pending)
        return expired

    def shed(self, horizon: float) -> list[QueuedRequest]:
        """Takes out those that are of no use at `horizon`, which is when the next batch would be done."""
        shed: list[QueuedRequest] = []
        while (pending := self._expiry.first()) is not None and pending.deadline <= horizon:
            self.discard(pending)
            shed.append(pending)
        return shed

    def ahead(self, pending: QueuedRequest, tenant: str) -> float:
        """Rows that are run before a call that would be added now: an estimate, and rather too few."""
        if pending.due < self._last_due:
            return 0  # It goes before some of those that wait: who knows how many.
        band = pending.level * self._bands_each
        rows = sum(share.rows for shares in self._shares[:band] for share in shares.waiting())
        same = self._shares[band].waiting()
        own = next((share for share in same if share.tenant == tenant), None)
        if own is None:
            return rows
        # While its own tenant's rows are run, others have their shares of the instances.
        return rows + sum(min(share.rows, own.rows * share.weight / own.weight) for share in same)

    def take(
        self, now: float, *, max_rows: int = 0, instances: int = 1, is_idle: bool = True, is_late: bool = False
    ) -> Batch | Wait:
        """The next batch; or how long to wait for one. Nothing in the queue may have expired: see `expire`.

        Args:
            max_rows: no more rows than that, where the policy is to run what is there; 0: as many as it allows.
            instances: executions that may run at the same time.
            is_idle: the calls found an instance that was free, and did not wait for one.
            is_late: nothing is worth waiting for.
        """
        if not self._lanes:
            return NOTHING
        if self._waits and not is_late:
            return self._when_due(now, instances)
        key = self._next()
        lane = self._lanes[key]
        front, is_cut = self._front(lane, max_rows)
        if is_late:
            fired = "closing"
        elif self._policy.max_rows == 1:
            fired = "alone"
        elif is_cut or lane.rows >= self._policy.max_rows:
            fired = "full"
        else:
            fired = "idle" if is_idle else "queued"
        return self._taken(key, front, fired)

    def _when_due(self, now: float, instances: int) -> Batch | Wait:
        ready: dict[Hashable, StackGroup] = {}
        runs: dict[Hashable, tuple[list[QueuedRequest], str]] = {}
        soonest: tuple[float, Hashable, list[QueuedRequest]] | None = None
        rate = self.arrivals.per_second(now) if self._has_goal else 0.0
        for key, lane in self._candidates().items():
            front, is_cut = self._front(lane)
            decision = self._decide(lane, front, is_cut, now, rate, instances)
            if isinstance(decision, Run):
                ready[key], runs[key] = lane, (front[: decision.count], decision.fired)
            elif decision.until is not None and (soonest is None or decision.until < soonest[0]):
                soonest = decision.until, key, front
        if not ready:
            return Wait(soonest[0]) if soonest else NOTHING
        key = self._first_of(ready)
        calls, fired = runs[key]
        if soonest and self._has_goal:
            until, waiting, front = soonest
            # What waits for company must not be made late by what does not.
            if until < now + self._cost.expected(sum(call.rows for call in calls)):
                return self._taken(waiting, front, "slo")
        return self._taken(key, calls, fired)

    def _decide(
        self, lane: StackGroup, front: list[QueuedRequest], is_cut: bool, now: float, rate: float, instances: int
    ) -> Decision:
        if self._has_goal:
            return slo.decide(front, now, self._policy, self._cost, rate=rate, instances=instances)
        return batcher.decide(front, lane.oldest(), now, self._policy, is_cut=is_cut)

    def _front(self, lane: StackGroup, max_rows: int = 0) -> tuple[list[QueuedRequest], bool]:
        front, is_cut = lane.front(max_rows or self._policy.max_rows, self._policy.max_bytes)
        return cast("list[QueuedRequest]", front), is_cut

    def _next(self) -> Hashable:
        """The key of the lane that the next batch is of, whatever policy there is."""
        if len(self._lanes) == 1:
            return next(iter(self._lanes))
        heads = [head for shares in self._shares if (head := _head(shares)) is not None]
        return min(heads, key=_RANK).call.key

    def _candidates(self) -> dict[Hashable, StackGroup]:
        """The lanes that are worth a decision: all, unless they are very many."""
        if len(self._lanes) <= _MANY_LANES or not self._has_goal:
            return self._lanes
        urgent = heapq.nsmallest(_MANY_LANES, self._lanes.items(), key=lambda item: item[1].soonest())
        key = self._next()
        return {key: self._lanes[key], **dict(urgent)}

    def _first_of(self, lanes: dict[Hashable, StackGroup]) -> Hashable:
        """The key of the lane whose turn it is."""
        if len(lanes) == 1:
            return next(iter(lanes))
        best: dict[int, tuple[Member, Hashable]] = {}
        for key, lane in lanes.items():
            for head in lane.heads():
                known = best.get(head.band)
                if known is None or behind(head) < behind(known[0]):
                    best[head.band] = head, key
        return min(best.values(), key=_rank_of_first)[1]

    def _taken(self, key: Hashable, calls: list[QueuedRequest], fired: str) -> Batch:
        lane = self._lanes[key]
        lane.take(calls)
        if not lane.calls:
            self._spare = self._lanes.pop(key)
        first = calls[0]
        self._shares[first.band].serving(first.share)
        touched = {first.share: first.band}
        rows = size = 0
        for call in calls:
            call.is_waiting = False
            share = call.share
            if share is not first.share:
                touched[share] = call.band
            share.calls -= 1
            share.rows -= call.rows
            share.tag += call.rows / share.weight
            rows += call.rows
            size += call.size_bytes
            self._waiting[call.level] -= 1
        self._calls -= len(calls)
        self.rows -= rows
        self.size_bytes -= size
        for share, band in touched.items():
            if share.calls:
                self._shares[band].moved(share)
            else:
                share.order.clear()
        return Batch(calls, rows, fired, leaves_rows=self._calls > 0)

    def _insert(self, pending: QueuedRequest, came: float) -> None:
        lane = self._lanes.get(pending.call.key)
        if lane is None:
            lane = self._spare or StackGroup(self._bands, by_due=self._has_goal)
            self._lanes[pending.call.key], self._spare = lane, None
        if self._bands > 1:
            # Levels are this far apart in time: who waits long enough overtakes whoever comes later (`Rules.aging_s`).
            far = min(self._rules.aging_s, _FOR_EVER_S)
            pending.rank = came + pending.band * far
        lane.add(pending)
        pending.is_waiting = True
        share = pending.share
        share.calls += 1
        share.rows += pending.rows
        share.order.append(pending)
        if share.calls == 1:
            self._shares[pending.band].moved(share)
        elif len(share.order) > 2 * share.calls + _SPARE:
            share.order = deque(call for call in share.order if call.is_waiting and call.share is share)

    def _remove(self, pending: QueuedRequest) -> None:
        lane = self._lanes[pending.call.key]
        lane.remove(pending)
        if not lane.calls:
            del self._lanes[pending.call.key]
        pending.is_waiting = False
        pending.share.calls -= 1
        pending.share.rows -= pending.rows
        pending.share.order.remove(pending)

    def _full(self, level: int, after_ms: int) -> ResourceExhausted:
        return ResourceExhausted(
            f"Exceeds maximum queue size of model '{self._model}': {self._waiting[level]} requests wait, "
            f"{self.size_bytes} bytes in all; at most {self._most[level]} and {self._limits.size_bytes} may; "
            f"retry after {after_ms} ms",
            retry_after_ms=after_ms,
        )

    def _make_room(self, pending: QueuedRequest) -> list[QueuedRequest]:
        """Whom to send away so that `pending` can stay; none: nobody has to, it is `pending` that is too much."""
        calls = self._waiting[pending.level] + 1 - self._most[pending.level]
        size = self.size_bytes + pending.size_bytes - self._limits.size_bytes
        victims: list[QueuedRequest] = []
        for victim in self._victims(pending, is_short_of_bytes=size > 0):
            if calls <= 0 and size <= 0:
                break
            victims.append(victim)
            calls -= victim.level == pending.level
            size -= victim.size_bytes
        return victims if calls <= 0 and size <= 0 else []

    def _victims(self, pending: QueuedRequest, *, is_short_of_bytes: bool) -> Iterator[QueuedRequest]:
        """Calls that have less claim to a place than `pending`, the least first."""
        bands = range(self._bands - 1, -1, -1)
        if is_short_of_bytes:
            for band in bands:
                if band // self._bands_each > pending.level:
                    for share in self._shares[band].waiting():
                        yield from self._newest(band, share)
        own = [band for band in bands if band // self._bands_each == pending.level]
        held: dict[str, float] = {}
        for band in own:
            for share in self._shares[band].waiting():
                held[share.tenant] = held.get(share.tenant, 0.0) + share.calls / share.weight
        if len(held) < (1 if pending.share.tenant not in held else 2):
            return
        most = max(held, key=lambda tenant: held[tenant])
        left = held[most]
        for band in own:
            for share in self._shares[band].waiting():
                if share.tenant != most:
                    continue
                for victim in self._newest(band, share):
                    # Only while it holds more than `pending`'s tenant will: else they would push each other out.
                    if left <= held.get(pending.share.tenant, 0.0) + 1 / pending.share.weight:
                        return
                    left -= 1 / share.weight
                    yield victim

    def _newest(self, band: int, share: TenantQueue) -> list[QueuedRequest]:
        calls: Iterable[Member] = (call for lane in self._lanes.values() for call in lane.of(band, share))
        return cast("list[QueuedRequest]", sorted(calls, key=_ARRIVED)[::-1])


_FOR_EVER_S = 1e9
# As a distance between levels: a generation, and still exact to a microsecond when added to a clock.


_MANY_LANES = 16
# To decide for hundreds of shapes each time would take longer than many a model. Those with the earliest goals count.

_SPARE = 64


def _head(shares: TenantQueues) -> QueuedRequest | None:
    """The next call of one band: the first of the tenant that is furthest behind."""
    share = shares.first()
    if share is None:
        return None
    order: deque[QueuedRequest] = share.order
    while not (order[0].is_waiting and order[0].share is share):
        order.popleft()
    return order[0]


def _rank_of_first(found: tuple[Member, Hashable]) -> float:
    return found[0].rank
